"""What a study starts from: its base's digests filled in, and the first adapter."""

from dataclasses import replace
from pathlib import Path

from huizhen.learning.bases import resolve
from huizhen.learning.models import check_digests, make_model
from huizhen.protocol.adapter import Tensors
from huizhen.protocol.study import Study
from huizhen.protocol.study_terms import BaseTerms


def with_digests(terms: BaseTerms, home: Path | None) -> BaseTerms:
    """Return the section with the name and digests that are the same wherever the folder lies.

    Raises:
        ConfigError: the base is not here, or is another than the terms name.
    """
    base = resolve(terms.name, home=home)
    check_digests(terms, base)
    return replace(terms, name=base.name, digests=dict(base.digests))


def first_adapter(study: Study, home: Path | None) -> tuple[Study, Tensors]:
    """Return a study as it can be offered, and the adapter that its first round starts from.

    Args:
        study: as its file has it; labels are listed.
        home: where base models are cached; None for the platform's folder.

    Raises:
        ConfigError: the base is not here, or the adapter does not fit it.
    """
    base = None if study.base is None else resolve(study.base.name, home=home)
    if study.base is not None:
        study = replace(study, base=with_digests(study.base, home))
    return study, make_model(study, base).first_tensors(study.study.seed)
