"""Any strategy of this project in an unmodified Flower ``ServerApp``.

    from huizhen.server.flower import as_flower_strategy

    @app.main()
    def main(grid, context):
        strategy = as_flower_strategy("svd", sites=3)
        result = strategy.start(grid=grid, initial_arrays=ArrayRecord(adapter), num_rounds=5)

The adapter's arrays are PEFT's (``….lora_A.weight``, with or without the adapter's name) or this
project's (``….lora_A``); what is neither factor is averaged as a head is. A reply holds the arrays
after training, as Flower's own strategies have it; what a round does not train is ignored there.
Each message's config says which arrays to train (``huizhen-trains``) and, for ``fedprox``, the
``proximal-mu``. What ``flora``, ``fedex`` and ``ffa_refresh`` merge into the base comes as two more
arrays for each module, ``….merged_A`` and ``….merged_B``: W + s·merged_B·merged_A. ``fed_sb`` puts
``….lora_R`` between the factors. ``fedsa`` says in ``huizhen-keeps`` which arrays a site goes on
with as it has them. ``scaffold`` sends c as one more array ``….control`` for each, from the second
round on; a reply holds x − η·Σ g, the site's steps without their corrections.

Nothing of the project's protocol is here: no privacy, no signatures, no record of what was counted.
State lives as long as the ServerApp. A reply that cannot count is left out, with a code and the
node that sent it (``refused``), and the round goes on with the rest.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from logging import WARNING
from typing import Any, Literal

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result
from flwr.supercore import log

from huizhen.protocol.adapter import Tensors, difference, shapes_of
from huizhen.protocol.errors import AggregationError, ConfigError
from huizhen.protocol.strategy_terms import StrategyTerms
from huizhen.protocol.strict import build
from huizhen.server.validation import update_norm
from huizhen.strategies import mean
from huizhen.strategies.base import (
    CORE,
    MERGED_A,
    MERGED_B,
    A,
    Averaging,
    Given,
    Stacking,
    StrategyState,
    modules,
    pair,
)
from huizhen.strategies.catalogue import Public, strategy_of
from huizhen.strategies.robust import rule_of

_MOST_EXAMPLES = 2.0**53
_ARRAY_HEADER_BYTES = 4096
_PEFT = re.compile(r"^(?:base_model\.model\.)?(.+\.lora_[ABR])(?:\.[^.]+)?\.weight$")


class FlowerStrategy(FedAvg):
    """One of the project's strategies behind Flower's interface.

    Attributes:
        refused: round, node and code of each reply that was left out.
    """

    def __init__(
        self,
        terms: StrategyTerms,
        *,
        sites: int,
        seed: int,
        weighted: bool,
        max_update_norm: float,
        travel: float,
        **sampling: Any,
    ) -> None:
        """Prepare; the state begins with the first round's arrays."""
        # Flower takes the larger of a fraction and a number: a fraction so small leaves the number.
        own = {"fraction_train": 1e-9, "min_train_nodes": sites, "min_available_nodes": sites}
        super().__init__(**{**own, **sampling})
        self.refused: list[tuple[int, int, str]] = []
        self._terms, self._sites, self._seed = terms, sites, seed
        self._weighted, self._max_norm = weighted, max_update_norm
        self._travel = travel
        self._keys: dict[str, str] = {}
        self._state: StrategyState | None = None
        self._round = 0

    def start(self, *arguments: Any, **named: Any) -> Result:
        """Run the rounds from the arrays that are given, whatever ran before."""
        self._state, self._keys, self.refused = None, {}, []
        return super().start(*arguments, **named)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send every site the adapter as the strategy has it, and say what to train."""
        if self._state is None:
            self._begin(arrays)
        names = self._strategy.trains(self._shapes, server_round)
        config["huizhen-trains"] = [self._keys.get(name, name) for name in sorted(names)]
        kept = self._strategy.keeps(self._shapes).keys() & self._shapes.keys()
        if kept:
            config["huizhen-keeps"] = [self._keys.get(name, name) for name in sorted(kept)]
        if self._terms.mu is not None:
            config["proximal-mu"] = self._terms.mu
        if self._state is None:
            raise ConfigError("the strategy has no arrays yet: call start()")
        told = self._strategy.announced(self._state, self._shapes, server_round)
        sent = self._record({**self._state.x, **told})
        return super().configure_train(server_round, sent, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the next adapter, and the metrics of the sites that were counted."""
        arrived, _ = self._check_and_log_replies(replies, is_train=True, validate=False)
        names = self._strategy.sends(self._shapes, server_round)
        counted: list[RecordDict] = []
        given: list[Given] = []
        for message in arrived:
            found, weight = self._update(message, names), self._weight(message)
            found = "no_weight" if weight is None else found
            node = message.metadata.src_node_id
            is_second = any(one.site == _site(node) for one in given)
            if weight is None or isinstance(found, str) or is_second:
                code = found if isinstance(found, str) else "duplicate"
                self.refused.append((server_round, node, code))
                log(WARNING, "reply of node %s in round %s is %s", node, server_round, code)
                continue
            given.append(Given(_site(node), weight, found))
            counted.append(message.content)
        if not given:
            return None, None
        total = sum(one.share for one in given)
        given = [replace(one, share=one.share / total) for one in given]
        try:
            self._state = self._after(given, server_round)
        except AggregationError as error:  # too few for the rule: the adapter stays
            log(WARNING, "round %s changes nothing: %s", server_round, error)
            return None, None
        return self._record(self._state.x), self._metrics(counted)

    def _metrics(self, counted: list[RecordDict]) -> MetricRecord | None:
        """Return the metrics of those that were counted, if all say how much they weigh."""
        for content in counted:
            if not any(self.weighted_by_key in m for m in content.metric_records.values()):
                return None
        try:
            return self.train_metrics_aggr_fn(counted, self.weighted_by_key)
        except Exception as error:  # noqa: BLE001 - metrics unlike the others', in Flower's code
            log(WARNING, "metrics of a round cannot be joined: %s", error)
            return None

    def _begin(self, arrays: ArrayRecord) -> None:
        first: dict[str, np.ndarray[Any, Any]] = {}
        for key, array in arrays.items():
            match = _PEFT.match(key)
            name = match[1] if match else key
            if name in first:
                raise ConfigError(f"arrays {self._keys[name]!r} and {key!r} are both {name!r}")
            self._keys[name] = key
            value = array.numpy()
            if value.dtype.kind != "f":
                raise ConfigError(f"array {key!r} is {value.dtype}, only floats can be averaged")
            if name.endswith((MERGED_A, MERGED_B)):
                raise ConfigError(
                    f"array {key!r} is what an earlier run has merged: merge it into the base first"
                )
            first[name] = value.astype("<f4", order="C")
        ranks = {value.shape[0] for name, value in first.items() if name.endswith(A)}
        if not ranks and self._terms.name not in ("fedavg", "fedprox"):
            log(WARNING, "no array is a LoRA factor (….lora_A.weight): all are averaged alike")
        travel = self._travel
        public = Public(
            self._seed,
            max(ranks, default=0) * self._sites,
            self._sites,
            lambda name, round: travel,
        )
        self._strategy = strategy_of(self._terms, public)
        self._state = self._strategy.init(first)
        self._refuse_loss(first, self._state.x)
        self._shapes = shapes_of(self._state.x)

    def _refuse_loss(self, first: Tensors, x: Tensors) -> None:
        """Refuse a trained adapter that the strategy's own start would throw away."""
        for module in modules(first):
            left, right = pair(first, module)
            own_left, own_right = pair(x, module)
            core = x.get(module + CORE)
            inner = own_left if core is None else own_left @ core
            if not np.allclose(left @ right, inner @ own_right, atol=1e-6):
                raise ConfigError(
                    f"{self._terms.name!r} would throw away what {module!r} has learnt: merge the "
                    "trained adapter into the base, and send a new one (B = 0)"
                )

    def _record(self, tensors: Tensors) -> ArrayRecord:
        return ArrayRecord({self._keys.get(name, name): Array(v) for name, v in tensors.items()})

    def _update(self, message: Message, names: frozenset[str]) -> Tensors | str:
        """Return what a reply's arrays add to those that were sent, or why they cannot count."""
        records = list(message.content.array_records.values())
        if len(records) != 1 or self._state is None:
            return "malformed"
        after: dict[str, np.ndarray[Any, Any]] = {}
        for name in names:
            array = records[0].get(self._keys.get(name, name))
            if array is None:
                return "missing_array"
            if len(array.data) > 8 * math.prod(self._shapes[name]) + _ARRAY_HEADER_BYTES:
                return "wrong_shape_or_dtype"
            try:
                value: Any = array.numpy()
            except Exception:  # noqa: BLE001 - a stranger's bytes in NumPy's reader raise anything
                return "malformed"
            if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
                return "wrong_shape_or_dtype"
            if value.shape != self._shapes[name]:
                return "wrong_shape_or_dtype"
            after[name] = value.astype(np.float32)
        update = difference(after, self._state.x)
        if not mean.fits(update):
            return "not_finite"
        return "norm_too_large" if update_norm(update) > self._max_norm else update

    def _weight(self, message: Message) -> float | None:
        """Return how much a reply counts; None if it does not say so."""
        if not self._weighted:
            return 1.0
        for record in message.content.metric_records.values():
            value = record.get(self.weighted_by_key)
            if isinstance(value, int | float) and 0 < value <= _MOST_EXAMPLES:
                return float(value)
        return None

    def _after(self, given: list[Given], round: int) -> StrategyState:
        state, strategy = self._state, self._strategy
        if state is None:
            raise ConfigError("the strategy has no arrays yet: call start()")
        if isinstance(strategy, Stacking):
            return strategy.join(state, given, round)
        if not isinstance(strategy, Averaging):
            raise TypeError(f"{type(strategy).__name__} is no strategy")
        if self._terms.combine != "mean":
            rule = rule_of(self._terms.combine, self._terms.byzantine, self._terms.clip_radius)
            return strategy.step(state, rule(given), round)
        total = mean.start()
        for one in given:
            total = mean.add(total, one.update, one.share)
        return strategy.step(state, mean.finish(total, 1.0), round)


