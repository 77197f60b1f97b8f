"""FLamby's Fed-Heart-Disease as the product's examples, and FLamby's published results.

du Terrail et al. 2022 (https://arxiv.org/abs/2210.04620); 740 patients of four hospitals, 13
features, FLamby's split. FLamby standardises each hospital's features by the mean and deviation of
its own training records: private values, which the product never scales by. Both ways are here.
"""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from huizhen.client.examples import Examples, make_examples
from huizhen.client.governance import SitePolicy, admit
from huizhen.client.records.record import Record
from huizhen.client.records.rows import read_rows, whole
from huizhen.client.selection import select
from huizhen.learning.models import make_model
from huizhen.learning.tabular import feature_names
from huizhen.learning.tasks import fields_read
from huizhen.protocol.study import Study

SOURCE = Path("heart_disease") / "fed_heart_disease.csv"
REGIONS = Path("tcga_brca") / "fed_tcga_brca.csv"
PUBLISHED = Path("flamby_results") / "dp_fed_heart_disease.csv"
THEIRS, STANDARDISED, PUBLIC_RANGES = "published", "standardised", "public ranges"
BATCH = 4


@dataclass(frozen=True, slots=True)
class Centre:
    """One hospital: its examples, scaled in one way."""

    train: Examples
    test: Examples

    @property
    def batches(self) -> int:
        """Batches of four in one pass."""
        return math.ceil(self.train.num_patients / BATCH)

    @property
    def sampling_rate(self) -> float:
        """FLamby's q: one over the number of batches."""
        return 1 / self.batches


def read_centres(data: Path, study: Study, scaling: str) -> dict[str, Centre]:
    """Return each hospital's examples, by the way that records take at a hospital.

    Args:
        data: the folder of data sets.
        study: names the features.
        scaling: ``PUBLIC_RANGES`` is the product's own; ``STANDARDISED`` replaces what it gives.

    Raises:
        ConfigError: the file is not there.
    """
    parts: dict[str, dict[str, list[Record]]] = {}
    for i, (place, fields) in enumerate(whole(read_rows(data / SOURCE)), 1):
        part = parts.setdefault(fields["center"], {"train": [], "test": []})[fields["split"]]
        part.append(Record(str(i), fields, place))
    centres = {}
    for name, records in parts.items():
        train, test = (_examples(records[part], study) for part in ("train", "test"))
        if scaling == STANDARDISED:
            raw = _raw(records["train"], study)
            middle, deviation = raw.mean(dim=0), raw.std(dim=0) + 1e-9
            train = _scaled(train, (raw - middle) / deviation)
            test = _scaled(test, (_raw(records["test"], study) - middle) / deviation)
        centres[name] = Centre(train, test)
    return centres


def read_pooled(data: Path, study: Study) -> Examples:
    """Return all training records, standardised by their common mean and deviation.

    So does FLamby's pooled training; its tests keep each hospital's own.
    """
    records = [
        Record(str(i), fields, place)
        for i, (place, fields) in enumerate(whole(read_rows(data / SOURCE)), 1)
        if fields["split"] == "train"
    ]
    raw = _raw(records, study)
    return _scaled(_examples(records, study), (raw - raw.mean(dim=0)) / (raw.std(dim=0) + 1e-9))


def read_regions(data: Path, study: Study) -> dict[str, Centre]:
    """Return the six regions of Fed-TCGA-BRCA, their features as they are, as FLamby has them.

    Args:
        data: the folder of data sets.
        study: names the features, the event and the time.

    Raises:
        ConfigError: the file is not there.
    """
    parts: dict[str, dict[str, list[Record]]] = {}
    for place, fields in whole(read_rows(data / REGIONS)):
        part = parts.setdefault(fields["center"], {"train": [], "test": []})[fields["split"]]
        part.append(Record(fields["pid"], fields, place))
    return {
        name: Centre(*(_unscaled(records[part], study) for part in ("train", "test")))
        for name, records in sorted(parts.items())
    }


def _unscaled(records: Sequence[Record], study: Study) -> Examples:
    examples = _examples(records, study)
    times = torch.tensor([[float(row[-1])] for row in examples.ids])
    return _scaled(examples, torch.cat((_raw(records, study), times), dim=1))


def published(data: Path, delta: float) -> dict[float, list[float]]:
    """Return FLamby's accuracies at a δ, one a seed, by nominal ε; infinity is no DP."""
    found: dict[float, list[float]] = {}
    for _, row in whole(read_rows(data / PUBLISHED)):
        if not row["e"] or float(row["d"]) == delta:
            found.setdefault(float(row["e"] or math.inf), []).append(float(row["perf"]))
    return found


def write_records(data: Path, path: Path) -> None:
    """Write FLamby's rows with an id for each patient, as heart_disease.toml reads them.

    Raises:
        ConfigError: the source is not there.
    """
    rows = [{"id": i, **fields} for i, (_, fields) in enumerate(whole(read_rows(data / SOURCE)), 1)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _examples(records: Sequence[Record], study: Study) -> Examples:
    clean = select(admit(records, SitePolicy(site="centre")), fields_read(study.task))
    model = make_model(study, None)
    return make_examples(clean, model.encoder(), model)


def _scaled(examples: Examples, rows: Tensor) -> Examples:
    """Return the examples with other features, (records, features)."""
    return replace(examples, ids=tuple(rows), inputs=tuple(rows))


def _raw(records: Sequence[Record], study: Study) -> Tensor:
    """Return the features as they are, (records, features), in the order of the columns."""
    names = feature_names(study.task)
    return torch.tensor([[float(record.fields[name]) for name in names] for record in records])
