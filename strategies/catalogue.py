"""The strategies that a study may name; their parameters are in ``protocol/strategy_terms.py``."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from huizhen.protocol.adapter import is_head
from huizhen.protocol.strategy_terms import PARAMETERS, StrategyTerms, shares_of
from huizhen.protocol.study import Study
from huizhen.strategies.base import Strategy
from huizhen.strategies.fed_sb import FedSb
from huizhen.strategies.fedavg import FedAvg
from huizhen.strategies.fedex import FedEx
from huizhen.strategies.fedopt import FedAdagrad, FedAdam, FedAvgM, FedYogi
from huizhen.strategies.fedsa import FedSa
from huizhen.strategies.fedsvd import FedSvd
from huizhen.strategies.ffa import Ffa, FfaOrtho
from huizhen.strategies.ffa_refresh import FfaRefresh
from huizhen.strategies.flora import FLora
from huizhen.strategies.hetlora import HetLora
from huizhen.strategies.ranks import site_rank
from huizhen.strategies.rolora import RoLora
from huizhen.strategies.scaffold import Scaffold
from huizhen.strategies.svd import Svd

_MAKERS: dict[str, Callable[["Public", dict[str, Any]], Strategy]] = {
    "fedavg": lambda public, own: FedAvg(),
    "fedprox": lambda public, own: FedAvg(),  # its term is the site's, in client/turn.py
    "fedavgm": lambda public, own: FedAvgM(**own),
    "fedadam": lambda public, own: FedAdam(**own),
    "fedyogi": lambda public, own: FedYogi(**own),
    "fedadagrad": lambda public, own: FedAdagrad(**own),
    "scaffold": lambda public, own: Scaffold(travel=public.travel, rounds=public.rounds, **own),
    "ffa": lambda public, own: Ffa(),
    "ffa_ortho": lambda public, own: FfaOrtho(seed=public.seed),
    "ffa_refresh": lambda public, own: FfaRefresh(seed=public.seed, rounds=public.rounds, **own),
    "rolora": lambda public, own: RoLora(**own),
    "flora": lambda public, own: FLora(seed=public.seed, ranks=public.ranks),
    "fedex": lambda public, own: FedEx(ranks=public.ranks - public.ranks // max(1, public.sites)),
    "svd": lambda public, own: Svd(),
    "fedsvd": lambda public, own: FedSvd(seed=public.seed),
    "hetlora": lambda public, own: HetLora(),
    "fedsa": lambda public, own: FedSa(),
    "fed_sb": lambda public, own: FedSb(seed=public.seed),
}


@dataclass(frozen=True, slots=True)
class Public:
    """What a strategy knows beside its own parameters."""

    seed: int
    # of shared random bases
    ranks: int
    # of all sites together
    sites: int
    travel: Callable[[str, int], float] = lambda name, round: 1.0
    # local steps times learning rate, of a tensor in a round
    rounds: int | None = None
    # of the study; None where nobody knows


def make_strategy(study: Study) -> Strategy:
    """Return the strategy that the study names."""
    ranks = sum(site_rank(study, name) or 0 for name in study.sites)

    def travel(name: str, round: int) -> float:
        return study.rounds.local_steps * study.learning_rate(round, head=is_head(name))

    public = Public(study.study.seed, ranks, len(study.sites), travel, study.rounds.count)
    return strategy_of(study.strategy, public)


def strategy_of(terms: StrategyTerms, public: Public) -> Strategy:
    """Return the strategy of some terms."""
    own = {name: getattr(terms, name) for name in PARAMETERS[terms.name]}
    return _MAKERS[terms.name](public, own)


def site_shares(study: Study) -> dict[str, float]:
    """Return each site's public weight w_i / Σw."""
    sizes = {name: site.patients_public for name, site in study.sites.items()}
    return shares_of(study.strategy.weights, sizes)
