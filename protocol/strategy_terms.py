"""``[strategy]``: which way to average, its parameters, and the pairs that cannot be.

Only what a strategy uses may be set, and what it uses is always in the study's digest: a parameter
that the file leaves out takes its default here.
"""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

# The names a study may use, with the parameters of each and their defaults. What each does is in
# huizhen.strategies, one file per paper.
PARAMETERS: Mapping[str, Mapping[str, float]] = {
    "fedavg": {},
    "fedprox": {"mu": 0.01},
    "fedavgm": {"server_learning_rate": 1.0, "beta1": 0.9},
    "fedadam": {"server_learning_rate": 0.01, "beta1": 0.9, "beta2": 0.99, "tau": 1e-3},
    "fedyogi": {"server_learning_rate": 0.01, "beta1": 0.9, "beta2": 0.99, "tau": 1e-3},
    "fedadagrad": {"server_learning_rate": 0.01, "beta1": 0.0, "tau": 1e-3},
    "scaffold": {"server_learning_rate": 1.0},
    "ffa": {},
    "ffa_ortho": {},
    "ffa_refresh": {"every": 5},
    "rolora": {"warm_rounds": 0},
    "flora": {},
    "fedex": {},
    "svd": {},
    "fedsvd": {},
    "hetlora": {},
    "fedsa": {},
    "fed_sb": {},
}
SEE_EACH_UPDATE = frozenset({"flora", "fedex", "svd", "hetlora"})
"""They need the product of each site's factors, which no sum of updates gives."""

MIXED_RANKS = frozenset({"ffa", "ffa_ortho", "ffa_refresh", "flora", "svd", "hetlora"})
"""They take updates of sites whose hardware carries fewer ranks than the study has."""

MERGES = frozenset({"ffa_refresh", "flora", "fedex"})
"""They merge what was learnt into the base's weights."""

LEAST_SHARE = 2.0**-14
# of a site: the sum's grid of 2^-36 leaves its update too few bits below that

WITHOUT_LORA = frozenset(
    {"fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi", "fedadagrad", "scaffold"}
)
"""They average whatever is trained, a tabular model's weights too."""

PERSONAL = frozenset({"fedsa"})
"""A part of the model stays at each site: there is no one release, and no privacy, for that part is
trained without noise and what leaves depends on it."""

NEEDS_EVERY_NUMBER = frozenset({"fedavgm", "fedadam", "fedyogi", "fedadagrad", "scaffold"})
"""They take an update for a gradient: a number that was not sent would be one of 0."""

