"""The sections of a study: what each key means, its default, and what makes no sense.

Each is a frozen dataclass behind one table of the study file; ``study.py`` puts them together.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from huizhen.protocol.travel import Dtype

MAX_LABELS = 100_000

# What each kind of task needs, with the end of the error, and which fields it must leave alone.
_CLASS_NEEDED = ", a classification needs the field that holds the class"
_NEEDED: dict[str, dict[str, str]] = {
    "classification": {"text": ": add it", "label": _CLASS_NEEDED},
    "instruction": {
        "text": ": add it",
        "answer": ", an instruction task needs the template of the answer",
    },
    "tabular": {
        "features": ", a tabular task needs fields and their public ranges",
        "label": _CLASS_NEEDED,
    },
    "survival": {
        "features": ", a survival task needs fields and their public ranges",
        "label": ", a survival task needs the field that says whether the event was seen",
        "time": ", a survival task needs the field with the time of follow-up",
    },
}
_NO_NUMBERS: dict[str, Any] = {"features": {}, "missing": "refuse", "time": None}
_NO_TEXT: dict[str, Any] = {
    "text": "",
    "label_text": None,
    "label_texts": (),
    "head": "linear",
    "answer": None,
    "system": "",
}
_MEANINGLESS: dict[str, dict[str, Any]] = {
    "classification": {"answer": None, "system": "", **_NO_NUMBERS},
    "instruction": {"label": None, "label_text": None, **_NO_NUMBERS},
    "tabular": {**_NO_TEXT, "time": None},
    "survival": {**_NO_TEXT, "label_smoothing": 0.0},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """``[study]``: what it is called and what it is for."""

    name: str
    purpose: str = ""
    seed: int = 0
    # public: shared random bases and the first adapter are drawn from it, never any noise

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w][\w .-]{0,99}", self.name):
            raise ValueError(
                f"name is {self.name!r}, expected 1 to 100 letters, digits, ' ', '.', '-'"
            )
        if not 0 <= self.seed < 2**53:
            raise ValueError(f"seed is {self.seed}, expected 0 to 2^53")


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseTerms:
    """``[base]``: the frozen model, by catalogue name or folder, and the SHA-256 of its files."""

    name: str
    digests: dict[str, str] = field(default_factory=dict)
    dtype: Literal["float32", "bfloat16"] = "float32"
    # of the frozen weights; the adapter and the head are always float32


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterTerms:
    """``[adapter]``: LoRA as in Hu et al. 2021, ΔW = (alpha / rank) · B · A."""

    rank: int = 8
    alpha: float = 16.0
    target_modules: tuple[str, ...]
    layers: int | None = None
    # adapt only the last so many layers; what the layers below give is computed once per record

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}, expected at least 1")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"alpha is {self.alpha}, expected more than 0")
        if not self.target_modules:
            raise ValueError("target_modules is empty, expected names of linear layers")
        if self.layers is not None and self.layers < 1:
            raise ValueError(f"layers is {self.layers}, expected at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskTerms:
    """``[task]``: how a record becomes an example and what is asked of the model."""

    kind: Literal["classification", "instruction", "tabular", "survival"]
    text: str = ""
    # a template over the record's fields: the text to classify, or the user's turn
    features: dict[str, tuple[float, ...]] = field(default_factory=dict)
    # tabular, survival: numeric fields and their public ranges, [least, greatest]; a value outside
    # is moved to the edge
    missing: Literal["refuse", "middle"] = "refuse"
    # tabular, survival: a record without a feature's value; middle puts the middle of the public
    # range in
    label: str | None = None
    # classification, tabular: the field that holds the class; survival: whether the event was seen
    time: str | None = None
    # survival: the field with the time until the event or the end of follow-up, in any unit
    labels: tuple[str, ...] = ()
    # the public list of classes; a simulation fills it from the training records
    label_text: str | None = None
    # classification: a field with the class in words; the head starts from the base's view of them
    label_texts: tuple[str, ...] = ()
    # in the order of labels; a simulation fills it from label_text
    head: Literal["linear", "normalised"] = "linear"
    # normalised: the pooled output is scaled to length head_scale before the linear head
    head_scale: float = 16.0
    label_smoothing: float = 0.0
    # classification, tabular: Szegedy et al. 2016
    answer: str | None = None
    # instruction: a template for the assistant's turn; exact match compares it with what is
    # generated
    system: str = ""
    # instruction: the system's turn
    max_tokens: int = 128
    max_new_tokens: int = 16
    # instruction: the longest answer that is generated when the model is evaluated

    @property
    def is_linear(self) -> bool:
        """Whether the model is one linear layer over numbers, without a base."""
        return self.kind in ("tabular", "survival")

    def __post_init__(self) -> None:
        for name, need in _NEEDED[self.kind].items():
            if not getattr(self, name):
                raise ValueError(f"has no {name!r}{need}")
        for name, default in _MEANINGLESS[self.kind].items():
            if getattr(self, name) != default:
                raise ValueError(f"{name} has no meaning for kind {self.kind!r}: remove it")
        for name, bounds in self.features.items():
            if not (len(bounds) == 2 and 0 < bounds[1] - bounds[0] < math.inf):
                raise ValueError(f"features {name!r} is {list(bounds)}, expected [least, greatest]")
        for name in ("max_tokens", "max_new_tokens"):
            if not 1 <= getattr(self, name) <= 131_072:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 1 to 131072")
        if not (math.isfinite(self.head_scale) and self.head_scale > 0):
            raise ValueError(f"head_scale is {self.head_scale}, expected more than 0")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing is {self.label_smoothing}, expected 0 to under 1")
        if self.kind == "survival" and len(self.labels) != 2:
            raise ValueError(
                f"labels has {len(self.labels)} values, a survival task needs two in this order: "
                "followed without the event, then the event"
            )
        if len(set(self.labels)) != len(self.labels) or len(self.labels) > MAX_LABELS:
            raise ValueError(f"labels repeats a class or has over {MAX_LABELS}")
        if self.label_texts and len(self.label_texts) != len(self.labels):
            raise ValueError("label_texts and labels differ in length")


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivacyTerms:
    """``[privacy]``: the promise to each patient; neighbouring by adding or removing one unit."""

    unit: Literal["patient", "record", "none"] = "patient"
    epsilon: float = 8.0
    delta: float = 1e-5
    sampling_rate: float = 0.2
    # q: each step takes each patient with this probability
    max_grad_norm: float | Literal["auto"] = 1.0
    # C of flat clipping; auto is AUTO-S of Bu et al. 2023, g / (|g| + 0.01)
    records_per_patient: int = 4
    # K: at most so many of a patient's records, drawn anew each step, make the patient's gradient
    learning_rate: float | None = None
    # under DP, in place of [rounds] learning_rate
    optimizer: Literal["sgd", "adamw"] = "sgd"
    # under DP, in place of [rounds] optimizer
    batch_cap: int | None = None
    # truncated Poisson: the most patients a step takes, paid for in epsilon; no limit when absent
    metrics_epsilon: float | None = None
    # metrics that leave a site carry geometric noise of this epsilon for the whole study
    metrics_minimum: int = 10
    # patients; metrics over fewer do not leave

    def __post_init__(self) -> None:
        if not (math.isfinite(self.epsilon) and self.epsilon > 0):
            raise ValueError(f"epsilon is {self.epsilon}, expected more than 0")
        if not 0 < self.delta < 1:
            raise ValueError(f"delta is {self.delta}, expected between 0 and 1")
        if not 0 < self.sampling_rate <= 1:
            raise ValueError(
                f"sampling_rate is {self.sampling_rate}, expected over 0 and at most 1"
            )
        norm = self.max_grad_norm
        if norm != "auto" and not 1e-6 <= norm <= 1e6:  # squares in float32 are exact enough there
            raise ValueError(f"max_grad_norm is {norm}, expected 1e-6 to 1e6 or 'auto'")
        if self.records_per_patient < 1:
            raise ValueError(
                f"records_per_patient is {self.records_per_patient}, expected 1 or more"
            )
        for name in ("learning_rate", "metrics_epsilon"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {value}, expected more than 0")
        if self.batch_cap is not None and self.batch_cap < 1:
            raise ValueError(f"batch_cap is {self.batch_cap}, expected 1 or more")
        if self.metrics_minimum < 1:
            raise ValueError(f"metrics_minimum is {self.metrics_minimum}, expected 1 or more")

    def least_batch_cap(self, patients_public: int) -> int:
        """Return the smallest ``batch_cap`` for a site: four deviations over the mean batch.

        The number drawn has variance q(1 - q)n, at most qn.
        """
        mean = self.sampling_rate * patients_public
        return math.ceil(mean + 4 * math.sqrt(mean))


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundTerms:
    """``[rounds]``: how long and how each site trains between two averages."""

    count: int = 20
    length: Literal["epochs", "steps"] = "epochs"
    # unit none: whether a round is local_epochs passes or local_steps batches; steps under DP
    local_epochs: int = 1
    # passes over the site's records in each round
    local_steps: int = 4
    # public and fixed, never a function of the private number of records
    batch_size: int = 32
    learning_rate: float = 2e-3
    head_learning_rate: float | None = None
    # unit none: for head.*; learning_rate when absent
    optimizer: Literal["adamw", "sgd"] = "adamw"
    # made anew each round
    momentum: float = 0.9
    # unit none: of sgd; it has none under DP
    head_optimizer: Literal["adamw", "sgd"] | None = None
    # unit none: for head.*; optimizer when absent
    max_norm: float | None = None
    # unit none: a batch's gradient is scaled down to this norm, LoRA and head apart
    schedule: Literal["constant", "cosine"] = "constant"
    # of the learning rate over the rounds
    quorum: int | None = None
    # the fewest sites that make a round; all of them when absent
    deadline_minutes: float = 60.0
    # after which a round closes with the sites that have answered, if they make a quorum
    max_update_norm: float = 1e4
    # an update whose L2 norm, over all its tensors, is larger is not counted

    update_dtype: Dtype = "float32"
    # how the numbers of an update travel: protocol/travel.py
    update_share: float = 1.0
    # of an update's numbers that travel, by a public random mask that all sites have in common;
    # rounded up to a multiple of 2^-16

    def __post_init__(self) -> None:
        if not 0.001 <= self.update_share <= 1:
            raise ValueError(f"update_share is {self.update_share}, expected 0.001 to 1")
        for name in ("count", "local_epochs", "local_steps", "batch_size"):
            if not 1 <= getattr(self, name) <= 1_000_000:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 1 to 1000000")
        for name in ("learning_rate", "head_learning_rate", "max_norm"):
            rate = getattr(self, name)
            if rate is not None and not (math.isfinite(rate) and rate > 0):
                raise ValueError(f"{name} is {rate}, expected more than 0")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum is {self.momentum}, expected 0 to under 1")
        if not 0.05 <= self.deadline_minutes <= 60 * 24 * 30:
            raise ValueError(
                f"deadline_minutes is {self.deadline_minutes}, expected 0.05 to 43200, 30 days"
            )
        if not (math.isfinite(self.max_update_norm) and self.max_update_norm > 0):
            raise ValueError(f"max_update_norm is {self.max_update_norm}, expected more than 0")
        if self.quorum is not None and self.quorum < 1:
            raise ValueError(f"quorum is {self.quorum}, expected at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteTerms:
    """``[sites.NAME]``: the public facts of one site."""

    patients_public: int
    # a rounded size: denominators and weights follow from it, never from the true number
    rank: int | None = None
    # what the site's hardware carries, at most [adapter] rank; that one when absent

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank is {self.rank}, expected at least 1")
        if self.patients_public < 1:
            raise ValueError(f"patients_public is {self.patients_public}, expected at least 1")
