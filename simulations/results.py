"""From finished units of work to ``results.json``: means over seeds, per site, per round."""

import itertools
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from huizhen.client.evaluation import answer_loss, classify
from huizhen.client.examples import Examples
from huizhen.learning.metrics import (
    classification_metrics,
    concordance_index,
    is_same_answer,
)
from huizhen.learning.model import AdaptedModel
from huizhen.learning.survival import times_of
from huizhen.learning.tasks import UNSEEN, name_of
from huizhen.learning.template import render
from huizhen.learning.trainable import Model
from huizhen.protocol.certificate import Certificate
from huizhen.protocol.mechanism import Mechanism
from huizhen.simulations.baseline import tfidf_baseline, with_ancestors
from huizhen.simulations.engine import Work
from huizhen.simulations.federation import Ready, Trained
from huizhen.simulations.prepare import Prepared
from huizhen.simulations.provenance import environment, peak_memory_mib
from huizhen.simulations.run_folder import tensors_digest

Metrics = dict[str, float]
_CLOSE_ENOUGH = 0.05  # of top-1: where differential privacy is said to cost little


class TestRecords:
    """The sites' test records, and what an adapter reaches on them."""

    __test__ = False  # no test class of pytest

    def __init__(self, model: Model, sites: Mapping[str, Examples]) -> None:
        """Take the records of all sites; some sites may have none."""
        self.model = model
        self.sites = {name: examples for name, examples in sites.items() if examples.ids}

    def metrics(self, ready: Ready) -> dict[str, Any]:
        """Return metrics on the union of the records and on each site's own.

        Args:
            ready: is called with a site's name before the model sees its records.
        """
        if self.model.kind == "instruction":
            losses = {}
            for name, examples in self.sites.items():
                ready(name)
                losses[name] = answer_loss(self.model, examples)
            tokens = sum(loss.tokens for loss in losses.values())
            return {
                "metrics": {"loss": sum(loss.total for loss in losses.values()) / tokens},
                "test_sites": {n: {"loss": x.total / x.tokens} for n, x in losses.items()},
            }
        scores = {}
        for name, examples in self.sites.items():
            ready(name)
            scores[name] = classify(self.model, examples)
        own = {name: self._scored(scores[name], [e]) for name, e in self.sites.items()}
        return {
            "metrics": self._scored(
                np.concatenate(list(scores.values())), list(self.sites.values())
            ),
            "test_sites": {name: metrics for name, metrics in own.items() if metrics},
        }

    def _scored(self, scores: NDArray[np.float32], examples: Sequence[Examples]) -> Metrics:
        labels = [label for one in examples for label in one.labels]
        if self.model.kind == "survival":
            times = times_of([row for one in examples for row in one.ids])
            index = concordance_index(times, np.asarray(labels) == 1, scores[:, 1])
            return {} if index is None else {"c_index": index}
        found = classification_metrics(scores, labels)
        if self.model.kind == "tabular" and scores.shape[1] <= 3:
            del found["top3"]  # it says nothing of two or three classes
        return found