Weights = Literal["equal", "public", "inverse_variance"]
Combine = Literal[
    "mean", "median", "trimmed_mean", "geometric_median", "multi_krum", "centred_clipping"
]
_UNWEIGHTED = ("median", "trimmed_mean", "multi_krum")
_NEEDS: Mapping[str, str] = {
    "trimmed_mean": "byzantine",
    "multi_krum": "byzantine",
    "centred_clipping": "clip_radius",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StrategyTerms:
    """``[strategy]``: how updates become the next adapter."""

    name: str = "ffa_ortho"
    weights: Weights = "equal"
    # public: in proportion to patients_public; inverse_variance: to its square, for under DP the
    # noise of a site's update falls with the public size of its batch
    combine: Combine = "mean"
    # how the updates of a round become one
    byzantine: int | None = None
    # f: how many sites may lie; trimmed_mean leaves out f at either end, multi_krum the f oddest
    clip_radius: float | None = None
    # centred_clipping: how far an update may lie from the centre
    mu: float | None = None
    # fedprox: weight of the pull towards the announced adapter
    server_learning_rate: float | None = None
    # fedavgm, fedadam, fedyogi, fedadagrad, scaffold
    beta1: float | None = None
    # of the first moment
    beta2: float | None = None
    # of the second moment
    tau: float | None = None
    # added to the root of the second moment
    every: int | None = None
    # ffa_refresh: rounds between two merges
    warm_rounds: int | None = None
    # rolora: so many rounds train B alone before the factors take turns

    def __post_init__(self) -> None:
        if self.name not in PARAMETERS:
            near = difflib.get_close_matches(self.name, PARAMETERS, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(PARAMETERS)}"
            raise ValueError(f"name is {self.name!r}: {hint}")
        own = PARAMETERS[self.name]
        for name in sorted({name for values in PARAMETERS.values() for name in values}):
            if name not in own:
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} has no meaning for {self.name!r}: remove it")
            elif getattr(self, name) is None:
                object.__setattr__(self, name, own[name])
        self._check_values()
        self._check_combine()

    def _check_values(self) -> None:
        for name in ("server_learning_rate", "tau", "clip_radius"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {value}, expected more than 0")
        if self.mu is not None and not (math.isfinite(self.mu) and self.mu >= 0):
            raise ValueError(f"mu is {self.mu}, expected 0 or more")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{name} is {value}, expected 0 to under 1")
        for name, least in (("every", 1), ("warm_rounds", 0), ("byzantine", 1)):
            value = getattr(self, name)
            if value is not None and not least <= value <= 1_000_000:
                raise ValueError(f"{name} is {value}, expected {least} to 1000000")

    def _check_combine(self) -> None:
        for name in ("byzantine", "clip_radius"):
            is_set, is_needed = getattr(self, name) is not None, _NEEDS.get(self.combine) == name
            if is_set and not is_needed:
                raise ValueError(f"{name} has no meaning for combine {self.combine!r}: remove it")
            if is_needed and not is_set:
                raise ValueError(f"combine is {self.combine!r}, it needs {name}: add it")
        if self.combine != "mean" and self.name in SEE_EACH_UPDATE:
            raise ValueError(
                f"combine is {self.combine!r}, but {self.name!r} works on each site's product: "
                "set combine = 'mean', or another name"
            )
        if self.combine in _UNWEIGHTED and self.weights != "equal":
            raise ValueError(
                f"weights is {self.weights!r}, combine {self.combine!r} counts every site alike: "
                "set weights = 'equal'"
            )

    def alone(self) -> "StrategyTerms":
        """Return the terms of a site by itself: it trains the same factors, nothing is combined."""
        if self.name in WITHOUT_LORA | PERSONAL:
            return StrategyTerms(name="fedavg")
        own = {name: getattr(self, name) for name in PARAMETERS[self.name]}
        return StrategyTerms(name=self.name, **own)

    def check_rounds(self, count: int) -> None:
        """Refuse a parameter that so few rounds leave without effect.

        Raises:
            ValueError: by name.
        """
        for name in ("every", "warm_rounds"):
            value = getattr(self, name)
            if value is not None and value >= count:
                raise ValueError(
                    f"{name} is {value}, the study has {count} rounds: with {self.name!r} it must "
                    "be lower"
                )

    def check_sites(self, sites: int, quorum: int) -> None:
        """Refuse a rule that so few sites cannot carry.

        Args:
            sites: of the study.
            quorum: the fewest that make a round: the rule must hold then too.

        Raises:
            ValueError: the breakdown condition of the rule is not met.
        """
        if self.byzantine is None:
            return
        least = 2 * self.byzantine + (3 if self.combine == "multi_krum" else 1)
        if quorum < least:
            raise ValueError(
                f"combine is {self.combine!r} with byzantine = {self.byzantine}, it needs {least} "
                f"updates in every round; the study has {sites} sites and a quorum of {quorum}: "
                "raise [rounds] quorum, or lower byzantine"
            )


def shares_of(weights: Weights, sizes: Mapping[str, int]) -> dict[str, float]:
    """Return each site's share w_i / Σw.

    Args:
        weights: how sites are weighed.
        sizes: the public number of patients of each site.
    """
    match weights:
        case "equal":
            found = dict.fromkeys(sizes, 1)
        case "public":
            found = dict(sizes)
        case "inverse_variance":
            found = {name: size**2 for name, size in sizes.items()}
    total = sum(found.values())
    return {name: weight / total for name, weight in found.items()}
