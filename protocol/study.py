"""The study: what was agreed, as values with one canonical form and one digest.

The digest is the SHA-256 of the RFC 8785 JSON of the resolved study: defaults filled in, the digest
of every base file, the public label list and the public seed. Two parties that hold the same digest
agree on everything that changes the mathematics.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import rfc8785

from huizhen.protocol.errors import ConfigError, WireError
from huizhen.protocol.strategy_terms import (
    LEAST_SHARE,
    MERGES,
    MIXED_RANKS,
    NEEDS_EVERY_NUMBER,
    PERSONAL,
    WITHOUT_LORA,
    StrategyTerms,
    shares_of,
)
from huizhen.protocol.strict import build, check_keys
from huizhen.protocol.study_terms import (
    About,
    AdapterTerms,
    BaseTerms,
    PrivacyTerms,
    RoundTerms,
    SiteTerms,
    TaskTerms,
)
from huizhen.protocol.travel import Travel

FORMAT = 1
_LONGEST_NAME = 64  # of a site, in characters


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """Everything that both parties rely on."""

    study: About
    base: BaseTerms | None = None
    adapter: AdapterTerms | None = None
    # null in the digest of a tabular study, which has neither
    task: TaskTerms
    privacy: PrivacyTerms = field(default_factory=PrivacyTerms)
    strategy: StrategyTerms = field(default_factory=StrategyTerms)
    rounds: RoundTerms = field(default_factory=RoundTerms)
    sites: dict[str, SiteTerms] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.sites:
            check_site_name(name)
        if self.task.is_linear:
            self._refuse_lora()
        if self.task.kind == "survival" and self.rounds.batch_size < 2:
            raise ConfigError(
                "[rounds] batch_size is 1, of one record alone nobody was followed for longer: "
                "raise it, the larger the better"
            )
        if self.task.kind == "survival" and self.is_private:
            raise ConfigError(
                "[task] kind is 'survival', a record's loss depends on who else is in its batch: "
                f"unit {self.privacy.unit!r} cannot hold, set [privacy] unit = 'none'"
            )
        self._refuse_coarse_base()
        if self.rounds.update_share < 1 and self.strategy.name in NEEDS_EVERY_NUMBER:
            raise ConfigError(
                f"[rounds] update_share is {self.rounds.update_share}, {self.strategy.name!r} "
                "would take what is not sent for a gradient of 0: set 1, or another strategy"
            )
        if self.strategy.name == "scaffold":
            self._check_steps()
        if self.strategy.name in PERSONAL and self.is_private:
            raise ConfigError(
                f"[strategy] name is {self.strategy.name!r}, what stays at a site is trained "
                f"without noise and what leaves depends on it: unit {self.privacy.unit!r} cannot "
                "hold, set unit = 'none' or another name"
            )
        if self.sites:
            self._check_strategy()
        if self.privacy.unit == "none":
            return
        for name, site in self.sites.items():
            limit = 1 / site.patients_public
            if self.privacy.delta >= limit:
                raise ConfigError(
                    f"[privacy] delta is {self.privacy.delta}, site {name!r} has about "
                    f"{site.patients_public} patients: it must be under {limit:.2g}"
                )
            cap, least = self.privacy.batch_cap, self.privacy.least_batch_cap(site.patients_public)
            if cap is not None and cap < least:
                raise ConfigError(
                    f"[privacy] batch_cap is {cap}, site {name!r} has about "
                    f"{site.patients_public} patients: it must be at least {least}"
                )

    @property
    def is_private(self) -> bool:
        """Whether what leaves a site is differentially private."""
        return self.privacy.unit != "none"

    @property
    def last_round(self) -> int:
        """The round after which the study is finished: its last, or the metrics after it."""
        lets_metrics_out = self.is_private and self.privacy.metrics_epsilon is not None
        return self.rounds.count + int(lets_metrics_out)

    def optimizer_of(self, *, head: bool) -> Literal["adamw", "sgd"]:
        """What a site trains ``head.*``, or all else, with."""
        if self.is_private:
            return self.privacy.optimizer
        return (self.rounds.head_optimizer if head else None) or self.rounds.optimizer

    def learning_rate(self, round: int, *, head: bool) -> float:
        """A site's learning rate of ``head.*``, or of all else, in a round under the schedule."""
        terms = self.rounds
        rate = (self.privacy.learning_rate if self.is_private else None) or terms.learning_rate
        if head and not self.is_private:
            rate = terms.head_learning_rate or rate
        if terms.schedule == "constant":
            return rate
        return rate * (1 + math.cos(math.pi * (round - 1) / terms.count)) / 2

    def travel(self, round: int) -> Travel:
        """How the numbers of a round's updates travel."""
        return Travel(
            dtype=self.rounds.update_dtype,
            share=self.rounds.update_share,
            seed=self.study.seed,
            round=round,
        )

    @property
    def quorum(self) -> int:
        """The fewest sites that make a round."""
        return len(self.sites) if self.rounds.quorum is None else self.rounds.quorum

    def _check_strategy(self) -> None:
        """Refuse a way to average that these sites, or this base, cannot carry."""
        terms = self.strategy
        try:
            terms.check_rounds(self.rounds.count)
            terms.check_sites(len(self.sites), self.quorum)
        except ValueError as error:
            raise ConfigError(f"[strategy] {error}") from error
        for name, site in self.sites.items():
            self._check_rank(name, site)
        self._check_shares()
        if terms.weights == "inverse_variance" and not self.is_private:
            raise ConfigError(
                "[strategy] weights is 'inverse_variance', without noise (unit 'none') there is no "
                "variance to know: set 'equal' or 'public'"
            )

    def _check_steps(self) -> None:
        """Refuse what SCAFFOLD cannot compute a gradient from: it divides by steps and rate."""
        rounds, found = self.rounds, []
        if not self.is_private:
            if rounds.length != "steps":
                found.append(f"[rounds] length is {rounds.length!r}: set 'steps', the same for all")
            if rounds.max_norm is not None:
                found.append("[rounds] max_norm cuts a gradient with its correction: remove it")
            if rounds.momentum:
                found.append(f"[rounds] momentum is {rounds.momentum}: set 0")
        for head in (False, True):
            if self.optimizer_of(head=head) != "sgd":
                section = "privacy" if self.is_private else "rounds"
                found.append(f"[{section}] optimizer is 'adamw': set 'sgd', for the head too")
        if found:
            raise ConfigError(f"with [strategy] 'scaffold', {found[0]}")

    def _refuse_coarse_base(self) -> None:
        """Refuse to merge into weights that would round away what is merged."""
        if self.strategy.name in MERGES and self.base is not None and self.base.dtype != "float32":
            raise ConfigError(
                f"[base] dtype is {self.base.dtype!r}, which rounds away what "
                f"{self.strategy.name!r} merges: set dtype = 'float32', or another strategy"
            )

    def _check_shares(self) -> None:
        """Refuse a weight so small that little of a site's update would be left."""
        sizes = {name: site.patients_public for name, site in self.sites.items()}
        shares = shares_of(self.strategy.weights, sizes)
        least = min(shares, key=lambda name: shares[name])
        if shares[least] < LEAST_SHARE:
            raise ConfigError(
                f"[strategy] weights gives site {least!r} a share of {shares[least]:.1e}, its "
                f"update would be rounded away: it must be {LEAST_SHARE:.1e} or more"
            )

    def _check_rank(self, name: str, site: SiteTerms) -> None:
        """Refuse a rank of a site's own that the strategy cannot take."""
        if site.rank is None:
            return
        if self.adapter is None or self.strategy.name not in MIXED_RANKS:
            raise ConfigError(
                f"[sites.{name}] rank is {site.rank}, with {self.strategy.name!r} all sites train "
                f"one rank: remove it, or name one of {', '.join(sorted(MIXED_RANKS))}"
            )
        if self.strategy.combine != "mean":
            raise ConfigError(
                f"[sites.{name}] rank is {site.rank}, combine {self.strategy.combine!r} would take "
                "what a site cannot train for a vote against it: set combine = 'mean'"
            )
        if site.rank > self.adapter.rank:
            raise ConfigError(
                f"[sites.{name}] rank is {site.rank}, [adapter] rank is {self.adapter.rank}: a "
                "site trains at most the study's"
            )

    def _refuse_lora(self) -> None:
        """Refuse what only a base with LoRA gives a meaning to."""
        for name in ("base", "adapter"):
            if getattr(self, name) is not None:
                raise ConfigError(
                    f"[{name}] has no meaning for kind {self.task.kind!r}: remove the section"
                )
        if self.strategy.name not in WITHOUT_LORA:
            raise ConfigError(
                f"[strategy] name is {self.strategy.name!r}, a {self.task.kind} study has no LoRA: "
                f"set one of {', '.join(sorted(WITHOUT_LORA))}"
            )

    def resolved(self) -> dict[str, Any]:
        """Return the study as plain JSON values, defaults filled in."""
        return {"format": FORMAT, **dataclasses.asdict(self)}

    def canonical(self) -> bytes:
        """Return the RFC 8785 JSON of the resolved study."""
        return rfc8785.dumps(self.resolved())

    def digest(self) -> str:
        """Return the SHA-256 of ``canonical()`` in hex."""
        return hashlib.sha256(self.canonical()).hexdigest()


