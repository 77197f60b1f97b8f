"""What each strategy is in a sentence, and what it moves: for people who choose one."""

from collections.abc import Mapping
from dataclasses import dataclass

from huizhen.protocol.adapter import Shapes
from huizhen.protocol.strategy_terms import PARAMETERS, StrategyTerms
from huizhen.strategies.base import CORE, A, B, Facts, bytes_of
from huizhen.strategies.catalogue import Public, strategy_of

ABOUT: Mapping[str, str] = {
    "fedavg": "both factors averaged apart, FedIT (McMahan 2017, Zhang 2024)",
    "fedprox": "fedavg, each site pulled towards the announced adapter (Li 2020)",
    "fedavgm": "fedavg with momentum at the coordinator (Hsu 2019)",
    "fedadam": "fedavg with Adam at the coordinator (Reddi 2021)",
    "fedyogi": "fedavg with Yogi at the coordinator (Reddi 2021)",
    "fedadagrad": "fedavg with Adagrad at the coordinator (Reddi 2021)",
    "scaffold": "fedavg, each site's steps turned towards everyone's (Karimireddy 2020)",
    "ffa": "A frozen as it began, B averaged (Sun 2024)",
    "ffa_ortho": "A frozen with orthonormal rows of a public seed, B averaged",
    "ffa_refresh": "ffa_ortho that merges and draws another A every few rounds",
    "rolora": "B in odd rounds, A in even ones (Chen 2025)",
    "flora": "factors stacked, the whole product merged, a new adapter (Wang 2024)",
    "fedex": "fedavg, what it misses merged into the base (Singhal 2025)",
    "svd": "the mean product cut to the rank, FlexLoRA (Bai 2024)",
    "fedsvd": "ffa_ortho with its factors turned after each round (Lee 2025)",
    "hetlora": "zero-padded factors weighed by norms (Cho 2024)",
    "fedsa": "A averaged, B and head stay at the site: a model for each (Guo 2025)",
    "fed_sb": "an r x r core between two frozen factors (Singhal 2025)",
}


@dataclass(frozen=True, slots=True)
class Choice:
    """One strategy as a user sees it before choosing."""

    name: str
    about: str
    facts: Facts
    up: int
    # bytes that a site sends in a round, the most over the rounds
    down: int
    # bytes that a site is sent in the second round
    down_last: int
    # and for the last one: what was merged grows


def choices(shapes: Shapes, *, sites: int, rounds: int) -> list[Choice]:
    """Return every strategy with what it moves for an adapter of these shapes.

    Args:
        shapes: of A, B and the head at the study's rank.
        sites: that train, all of that rank.
        rounds: of the study.
    """
    found = []
    rank = max((shape[0] for name, shape in shapes.items() if name.endswith(A)), default=0)
    for name in PARAMETERS:
        strategy = strategy_of(StrategyTerms(name=name), Public(0, rank * sites, sites))
        own = dict(shapes)
        if name == "fed_sb":
            own |= {n.removesuffix(B) + CORE: (rank, rank) for n in shapes if n.endswith(B)}
        up = max(
            bytes_of({n: own[n] for n in strategy.sends(own, round)})
            for round in range(1, min(rounds, 4) + 1)
        )
        down = [bytes_of(strategy.announces(own, round)) for round in (min(2, rounds), rounds)]
        found.append(Choice(name, ABOUT[name], strategy.facts, up, *down))
    return found


def square(modules: int, width: int, rank: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of an adapter of so many square layers."""
    found: dict[str, tuple[int, ...]] = {}
    for i in range(modules):
        found |= {f"layer.{i}{A}": (rank, width), f"layer.{i}{B}": (width, rank)}
    return found
