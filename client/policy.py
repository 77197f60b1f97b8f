"""A hospital's policy: what its own program refuses, whatever it is asked.

One strict TOML file, ``policy.toml``, in the site's folder. Nothing is allowed that it does not
allow: without a cohort or a base no study is, and no key of it adds anything to a study. It is
applied by ``decision.py``, before an approval and again at every announcement. ``governance.py``
has what the records themselves must satisfy.
"""

import dataclasses
import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import rfc8785

from huizhen.client.policy_terms import (
    About,
    AdapterLimits,
    ApprovalRule,
    BaseLimits,
    CohortLimits,
    PrivacyLimits,
    RoundLimits,
    SandboxRule,
    Schedule,
    StopRule,
)
from huizhen.learning.catalogue import catalogue
from huizhen.protocol.errors import ConfigError
from huizhen.protocol.strict import build, check_keys, read_toml
from huizhen.protocol.study import check_site_name

FORMAT = 1
_COHORT = re.compile(r"\w[\w .-]{0,62}[\w.-]|\w")


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What one hospital allows."""

    policy: About
    privacy: PrivacyLimits = field(default_factory=PrivacyLimits)
    cohorts: dict[str, CohortLimits] = field(default_factory=dict)
    bases: BaseLimits = field(default_factory=BaseLimits)
    adapter: AdapterLimits = field(default_factory=AdapterLimits)
    rounds: RoundLimits = field(default_factory=RoundLimits)
    schedule: Schedule = field(default_factory=Schedule)
    approval: ApprovalRule = field(default_factory=ApprovalRule)
    sandbox: SandboxRule = field(default_factory=SandboxRule)
    stop: StopRule = field(default_factory=StopRule)

    def __post_init__(self) -> None:
        for name in self.cohorts:
            if not _COHORT.fullmatch(name):
                raise ConfigError(
                    f"[cohorts] has {name[:80]!r}, expected a name of 1 to 64 letters, digits, "
                    "' ', '.', '-' that begins with a letter or digit"
                )

    @property
    def site(self) -> str:
        """The hospital's name."""
        return self.policy.site

    def canonical(self) -> bytes:
        """Return the RFC 8785 JSON of the policy, defaults filled in."""
        return rfc8785.dumps({"format": FORMAT, **dataclasses.asdict(self)})

    def digest(self) -> str:
        """Return the SHA-256 of ``canonical()`` in hex: the policy's name in the audit log.

        Paths count too: which records a cohort's name stands for is part of what is allowed.
        """
        return hashlib.sha256(self.canonical()).hexdigest()

    def data_file(self, folder: Path, cohort: str) -> Path:
        """Return where a cohort's records are; ``folder`` is the policy's."""
        return folder / self.cohorts[cohort].data

    def ledger_file(self, folder: Path, cohort: str) -> Path:
        """Return where a cohort's ledger is; ``folder`` is the policy's."""
        return folder / (self.cohorts[cohort].ledger or f"ledger-{cohort}.sqlite")

    def is_stopped(self, folder: Path) -> bool:
        """Tell whether the file that stops everything is there, or may be; see ``[stop]``."""
        try:
            os.lstat(folder / self.stop.file)  # a link that leads nowhere counts as well
        except FileNotFoundError:
            return False
        except OSError:  # what cannot be looked at is taken to be there
            return True
        return True


def base_digest(digests: Mapping[str, str]) -> str:
    """Return the one digest of a base's files that ``[bases]`` lists.

    Args:
        digests: path -> SHA-256 in hex, as in a study or ``learning.catalogue``.

    Returns:
        The SHA-256 of their RFC 8785 JSON, in hex.
    """
    return hashlib.sha256(rfc8785.dumps(dict(digests))).hexdigest()


def load_policy(path: Path) -> Policy:
    """Return the policy in a file.

    Raises:
        ConfigError: naming the file, the section, the key and what was expected; also if others
            than its owner may change it, or two cohorts share a file.
    """
    policy = parse_policy(read_toml(path), path.name)
    if path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(f"others may change {str(path)!r}: chmod go-w {str(path)!r}")
    _check_apart(policy, path)
    return policy