class Results:
    """Gathers finished units of work."""

    def __init__(self, prepared: Prepared, test: TestRecords) -> None:
        """Start with nothing finished."""
        self.prepared, self.test = prepared, test
        self._done: list[tuple[Work, list[dict[str, Any]], Metrics, str]] = []
        self._answers: dict[str, list[str]] = {}

    def add(self, work: Work, trained: Trained) -> None:
        """Take in a unit of work that is finished."""
        metrics = dict(trained.history[-1]["metrics"])
        model = self.prepared.model
        if isinstance(model, AdaptedModel) and model.kind == "instruction":
            metrics |= self._answer(model, work.unit, trained)
        own = {f"{site}/{n}": t for site, kept in trained.own.items() for n, t in kept.items()}
        digest = tensors_digest({**trained.x, **own})
        self._done.append((work, trained.history, metrics, digest))

    def document(self, *, command: str, certificate: Certificate | None) -> dict[str, Any]:
        """Return what ``results.json`` holds."""
        prepared = self.prepared
        arms: dict[str, dict[str, Any]] = {
            arm: self._local() if arm == "local" else self._arm(arm)
            for arm in prepared.experiment.simulation.arms
        }
        sweep = self._sweep("sweep_epsilon")
        document: dict[str, Any] = {
            "schema": 1,
            "name": prepared.study.study.name,
            "kind": prepared.study.task.kind,
            "study": prepared.study.digest(),
            "data": self._data(),
            "arms": arms,
            "notes": list(prepared.notes),
            "provenance": {
                **environment(prepared.experiment.simulation.site_threads),
                "engine": prepared.experiment.simulation.engine,
                "base": prepared.study.base.name if prepared.study.base else "none: a linear model",
                "seeds": ", ".join(map(str, prepared.experiment.simulation.seeds)),
                "command": command,
                "peak memory": f"{peak_memory_mib():.0f} MiB",
            },
        }
        if prepared.study.task.kind == "classification":
            document["baseline"] = self._baseline()
        if sweep:
            document["sweep"] = sweep
            document |= self._enough(arms, sweep)
        if fewer := self._sweep("sweep_patients"):
            document["sweep_patients"] = fewer
        if self._answers:
            document["samples"] = self._samples()
        if certificate is not None:
            document["privacy"] = certificate.summary()
        return document

    def _units(self, prefix: str) -> list[tuple[Work, list[dict[str, Any]], Metrics, str]]:
        return [done for done in self._done if done[0].unit.startswith(f"{prefix}-")]

    def _arm(self, arm: str) -> dict[str, Any]:
        units = self._units(arm)
        metrics = [m for _, _, m, _ in units]
        last = [history[-1] for _, history, _, _ in units]
        entry: dict[str, Any] = {
            "metrics": _mean(metrics),
            "spread": _spread(metrics),
            "per_seed": [
                {"seed": w.study.study.seed, "metrics": m, "adapter": digest}
                for w, _, m, digest in units
            ],
            "sites": {
                name: {
                    "metrics": _mean([one["test_sites"][name] for one in last]),
                    "bytes_up": sum(r["sites"][name]["bytes_up"] for r in units[0][1])
                    if name in units[0][0].sites
                    else 0,
                }
                for name in last[0]["test_sites"]
            },
            "rounds": [_public_round(round) for round in units[0][1]],
            "seconds": _seconds(units),
            "outside_share": _outside(units),
            "study": units[0][0].study.digest(),
        }
        work = units[0][0]
        if work.study.is_private:
            spent = Mechanism.of(work.study).epsilon_after(work.study.rounds.count)
            entry["epsilon"] = dict.fromkeys(work.study.sites, spent)
        if "released" in last[0]:
            entry["released"] = last[0]["released"]
        return entry

    def _local(self) -> dict[str, Any]:
        by_site: dict[str, list[tuple[Work, list[dict[str, Any]], Metrics, str]]] = {}
        for unit in self._units("local"):
            by_site.setdefault(next(iter(unit[0].sites)), []).append(unit)
        sites: dict[str, dict[str, Any]] = {}
        by_seed: dict[int, list[Metrics]] = {}
        for work, _, metrics, _ in self._units("local"):
            by_seed.setdefault(work.study.study.seed, []).append(metrics)
        means = {seed: _mean(metrics) for seed, metrics in by_seed.items()}
        for name, units in by_site.items():
            own = [history[-1]["test_sites"].get(name) for _, history, _, _ in units]
            sites[name] = {
                "metrics": _mean([m for _, _, m, _ in units]),
                "spread": _spread([m for _, _, m, _ in units]),
                "per_seed": [{"seed": w.study.study.seed, "metrics": m} for w, _, m, _ in units],
                **({"own": _mean([one for one in own if one])} if any(own) else {}),
            }
        return {
            "metrics": _mean([site["metrics"] for site in sites.values()]),
            "spread": _spread(list(means.values())),
            "per_seed": [{"seed": seed, "metrics": mean} for seed, mean in means.items()],
            "sites": sites,
            "seconds": _seconds(self._units("local")),
            "outside_share": _outside(self._units("local")),
        }

    def _sweep(self, prefix: str) -> list[dict[str, Any]]:
        if not (units := self._units(prefix)):
            return []
        units = [*units, *self._units("federated_dp")[:1]]  # the study itself is a point too
        sigma = self._mechanism().noise_multiplier
        points = []
        for work, _, metrics, _ in units:
            mechanism = Mechanism.of(work.study)
            points.append(
                {
                    "epsilon": mechanism.epsilon_after(work.study.rounds.count),
                    "sigma": mechanism.noise_multiplier,
                    "patients": sum(e.num_patients for e in work.sites.values()),
                    "times_patients": sigma / mechanism.noise_multiplier,
                    "metrics": metrics,
                }
            )
        return sorted(points, key=lambda point: (point["epsilon"], point["patients"]))

    def _mechanism(self) -> Mechanism:
        """Return the mechanism of the study's own ε."""
        return Mechanism.of(self.prepared.study)

    def _enough(self, arms: Mapping[str, Any], sweep: list[dict[str, Any]]) -> dict[str, Any]:
        """Return how many times the patients would bring DP close to the federation without it.

        With q and T fixed, σ is the same and the denominator grows with the patients: noise at σ'
        is the noise of σ / σ' times the patients. What more patients would teach besides is left
        out. All points are of the first seed.
        """
        if not {"federated", "federated_dp"} <= arms.keys() or "top1" not in sweep[0]["metrics"]:
            return {}
        reached = arms["federated_dp"]["per_seed"][0]["metrics"]["top1"]
        target = arms["federated"]["per_seed"][0]["metrics"]["top1"] - _CLOSE_ENOUGH
        points = [(p["times_patients"], p["metrics"]["top1"]) for p in sweep]
        times = _crossing(points, target)
        epsilon, most = self.prepared.study.privacy.epsilon, max(x for x, _ in points)
        now = f"At ε = {epsilon:g} top-1 is {reached:.3f}"
        if len(arms["federated_dp"]["per_seed"]) > 1:
            now += " with the first seed"
        if reached <= (chance := self._chance()):
            now += f", no better than always naming one class ({chance:.3f})"
        goal = f"the federation without privacy less {_CLOSE_ENOUGH:g} ({target:.3f})"
        if times is None:
            text = f"{now}; even {most:.1f} times the patients per hospital would not reach {goal}."
        elif times <= 1:
            text = f"{now}, which reaches {goal}."
        else:
            text = (
                f"{now}; each hospital would need about {times:.1f} times its patients for {goal}."
            )
        found = {"metric": "top1", "target": target, "times_patients": times, "text": text}
        return {"enough": found}

    def _chance(self) -> float:
        """Return what always naming the most frequent class of the test records reaches."""
        labels = [x for e in self.test.sites.values() for x in e.labels if x != UNSEEN]
        total = sum(len(e.labels) for e in self.test.sites.values())
        return float(np.bincount(labels).max() / total) if labels else 0.0

    def _data(self) -> dict[str, Any]:
        prepared = self.prepared
        terms = prepared.experiment.simulation
        sites = {}
        for name, records in prepared.records.items():
            train, test = prepared.train[name], prepared.test[name]
            sites[name] = {
                "train_patients": train.num_patients,
                "test_patients": test.num_patients,
                "train_records": len(records.train),
                "test_records": len(records.test),
                "labels_seen": len(set(train.labels)),
            }
        return {
            "source": terms.data,
            "synthetic": terms.synthetic,
            "notice": terms.notice,
            "labels": len(prepared.study.task.labels),
            "unseen_labels": sum(x == UNSEEN for e in prepared.test.values() for x in e.labels),
            "sites": sites,
        }

    def _baseline(self) -> dict[str, Any]:
        """Return the baseline on what the arms have: the same training records, the same classes.

        As in ``classification_metrics`` all classes that the study does not list count as one.
        """
        task, terms = self.prepared.study.task, self.prepared.experiment.simulation
        texts: dict[str, list[str]] = {"train": [], "test": []}
        labels: dict[str, list[str]] = {"train": [], "test": []}
        sites: list[str] = []
        field = task.label or ""
        for name, site in self.prepared.records.items():
            for part, records in (("train", site.train), ("test", site.test)):
                fields, classes = [], []
                for record in records:
                    label = name_of(record.fields.get(field), field, record.place)
                    if label in task.labels or part == "test":
                        fields.append(record.fields)
                        classes.append(label if label in task.labels else "")
                own = [render(task.text, one) for one in fields]
                if terms.ancestors is not None:
                    more = with_ancestors(fields, field=terms.ancestors)
                    own = [f"{text}, {extra}" for text, extra in zip(own, more, strict=True)]
                texts[part] += own
                labels[part] += classes
                if part == "train":
                    sites += [name] * len(classes)
        found = tfidf_baseline(
            texts["train"], labels["train"], sites, texts["test"], labels["test"]
        )
        extra = ", with HPO ancestors" if terms.ancestors is not None else ""
        return {**found, "text": f"TF-IDF + logistic regression{extra}"}

    def _answer(self, model: AdaptedModel, unit: str, trained: Trained) -> Metrics:
        """Let each site's adapter answer its test records; keep the first answers."""
        task, encoder = model.study.task, model.encoder()
        answers: list[str] = []
        hits: list[bool] = []
        for site, group in itertools.groupby(self._asked(), key=lambda one: one[0]):
            model.load(trained.of(site))
            chosen = [(fields, place) for _, fields, place in group]
            encoded = [encoder.encode(fields, place) for fields, place in chosen]
            prompts = [one.ids[: one.answer_start] for one in encoded]
            found = model.generate(prompts, task.max_new_tokens)
            hits += [
                is_same_answer(answer, encoder.answer(fields, place))
                for answer, (fields, place) in zip(found, chosen, strict=True)
            ]
            answers += found
        self._answers[unit] = answers
        return {"exact_match": float(np.mean(hits))}

    def _asked(self) -> list[tuple[str, Mapping[str, Any], str]]:
        """Return the test records that are answered: evenly spread, at most as many as set."""
        everything = [
            (name, r.fields, r.place) for name, s in self.prepared.records.items() for r in s.test
        ]
        most = self.prepared.experiment.simulation.exact_match_records
        places = np.linspace(0, len(everything) - 1, min(most, len(everything))).round().astype(int)
        return [everything[i] for i in places]

    def _samples(self) -> list[dict[str, Any]]:
        task = self.prepared.study.task
        count = self.prepared.experiment.simulation.generate
        seed = self.prepared.experiment.simulation.seeds[0]
        shown = {
            arm: self._answers[f"{arm}-{seed}"]
            for arm in ("pooled", "federated", "federated_dp")
            if f"{arm}-{seed}" in self._answers
        }
        return [
            {
                "prompt": render(task.text, fields),
                "expected": render(task.answer or "", fields),
                "answers": {arm: answers[i] for arm, answers in shown.items()},
            }
            for i, (_, fields, _) in enumerate(self._asked()[:count])
        ]


