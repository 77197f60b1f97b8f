"""Who has seen whose log: the coordinator witnesses every site's, and passes signatures on.

The coordinator countersigns a site's checkpoint when its log only grew; two other sites do the same
through it. What it passes on are signed documents, so that it can hold a head back and no more.
"""

from huizhen.protocol.audit_checkpoints import (
    COORDINATOR,
    claimed_checkpoint,
    same_statement,
    with_signatures,
    witnesses_of,
)
from huizhen.protocol.documents import verify
from huizhen.protocol.statements import Checkpoint
from huizhen.server.desk import Desk
from huizhen.server.store_sites import StoredHead


def witness(desk: Desk, site: str, checkpoint: bytes, proof: list[bytes]) -> bytes:
    """Return a site's checkpoint countersigned, or the last one that was seen of its log.

    Raises:
        ProtocolError: the site has not signed it, or it is of another log.
        ForkError: the site has signed two histories.
        StorageError: it cannot be written down.
    """
    seen = desk.book.see(
        checkpoint,
        proof,
        alliance=desk.alliance,
        log=site,
        owner=desk.registry.trust().keys(site),
        key=desk.keys.identity,
    )
    _keep(desk, seen.document)
    return seen.document


def heads(desk: Desk, site: str, log: str, after: int) -> list[tuple[bytes, list[bytes]]]:
    """Return how a log went on, for a witness; of a site's own log, with what others have signed.

    Raises:
        StorageError: the coordinator's checkpoint cannot be stored.
    """
    if log == site:
        found = desk.store.sites.heads(log)
        return [(one.document, []) for one in found if one.size > after]
    if log != COORDINATOR:
        return desk.book.heads(log, after)
    document = desk.audit.checkpoint(desk.keys.identity)
    size = claimed_checkpoint(document).size
    if size <= after:
        return []
    return [(document, desk.audit.proof(after, size) if after else [])]


def take_countersigned(desk: Desk, site: str, document: bytes) -> None:
    """Take a checkpoint of another party with a site's signature on it.

    Raises:
        ProtocolError: the site has not signed it.
        AuditError: it is of the coordinator's log, which never was so.
    """
    keys = desk.registry.trust().keys(site)
    said = Checkpoint.of(verify(document, kind=Checkpoint.kind, keys=keys))
    if said.log == COORDINATOR:
        desk.audit.countersigned(document, keys)
        return
    for kept in desk.store.sites.heads(said.log):
        if same_statement(kept.document, document):
            _keep(desk, with_signatures(kept.document, document, [keys[0].id]))


def to_witness(desk: Desk, site: str) -> list[str]:
    """Return the logs that a site is asked to witness."""
    sites = [member.site for member in desk.registry.trust().active]
    return [log for log in [COORDINATOR, *sites] if site in witnesses_of(log, sites)]


def _keep(desk: Desk, document: bytes) -> None:
    said = claimed_checkpoint(document)
    desk.store.sites.add_head(
        StoredHead(
            log=said.log,
            size=said.size,
            root=said.root,
            document=document,
            received=desk.clock(),
        )
    )
