"""The model of a study, whatever its kind: for callers that need not know which one it is."""

from huizhen.learning.bases import Base
from huizhen.learning.model import AdaptedModel
from huizhen.learning.survival import CoxModel
from huizhen.learning.tabular import LinearModel
from huizhen.learning.trainable import Model
from huizhen.protocol.errors import ConfigError
from huizhen.protocol.study import Study
from huizhen.protocol.study_terms import BaseTerms
from huizhen.strategies.ranks import site_rank


def make_model(study: Study, base: Base | None, *, site: str | None = None) -> Model:
    """Return the model that a study trains, with the study's first adapter or zeros in it.

    Args:
        study: with its labels filled in.
        base: from ``resolve``; None for a tabular or survival study, which has none.
        site: whose rank to train; the study's when None.

    Raises:
        ConfigError: the base is not the one that the study was agreed on, the adapter does not fit
            it, or there are fewer than two classes.
    """
    if study.task.kind != "instruction" and len(study.task.labels) < 2:
        raise ConfigError(
            f"[task] labels has {len(study.task.labels)} classes, a {study.task.kind} task needs "
            "two: list them"
        )
    if study.task.kind == "tabular":
        return LinearModel(study)
    if study.task.kind == "survival":
        return CoxModel(study)
    if study.base is None or base is None:
        raise ConfigError("study has no [base]: add the section")
    check_digests(study.base, base)
    return AdaptedModel(base, study, rank=site_rank(study, site))


def check_digests(agreed: BaseTerms, base: Base) -> None:
    """Refuse a base that differs from what a study names.

    Raises:
        ConfigError: naming the first file that differs.
    """
    for name, digest in agreed.digests.items():
        if base.digests.get(name) != digest:
            raise ConfigError(
                f"[base] file {name!r} has digest {base.digests.get(name)}, expected {digest}: "
                "get the base that the study was agreed on"
            )