def _public_round(entry: Mapping[str, Any]) -> dict[str, Any]:
    hidden = ("sites", "test_sites", "released")
    return {key: value for key, value in entry.items() if key not in hidden}


def _mean(metrics: list[Metrics]) -> Metrics:
    return {key: float(np.mean([one[key] for one in metrics])) for key in metrics[0]}


def _spread(metrics: list[Metrics]) -> Metrics:
    if len(metrics) < 2:
        return dict.fromkeys(metrics[0], 0.0)
    return {key: float(np.std([one[key] for one in metrics], ddof=1)) for key in metrics[0]}


def _seconds(units: list[tuple[Work, list[dict[str, Any]], Metrics, str]]) -> float:
    return float(sum(round["seconds"] for _, history, _, _ in units for round in history))


def _outside(units: list[tuple[Work, list[dict[str, Any]], Metrics, str]]) -> float:
    """Return the share of the training time outside forward and backward, over all rounds."""
    rounds = [r for _, history, _, _ in units for r in history if "outside_share" in r]
    outside = sum(round["outside_share"] * round["training_seconds"] for round in rounds)
    total = sum(round["training_seconds"] for round in rounds)
    return float(outside / total) if total else 0.0


def _crossing(points: list[tuple[float, float]], target: float) -> float | None:
    """Return the least x from 1 on, on a log scale, where y reaches the target; None if none."""
    points = sorted(point for point in points if point[0] >= 1)
    if points[0][1] >= target:
        return points[0][0]
    for (x0, y0), (x1, y1) in pairwise(points):
        if y1 >= target:
            return float(x0 * (x1 / x0) ** ((target - y0) / (y1 - y0)))
    return None
