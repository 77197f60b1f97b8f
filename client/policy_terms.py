"""The sections of a hospital's policy: what each key allows, and its default.

Each is a frozen dataclass behind one table of ``policy.toml``; ``policy.py`` puts them together,
``decision.py`` applies them. docs/policy.md lists every key with the code of its refusal; a test
keeps that page and these classes in step.
"""

import math
import re
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from huizhen.client.sandbox import Level
from huizhen.client.windows import ALWAYS, day_begins, window, zone
from huizhen.protocol.errors import ConfigError
from huizhen.protocol.study import check_site_name

Unit = Literal["patient", "record", "none"]
UNITS: tuple[Unit, ...] = ("patient", "record", "none")  # the strongest promise first

MODULES = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    "query", "key", "value", "dense",
)  # fmt: skip
# the linear layers of attention and feed-forward: no embedding, no output over the vocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """``[policy]``: whose it is."""

    site: str

    def __post_init__(self) -> None:
        try:
            check_site_name(self.site)
        except ConfigError as error:
            raise ValueError(str(error)) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivacyLimits:
    """``[privacy]``: the least protection, on whatever cohort."""

    max_epsilon: float = 10.0
    # of one study; Ponomareva et al. 2023 call up to 10 a reasonable promise
    max_delta: float = 1e-4
    min_noise_multiplier: float = 0.5
    # σ of every step
    metrics: bool = False
    # whether noised metrics may leave, where a study has them
    max_metrics_epsilon: float = 1.0
    # of one study's metrics, besides epsilon
    metrics_minimum: int = 20
    # patients; the study must keep back metrics over fewer

    def __post_init__(self) -> None:
        for name in ("max_epsilon", "max_metrics_epsilon"):
            _check_above_zero(name, getattr(self, name))
        if not 0 < self.max_delta < 1:
            raise ValueError(f"max_delta is {self.max_delta}, expected between 0 and 1")
        if not (math.isfinite(self.min_noise_multiplier) and self.min_noise_multiplier >= 0):
            raise ValueError(
                f"min_noise_multiplier is {self.min_noise_multiplier}, expected 0 or more"
            )
        _check_count("metrics_minimum", self.metrics_minimum)


@dataclass(frozen=True, slots=True, kw_only=True)
class CohortLimits:
    """``[cohorts.NAME]``: a set of patients that studies may be approved for.

    No patient may be in two cohorts: each has a ledger of its own, and losses of both compose.
    """

    epsilon: float | None = None
    # of one study; none is allowed when absent. The ledger's cap is for all studies together.
    unit: Unit = "patient"
    # the weakest promise that a study may make; none: the records are public or made up
    min_patients: int = 20
    # of the public size that the study states for this site
    data: str
    # the records, JSON lines; paths are relative to the policy's folder
    ledger: str | None = None
    # ledger-NAME.sqlite when absent

    def __post_init__(self) -> None:
        if self.epsilon is not None:
            _check_above_zero("epsilon", self.epsilon)
        _check_count("min_patients", self.min_patients)
        for name in ("data", "ledger"):
            _check_path(name, getattr(self, name))


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseLimits:
    """``[bases]``: the base models that may be trained; none where nothing is listed."""

    allow_any: bool = False
    allowed: dict[str, str] = field(default_factory=dict)
    # name as in the study -> ``policy.base_digest`` of its files

    def __post_init__(self) -> None:
        for name, digest in self.allowed.items():
            if not re.fullmatch(r"[0-9a-f]{64}", digest):
                raise ValueError(f"allowed {name!r} is {digest[:80]!r}, expected 64 hex digits")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterLimits:
    """``[adapter]``: how much may be trained, and where in the base."""

    max_rank: int = 64
    max_parameters: int = 100_000_000
    # numbers in one announced adapter, its head included
    target_modules: tuple[str, ...] = MODULES
    # those that a study may name

    def __post_init__(self) -> None:
        for name in ("max_rank", "max_parameters"):
            _check_count(name, getattr(self, name))


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundLimits:
    """``[rounds]``: with how many sites, and how often."""

    min_sites: int = 3
    # of the study, of its quorum, and asked in each round
    max_rounds: int = 200
    # of one study
    max_rounds_per_day: int = 48
    # of all studies; a round that is asked again counts once

    def __post_init__(self) -> None:
        for name in ("min_sites", "max_rounds", "max_rounds_per_day"):
            _check_count(name, getattr(self, name))


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """``[schedule]``: when a round may begin; it may end outside. ``windows.py`` has the form."""

    windows: tuple[str, ...] = (ALWAYS,)
    # never when empty
    timezone: str | None = None
    # of the IANA database; windows need it. UTC when absent

    def __post_init__(self) -> None:
        for text in self.windows:
            window(text)
        if self.timezone is not None:
            zone(self.timezone)
        elif any(text != ALWAYS for text in self.windows):
            raise ValueError("has windows and no timezone: add it, such as 'Asia/Shanghai'")

    def is_open(self, now: datetime) -> bool:
        """Tell whether a round may begin."""
        local = now.astimezone(zone(self._zone))
        return any(window(text).holds(local) for text in self.windows)

    def day_begins(self, now: datetime) -> datetime:
        """Return since when the rounds of the present day count, in UTC."""
        return day_begins(now, self._zone)

    @property
    def _zone(self) -> str:
        return self.timezone or "UTC"


@dataclass(frozen=True, slots=True, kw_only=True)
class ApprovalRule:
    """``[approval]``: who must sign before a study is approved, besides the site's own key."""

    people: int = 0
    # so many different stewards; the site's key alone is enough at 0
    stewards: dict[str, str] = field(default_factory=dict)
    # a person's name -> their Ed25519 public key, 64 hex digits

    def __post_init__(self) -> None:
        for name, key in self.stewards.items():
            if not (name.isprintable() and name == name.strip() and 1 <= len(name) <= 100):
                raise ValueError(f"stewards has {name[:110]!r}, expected a person's name")
            if not re.fullmatch(r"[0-9a-f]{64}", key):
                raise ValueError(f"stewards {name!r} is {key[:80]!r}, expected 64 hex digits")
        if len(set(self.stewards.values())) < len(self.stewards):
            raise ValueError("stewards has one key twice, expected a key of each person's own")
        if not 0 <= self.people <= len(self.stewards):
            raise ValueError(
                f"people is {self.people}, stewards names {len(self.stewards)}: "
                "name at least so many"
            )
        if self.stewards and self.people == 0:
            raise ValueError("names stewards, people is 0: say how many of them must sign")


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxRule:
    """``[sandbox]``: the least walls around the process that reads records and trains.

    ``network`` keeps it from the network alone: whoever takes that process over could still read
    the site's keys and change its ledger, so the default is ``full``. ``sandbox.py`` has the walls.
    """

    require: Level = "full"


@dataclass(frozen=True, slots=True, kw_only=True)
class StopRule:
    """``[stop]``: a file that stops everything while it exists, whatever it holds."""

    file: str = "STOP"

    def __post_init__(self) -> None:
        _check_path("file", self.file)


def _check_above_zero(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} is {value}, expected more than 0")


def _check_count(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} is {value}, expected 1 or more")


def _check_path(name: str, value: str | None) -> None:
    if value is not None and (not value.strip() or "\0" in value):
        raise ValueError(f"{name} is {value!r}, expected the path of a file")