def check_site_name(name: str) -> None:
    """Refuse a name that people or file systems cannot tell from another.

    Raises:
        ConfigError: it is empty or longer than 64 characters, begins or ends with a space, or has a
            character that does not print or separates folders.
    """
    is_plain = name.isprintable() and name == name.strip() and not set(name) & set("/\\")
    if not (is_plain and 1 <= len(name) <= _LONGEST_NAME and name not in (".", "..")):
        raise ConfigError(
            f"site name is {name[:80]!r}, expected 1 to {_LONGEST_NAME} characters that print, "
            "without slashes or spaces at the ends"
        )


SECTIONS = tuple(f.name for f in dataclasses.fields(Study))


def parse_study(tables: Mapping[str, Any], where: str) -> Study:
    """Make a study from parsed TOML tables.

    Args:
        tables: the sections of DESIGN §5.
        where: the file's name, for errors.

    Raises:
        ConfigError: naming the file, the section, the key and what was expected.
    """
    check_keys(tables, SECTIONS, where)
    values: dict[str, Any] = {}
    for name, cls in _SECTION_TYPES.items():
        if name in tables:
            values[name] = build(
                cls, _table(tables[name], f"{where} [{name}]"), f"{where} [{name}]"
            )
        elif name in ("study", "task"):
            raise ConfigError(f"{where} has no [{name}]: add the section")
    if not values["task"].is_linear:
        for name in ("base", "adapter"):
            if name not in values:
                raise ConfigError(f"{where} has no [{name}]: add the section")
    values["sites"] = {
        site: build(SiteTerms, _table(terms, f"{where} [sites.{site}]"), f"{where} [sites.{site}]")
        for site, terms in _table(tables.get("sites", {}), f"{where} [sites]").items()
    }
    return Study(**values)


def read_study(data: bytes) -> Study:
    """Return the study whose canonical bytes are given.

    Raises:
        WireError: they are not in the one canonical encoding, or of another version.
        ConfigError: the study cannot be.
    """
    tables = {key: value for key, value in json.loads(data).items() if value is not None}
    tables.pop("format")
    study = parse_study(tables, "study")
    if study.canonical() != data:
        raise WireError("study is not in its one canonical encoding, or of another version")
    return study


def _table(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} is {value!r}, expected a table")
    return value


_SECTION_TYPES: dict[str, type] = {
    "study": About,
    "base": BaseTerms,
    "adapter": AdapterTerms,
    "task": TaskTerms,
    "privacy": PrivacyTerms,
    "strategy": StrategyTerms,
    "rounds": RoundTerms,
}
