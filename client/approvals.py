"""A hospital's consent to one study: people sign it, then the site's own key puts it in force.

An approval is one document (``protocol/statements.py``). Stewards sign it with keys of their own,
in any order, each on their own machine, where it comes as a file; the site's identity key signs
last, and only what the policy allows and enough different people have signed. So no approval that
the alliance could rely on exists before they have. Who counts is whom the policy names now: a
steward who is taken out of it no longer counts for what was approved before.
"""

import contextlib
import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from huizhen.client.decision import (
    objections_to_approval,
    objections_to_consent,
    objections_to_signatures,
)
from huizhen.client.policy import Policy
from huizhen.client.situation import (
    LedgerView,
    Offered,
    Refused,
    SignedApproval,
    check_zone,
)
from huizhen.protocol.documents import (
    PublicKey,
    claimed,
    countersign,
    public_key,
    public_of,
    verify,
)
from huizhen.protocol.errors import GovernanceError, ProtocolError, WireError
from huizhen.protocol.statements import Approval, stamp


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Whether an approval is in force, and what it lacks."""

    signed: SignedApproval
    missing: tuple[str, ...]
    # stewards who have not signed, by the names of the policy
    refusal: Refused | None
    # None: it is in force

    @property
    def is_in_force(self) -> bool:
        """Whether nothing is lacking."""
        return self.refusal is None


def draft_approval(
    policy: Policy,
    offered: Offered,
    *,
    alliance: str,
    cohort: str,
    epsilon_cap: float | None,
    now: datetime,
    expires: datetime,
) -> Approval:
    """Return an approval that nobody has signed.

    Args:
        policy: of the site.
        offered: the study.
        alliance: its name.
        cohort: on which the study trains.
        epsilon_cap: what the study may spend here; None where it has no unit of privacy.
        now: the present time, with a zone.
        expires: until when the approval holds, with a zone; at the study's end at the latest.
    """
    check_zone(now)
    check_zone(expires)
    return Approval(
        alliance=alliance,
        study=offered.digest,
        site=policy.site,
        cohort=cohort,
        epsilon_cap=epsilon_cap,
        issued=stamp(now),
        expires=stamp(min(expires, offered.ends)),
    )


def write_draft(document: Approval | bytes) -> bytes:
    """Return an approval as a file for people to sign; one that nobody has signed is plain JSON."""
    if isinstance(document, bytes):
        return document
    value = document.model_dump(mode="json", by_alias=True)
    return (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode()


def read_draft(data: bytes) -> Approval | bytes:
    """Return what ``write_draft`` wrote, or what somebody has signed of it since.

    Raises:
        WireError: it is neither.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise WireError("draft is not JSON, expected what 'site approve --draft' wrote") from error
    if not isinstance(value, dict):
        raise WireError("draft is no JSON object, expected what 'site approve --draft' wrote")
    return data if "payload" in value else Approval.of_body(value)


def claimed_approval(document: Approval | bytes) -> Approval:
    """Return what a draft says, whoever has signed it.

    Raises:
        WireError: the bytes are no approval.
    """
    if isinstance(document, Approval):
        return document
    return Approval.of_body(claimed(document))


def sign_apart(document: Approval | bytes, key: Ed25519PrivateKey) -> tuple[Approval, bytes]:
    """Return what a person signs away from the site, and the document with the signature.

    Whether the person is a steward the site's policy says, when the site takes the document in.

    Raises:
        ProtocolError: the document is no approval.
    """
    data = document.signed(key) if isinstance(document, Approval) else countersign(document, key)
    return Approval.read(data, [public_of(key)]), data


def sign_as_steward(
    document: Approval | bytes, policy: Policy, site_key: PublicKey, key: Ed25519PrivateKey
) -> bytes:
    """Return an approval with a person's signature; signing twice is signing once.

    Args:
        document: a draft, or what others have signed already.
        policy: of the site.
        site_key: the site's identity.
        key: the person's.

    Raises:
        GovernanceError: the policy does not name the person, or the approval is another site's.
        ProtocolError: the document is no approval that one of those who may has signed.
    """
    own = public_of(key)
    if own not in _stewards(policy, site_key).values():
        raise GovernanceError(
            f"key {own.raw.hex()} is of no steward, [approval.stewards] must name it: "
            "let the policy's owner add it"
        )
    return _sign(document, policy, site_key, key)


