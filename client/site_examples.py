"""A site's records on their way to training: one way, in a simulation and at a hospital."""

from dataclasses import dataclass

from huizhen.client.examples import Examples, make_examples, make_held_out
from huizhen.client.governance import Admitted
from huizhen.client.selection import select
from huizhen.learning.tasks import Encoder, fields_read
from huizhen.learning.trainable import Model
from huizhen.protocol.errors import GovernanceError


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteExamples:
    """What a model reads of one site."""

    train: Examples
    # the records whose class the study lists
    read: Examples
    # those and the ones whose class it does not list, which are not trained on
    held_out: Examples
    fields_dropped: tuple[str, ...]


def site_examples(admitted: Admitted, encoder: Encoder, model: Model) -> SiteExamples:
    """De-identify a site's records and return them as examples.

    Args:
        admitted: what governance let pass.
        encoder: of the model.
        model: of the study.

    Raises:
        GovernanceError: the policy does not allow a field of the task, a text, label or answer is
            empty, a feature is no number, or too few patients have a class that the study lists.
        ConfigError: a record lacks a field of the task.
    """
    policy = admitted.policy
    clean = select(admitted, fields_read(model.study.task))
    read = make_examples(clean, encoder, model)
    held_out = make_held_out(clean, encoder, model)
    train = read.with_known_labels()
    if train.num_patients < policy.minimum_patients:
        raise GovernanceError(
            f"site {policy.site!r} has {train.num_patients} training patients with a class of "
            f"[task] labels, at least {policy.minimum_patients} are needed: list more classes or "
            "leave it out"
        )
    return SiteExamples(
        train=train, read=read, held_out=held_out, fields_dropped=clean.fields_dropped
    )