def parse_policy(tables: Mapping[str, Any], where: str) -> Policy:
    """Make a policy from parsed TOML tables.

    Args:
        tables: the sections.
        where: the file's name, for errors.

    Raises:
        ConfigError: naming the file, the section, the key and what was expected.
    """
    check_keys(tables, [one.name for one in dataclasses.fields(Policy)], where)
    if "policy" not in tables:
        raise ConfigError(f"{where} has no [policy]: add the section, with the site's name")
    values: dict[str, Any] = {
        name: build(cls, _table(tables[name], f"{where} [{name}]"), f"{where} [{name}]")
        for name, cls in _SECTION_TYPES.items()
        if name in tables
    }
    cohorts = _table(tables.get("cohorts", {}), f"{where} [cohorts]")
    values["cohorts"] = {
        name: build(
            CohortLimits, _table(table, f"{where} [cohorts.{name}]"), f"{where} [cohorts.{name}]"
        )
        for name, table in cohorts.items()
    }
    try:
        return Policy(**values)
    except ConfigError as error:
        raise ConfigError(f"{where} {error}") from error


def default_policy(site: str) -> str:
    """Return the text of a new hospital's policy, with comments.

    Every default is written out, so that a later version changes nothing. It allows the bases whose
    files the catalogue pins, and one cohort for which an epsilon is still to be decided.

    Raises:
        ConfigError: the name cannot be a site's.
    """
    check_site_name(site)
    pinned = {name: entry.digests for name, entry in catalogue().items() if entry.digests}
    bases = "\n".join(f'{json.dumps(name)} = "{base_digest(pinned[name])}"' for name in pinned)
    return _DEFAULT.replace("@BASES@", bases).replace(
        "@SITE@", json.dumps(site, ensure_ascii=False)
    )


def _table(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} is {value!r}, expected a table")
    return value


def _check_apart(policy: Policy, path: Path) -> None:
    """Refuse cohorts that share a file: losses of the same patients would not be added up."""
    users: dict[Path, str] = {}
    for name in policy.cohorts:
        for key, place in (
            ("data", policy.data_file(path.parent, name)),
            ("ledger", policy.ledger_file(path.parent, name)),
        ):
            user = users.setdefault(place.resolve(), f"[cohorts.{name}] {key}")
            if user != f"[cohorts.{name}] {key}":
                raise ConfigError(
                    f"{path.name} [cohorts.{name}] {key} is the file of {user}, expected one of "
                    "its own: patients of two cohorts must differ, each cohort has its ledger"
                )


_SECTION_TYPES: dict[str, type] = {
    "policy": About,
    "privacy": PrivacyLimits,
    "bases": BaseLimits,
    "adapter": AdapterLimits,
    "rounds": RoundLimits,
    "schedule": Schedule,
    "approval": ApprovalRule,
    "sandbox": SandboxRule,
    "stop": StopRule,
}

_DEFAULT = """\
# What this hospital allows. docs/policy.md explains every key.
# What is not allowed here is refused, and nothing here adds anything to a study.

[policy]
site = @SITE@

[cohorts.all]
# A set of patients. Decide how much of their privacy one study may spend, and write it here; until
# then every study is refused. What all studies may spend together is the ledger's cap.
# epsilon = 4.0
unit = "patient"                # the weakest promise a study may make: patient, record or none
min_patients = 20               # of the public size that a study states for this site
data = "records.jsonl"          # paths are relative to this file's folder
ledger = "ledger.sqlite"

[privacy]
max_epsilon = 10.0              # of one study, on whatever cohort
max_delta = 1e-4                # keep it below one over the number of patients
min_noise_multiplier = 0.5
metrics = false                 # whether noised metrics on held-out patients may leave
max_metrics_epsilon = 1.0
metrics_minimum = 20            # patients; metrics over fewer are kept back

[bases]
allow_any = false

[bases.allowed]                 # name = digest of its files
@BASES@

[adapter]
max_rank = 64
max_parameters = 100_000_000
target_modules = [
  "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
  "query", "key", "value", "dense",
]

[rounds]
min_sites = 3                   # of the study, of its quorum, and asked in each round
max_rounds = 200                # of one study
max_rounds_per_day = 48         # of all studies

[schedule]
# When a round may begin, such as ["Mon-Fri 20:00-06:00", "Sat-Sun 00:00-24:00"]. Windows need a
# timezone, such as "Asia/Shanghai".
windows = ["Mon-Sun 00:00-24:00"]
# timezone = "Asia/Shanghai"

[approval]
people = 0                      # so many stewards must sign before a study is approved; 2 is wise

# [approval.stewards]
# "Dr. Wang" = "a public key of her own, 64 hex digits"

[sandbox]
require = "full"                # the least walls around training: full, network or none

[stop]
file = "STOP"                   # nothing is answered while this file exists
"""
