"""The strategies that a study may name."""

import difflib
from collections.abc import Callable

from huizhen.protocol.errors import ConfigError
from huizhen.protocol.study import Study
from huizhen.strategies.base import Strategy
from huizhen.strategies.fedavg import FedAvg
from huizhen.strategies.ffa import FfaOrtho

_MAKERS: dict[str, Callable[[Study], Strategy]] = {
    "fedavg": lambda study: FedAvg(),
    "ffa_ortho": lambda study: FfaOrtho(seed=study.study.seed),
}


def make_strategy(study: Study) -> Strategy:
    """Return the strategy that the study names.

    Raises:
        ConfigError: the name is unknown; the message names the nearest.
    """
    name = study.strategy.name
    if name not in _MAKERS:
        near = difflib.get_close_matches(name, _MAKERS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(_MAKERS)}"
        raise ConfigError(f"[strategy] name is {name!r}: {hint}")
    return _MAKERS[name](study)


def site_shares(study: Study) -> dict[str, float]:
    """Return each site's public weight w_i / Σw."""
    if study.strategy.weights == "equal":
        return dict.fromkeys(study.sites, 1 / len(study.sites))
    total = sum(site.patients_public for site in study.sites.values())
    return {name: site.patients_public / total for name, site in study.sites.items()}