def sign_as_site(
    document: Approval | bytes,
    policy: Policy,
    offered: Offered,
    ledger: LedgerView | None,
    key: Ed25519PrivateKey,
    now: datetime,
) -> bytes:
    """Return an approval with the site's signature, which puts it in force.

    Args:
        document: a draft where no steward need sign, else what they have signed.
        policy: of the site.
        offered: the study.
        ledger: of the approval's cohort; None where there is none.
        key: the site's identity.
        now: the present time, with a zone.

    Raises:
        GovernanceError: the policy refuses the study, or too few stewards have signed.
        ProtocolError: the document is no approval that one of those who may has signed.
    """
    data = _sign(document, policy, public_of(key), key)
    signed = read_approval(data, policy, public_of(key))
    for refused in (
        *objections_to_signatures(policy, signed),
        *objections_to_approval(policy, offered, signed.approval, ledger, now),
    ):
        raise GovernanceError(refused.line)  # the signature is forgotten
    return data


def read_approval(data: bytes, policy: Policy, site_key: PublicKey) -> SignedApproval:
    """Return what an approval says and who has signed it, of those whose signature counts.

    Args:
        data: the document, from anyone.
        policy: of the site; it names the stewards.
        site_key: the site's identity.

    Raises:
        ProtocolError: it is no approval, none of them has signed it, or a signature is wrong.
    """
    stewards = _stewards(policy, site_key)
    document = verify(data, kind=Approval.kind, keys=[site_key, *stewards.values()])
    return SignedApproval(
        approval=Approval.of(document),
        is_signed_by_site=site_key.id in document.signers,
        stewards=tuple(sorted(n for n, one in stewards.items() if one.id in document.signers)),
    )


def approval_stands(data: bytes, policy: Policy, site_key: PublicKey, now: datetime) -> Standing:
    """Return whether an approval is in force, who has signed it and who has not.

    It says nothing of the study, which ``decision.decide`` looks at each time.

    Raises:
        ProtocolError: it is no approval, none of those who may has signed it, or a signature is
            wrong.
    """
    signed = read_approval(data, policy, site_key)
    return Standing(
        signed=signed,
        missing=tuple(sorted(policy.approval.stewards.keys() - set(signed.stewards))),
        refusal=next(
            itertools.chain(
                objections_to_signatures(policy, signed),
                objections_to_consent(policy, signed.approval, now),
            ),
            None,
        ),
    )


def is_in_force(
    data: bytes | None, policy: Policy, site_keys: Iterable[PublicKey], now: datetime
) -> bool:
    """Whether there is an approval and it lacks nothing.

    Args:
        data: the document; None where there is none.
        policy: of the site.
        site_keys: the site's identity, and those that it had before: their consents still stand.
        now: the present time, with a zone.
    """
    if data is None:
        return False
    for key in site_keys:
        with contextlib.suppress(ProtocolError):  # this one has not signed it
            if approval_stands(data, policy, key, now).is_in_force:
                return True
    return False


def _stewards(policy: Policy, site_key: PublicKey) -> dict[str, PublicKey]:
    """Return the people's keys; the site's own is nobody's, whatever the policy calls it."""
    keys = {n: public_key(bytes.fromhex(key)) for n, key in policy.approval.stewards.items()}
    return {name: key for name, key in keys.items() if key != site_key}


def _sign(
    document: Approval | bytes, policy: Policy, site_key: PublicKey, key: Ed25519PrivateKey
) -> bytes:
    if isinstance(document, Approval):
        approval, data = document, document.signed(key)
    else:
        approval = read_approval(document, policy, site_key).approval
        data = countersign(document, key)
    if approval.site != policy.site:
        raise GovernanceError(
            f"the approval is of site {approval.site!r}, the policy of {policy.site!r}"
        )
    return data