def as_flower_strategy(
    name: str,
    *,
    sites: int,
    seed: int = 0,
    weights: Literal["num-examples", "equal"] = "num-examples",
    max_update_norm: float = 1e4,
    travel: float | None = None,
    sampling: Mapping[str, Any] | None = None,
    **parameters: Any,
) -> FlowerStrategy:
    """Return a strategy of this project for a stock Flower ``ServerApp``.

    Args:
        name: as in a study's ``[strategy]``: fedavg, ffa_ortho, rolora, svd, fedex, …
        sites: how many nodes train in each round; Flower waits for so many.
        seed: of shared random bases.
        weights: by the metric "num-examples" of each reply, as Flower's FedAvg, or all equal.
        max_update_norm: a reply that moves the adapter further is left out.
        travel: of ``scaffold``, which needs it: local steps times learning rate, of every site.
        sampling: further arguments of Flower's ``FedAvg``, as ``fraction_train``.
        parameters: the strategy's own, and ``combine``, ``byzantine``, ``clip_radius``.

    Raises:
        ConfigError: no such strategy, a parameter that it does not have, or a rule that so few
            sites cannot carry.
    """
    terms = build(StrategyTerms, {"name": name, **parameters}, "as_flower_strategy()")
    try:
        terms.check_sites(sites, sites)
    except ValueError as error:
        raise ConfigError(f"as_flower_strategy(): {error}") from error
    if terms.combine != "mean" and weights != "equal":
        raise ConfigError(
            f"combine is {terms.combine!r}, a node that lies about its examples would decide it: "
            "set weights = 'equal'"
        )
    if (travel is None) == (name == "scaffold"):
        raise ConfigError(
            "'scaffold' needs travel, local steps times learning rate: give it"
            if travel is None
            else f"travel has no meaning for {name!r}: remove it"
        )
    if travel is not None and not 0 < travel < math.inf:
        raise ConfigError(f"travel is {travel}, expected over 0")
    if terms.weights != "equal":
        raise ConfigError("weights of a study have no meaning here: use 'num-examples' or 'equal'")
    return FlowerStrategy(
        terms,
        sites=sites,
        seed=seed,
        weighted=weights == "num-examples",
        max_update_norm=max_update_norm,
        travel=travel or 1.0,
        **(sampling or {}),
    )


def _site(node: int) -> str:
    """Return a node's name, by which its updates are put in order."""
    return f"{node:020}"
