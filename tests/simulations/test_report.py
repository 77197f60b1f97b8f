"""The report says what the results say, escapes what they contain, and loads nothing."""

import copy
import re
from html.parser import HTMLParser
from io import StringIO

import pytest
from rich.console import Console

from huizhen.protocol.errors import ConfigError, StorageError
from huizhen.simulations import report, report_figures
from huizhen.simulations.verdict import verdict

SITES = [f"hospital-{c}" for c in "abcdef"]


def metrics(top1):
    return {"top1": top1, "top3": min(1.0, top1 + 0.134), "macro_f1": top1 - 0.0471}


def shared_arm(top1, *, sd=0.0123, rounds=12):
    return {
        "metrics": metrics(top1),
        "spread": dict.fromkeys(("top1", "top3", "macro_f1"), sd),
        "per_seed": [
            {"seed": s, "metrics": metrics(top1 + d * sd)} for s, d in enumerate((-1, 0, 1))
        ],
        "sites": {s: {"metrics": metrics(top1 - 0.06 + 0.02 * i)} for i, s in enumerate(SITES)},
        "rounds": [
            {
                "round": r,
                "seconds": 4.2,
                "outside_share": 0.031,
                "loss": 3.2 * 0.8**r + 0.3,
                "bytes_up": 1_234_567,
                "bytes_down": 1_111_000,
                **({"metrics": metrics(top1 * (1 - 0.7**r))} if r % 2 == 0 else {}),
            }
            for r in range(1, rounds + 1)
        ],
        "seconds": 61.25,
    }


@pytest.fixture
def results():
    alone = dict(zip(SITES, (0.5437, 0.48, 0.41, 0.39, 0.31, 0.24), strict=True))
    return {
        "schema": 1,
        "name": "demo",
        "kind": "classification",
        "data": {
            "source": "Synthetic cohort of 900 patients, seed 1",
            "synthetic": True,
            "notice": "Drawn from the Human Phenotype Ontology (HPO), release 2025-01-16.",
            "labels": 24,
            "unseen_labels": 2,
            "sites": {
                s: {
                    "train_patients": n,
                    "test_patients": n // 3,
                    "train_records": 2 * n + 1,
                    "test_records": n // 2,
                    "labels_seen": 9 + i,
                }
                for i, (s, n) in enumerate(zip(SITES, (1209, 151, 109, 79, 58, 42), strict=True))
            },
        },
        "arms": {
            "pooled": shared_arm(0.7641),
            "federated": shared_arm(0.7423),
            "federated_dp": shared_arm(0.2119)
            | {"epsilon": {s: 7.9 + 0.01 * i for i, s in enumerate(SITES)}},
            "local": {
                "metrics": metrics(0.3971),
                "sites": {
                    s: {
                        "metrics": metrics(v),
                        "own": metrics(v + 0.2),
                        "per_seed": [{"seed": 1, "metrics": metrics(v - 0.02)}],
                    }
                    for s, v in alone.items()
                },
                "seconds": 30.5,
            },
        },
        "baseline": {
            "pooled": metrics(0.81),
            "local": {s: metrics(v + 0.02) for s, v in alone.items()},
            "text": "TF-IDF + logistic regression, with HPO ancestors",
        },
        "sweep": [
            {"epsilon": e, "sigma": 1.0, "metrics": metrics(v), "times_patients": m}
            for e, v, m in (
                (1.0, 0.09, 0.13), (2.0, 0.12, 0.25), (4.0, 0.16, 0.5), (8.0, 0.2119, 1.0),
                (32.0, 0.41, 4.2), (100.0, 0.6, 14),
            )
        ],
        "enough": {
            "metric": "top1",
            "target": 0.7,
            "times_patients": 20,
            "text": "About 20 times the patients would reach top-1 0.70 at ε = 8.",
        },
        "privacy": {
            "mechanism": "DP-SGD, Poisson sampling of patients",
            "unit": "patient",
            "noise_multiplier": 1.37,
            "sampling_rate": 0.05,
            "steps": 120,
            "delta": 1e-5,
            "epsilon": {s: 7.9 + 0.01 * i for i, s in enumerate(SITES)},
            "accountant": "PLD",
        },
        "notes": ["Everything ran on a CPU."],
        "provenance": {"huizhen": "0.1.0", "study digest": "ab" * 32, "command": "huizhen demo"},
    }  # fmt: skip


@pytest.fixture
def instruction(results):
    def values(loss):
        return {"loss": loss, "exact_match": 0.9 - loss / 2}

    arms = {
        arm: {"metrics": values(v), "seconds": 10.0, "rounds": [{"round": 1, "loss": v}]}
        for arm, v in (("pooled", 0.8), ("federated", 0.9), ("federated_dp", 1.4))
    }
    arms["local"] = {"metrics": values(1.3), "sites": {"a": {"metrics": values(1.1)}}}
    return {
        "schema": 1,
        "name": "reports",
        "kind": "instruction",
        "arms": arms,
        "samples": [
            {
                "prompt": "窦性心律。请总结。",
                "expected": "normal <ecg>",
                "answers": {"base": "?", "federated": "normal"},
            }
        ],
    }


class Page(HTMLParser):
    """Tags, attributes, and the cells of the tables."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.rows, self.text = [], [], [], []
        self.open = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, k, v or "") for k, v in attrs]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.open = True

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.open = False

    def handle_data(self, data):
        self.text.append(data)
        if self.open:
            self.rows[-1][-1] += data


def render(results, folder):
    return report.write_report(results, folder).read_text(encoding="utf-8")


def test_the_page_loads_and_runs_nothing(results, tmp_path):
    text = render(results, tmp_path)
    page = Page(text)
    assert "http://" not in text
    assert "https://" not in text  # nor does any text of these results name an address
    loading = {"script", "link", "img", "image", "iframe", "object", "embed", "base", "form"}
    assert not (loading | {"foreignobject", "audio", "video"}) & set(page.tags)
    for tag, key, value in page.attributes:
        assert not key.startswith("on"), (tag, key)
        if key.endswith("href") or key == "src":
            assert value.startswith("#")
    assert re.findall(r"@import|url\((?!#)", text) == []
    ids = [v for _, k, v in page.attributes if k == "id"]
    assert len(ids) == len(set(ids))
    assert {v[1:] for _, k, v in page.attributes if k.endswith("href")} <= set(ids)


@pytest.mark.parametrize(
    "hostile",
    ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "$\\frac{", "北京<b>"],
)
def test_hostile_names_are_only_text(results, tmp_path, hostile):
    was = SITES[0]

    def renamed(value):
        if isinstance(value, dict):
            return {hostile if k == was else k: renamed(v) for k, v in value.items()}
        return [renamed(v) for v in value] if isinstance(value, list) else value

    evil = renamed(results) | {"name": hostile, "notes": [hostile], "enough": {"text": hostile}}
    evil["provenance"] = {hostile: hostile}
    evil["privacy"][hostile] = hostile
    evil["data"] |= {"source": hostile, "notice": hostile}
    sample = dict.fromkeys(("prompt", "expected"), hostile)
    evil["samples"] = [sample | {"answers": {hostile: hostile}}]
    evil["baseline"]["text"] = hostile
    plain, page = Page(render(results, tmp_path)), Page(render(evil, tmp_path))
    assert not {"script", "img", "b"} & (set(page.tags) - set(plain.tags))
    assert page.tags.count("b") == plain.tags.count("b")
    assert not [a for a in page.attributes if a[1].startswith("on")]
    assert sum(hostile in part for part in page.text) > 10  # shown, not swallowed
    Console(file=StringIO()).print(report.summary_table(evil | {"name": "[/]"}))


def test_the_numbers_in_the_table_are_those_of_the_results(results, tmp_path):
    text = render(results, tmp_path)
    rows = {r[0]: r[1:] for r in Page(text).rows}
    # 12 rounds of 1 234 567 bytes up and 1 111 000 down, over 6 hospitals
    assert "205.8 kB per hospital and round; 13.33 MB came back; 3.1 % of the training time" in text
    assert rows["together"] == [
        "0.742 ± 0.012", "0.876 ± 0.012", "0.695 ± 0.012", "61.2", "14.81", "13.33", "–",
    ]  # fmt: skip
    assert rows["together, private"][0] == "0.212 ± 0.012"
    assert rows["together, private"][-1] == "7.95"  # the largest ε of any hospital
    assert rows["all records pooled"][3:] == ["61.2", "–", "–", "–"]
    assert rows["each hospital alone (mean)"][0] == "0.397"
    assert rows["best alone: hospital-a"][0] == "0.544"
    assert rows["TF-IDF, pooled"][0] == "0.810"
    assert rows["TF-IDF, best alone"][0] == "0.564"
    assert rows["hospital-a"] == ["1,209 / 403", "2,419 / 604", "9", "7.90"]


def test_the_terminal_table_has_the_same_numbers(results):
    out = StringIO()
    Console(file=out, width=140).print(report.summary_table(results))
    text = out.getvalue()
    for expected in ("0.742 ± 0.012", "14.81", "13.33", "7.95", "0.544", "0.810"):
        assert expected in text


def test_the_verdict_is_computed(results):
    assert verdict(results) == (
        "Training together beat every hospital alone: together 0.742, best single hospital 0.544, "
        "all records pooled 0.764; with ε = 7.95, 0.212 (top-1)."
    )
    results["arms"]["federated"]["metrics"]["top1"] = 0.55  # above 0.5437, within the spread
    assert "no better than the best" in verdict(results)
    results["arms"]["federated"]["metrics"]["top1"] = 0.5
    assert "did not reach" in verdict(results)


def test_one_seed_has_no_spread(results, tmp_path):
    for entry in results["arms"].values():
        entry["per_seed"] = [{"seed": 1, "metrics": entry["metrics"]}]
        entry["spread"] = {"top1": 0.0}
    text = render(results, tmp_path)
    rows = {r[0]: r[1:] for r in Page(text).rows}
    assert rows["together"][0] == "0.742"
    assert "One run per arm" in text


def test_a_spread_of_the_local_arm_is_enough_to_know_chance(results, tmp_path):
    """Of any arm that was run with several seeds, and the best hospital's is shown."""
    local = results["arms"]["local"]
    runs = [{"seed": s, "metrics": metrics(v)} for s, v in ((1, 0.39), (2, 0.4042))]
    local |= {"per_seed": runs, "spread": {"top1": 0.01004}}
    local["sites"][SITES[0]] |= {"per_seed": runs, "spread": {"top1": 0.0211}}
    text = render(results | {"arms": {"local": local}}, tmp_path)
    rows = {r[0]: r[1:] for r in Page(text).rows}
    assert rows["each hospital alone (mean)"][0] == "0.397 ± 0.010"
    assert rows["best alone: hospital-a"][0] == "0.544 ± 0.021"
    assert "One run per arm" not in text


def test_what_is_of_the_first_seed_alone_says_so(results, tmp_path):
    results["sweep_patients"] = [{"patients": 1234, "epsilon": 8.0, "metrics": metrics(0.1239)}]
    assert render(results, tmp_path).count("All of the first seed.") == 3  # rounds, sweep, fewer
    for entry in results["arms"].values():
        entry["per_seed"] = [{"seed": 1, "metrics": entry["metrics"]}]
    assert "first seed" not in render(results, tmp_path)


def test_the_line_without_noise_is_of_the_first_seed_as_the_sweep_is(results, monkeypatch):
    drawn = []

    def draw(points, label, **values):
        drawn.append(values)
        return "<svg/>"

    monkeypatch.setattr(report_figures, "sweep_figure", draw)
    runs = results["arms"]["federated"]["per_seed"]
    assert list(report_figures.figures_of(results, "top1"))
    assert drawn[-1]["without_noise"] == runs[0]["metrics"]["top1"] != 0.7423
    results["arms"]["federated"]["per_seed"] = []
    assert list(report_figures.figures_of(results, "top1"))
    assert drawn[-1]["without_noise"] == 0.7423


def test_what_privacy_does_not_cover_is_shown(results, tmp_path):
    results["privacy"] |= {
        "does_not_cover": ["further runs", "public facts"],
        "epsilon_per_round": [0.5 + i for i in range(30)],
    }
    results["sweep_patients"] = [{"patients": 1234, "epsilon": 8.0, "metrics": metrics(0.1239)}]
    text = render(results, tmp_path)
    assert "<dd>further runs</dd>\n<dd>public facts</dd>" in text
    assert "<dd>0.5, 1.5, 2.5, … 29.5</dd>" in text
    assert ["1,234", "8.00", "0.124"] in Page(text).rows


def test_of_a_loss_the_lower_is_better(instruction):
    for arm in instruction["arms"].values():
        del arm["metrics"]["exact_match"]
    del instruction["arms"]["local"]["sites"]["a"]["metrics"]["exact_match"]
    assert verdict(instruction).startswith("Training together beat every hospital alone")
    instruction["arms"]["federated"]["metrics"]["loss"] = 1.2  # against 1.1 alone
    assert "did not reach" in verdict(instruction)


def test_an_instruction_task_shows_its_samples(instruction, tmp_path):
    text = render(instruction, tmp_path)
    assert "normal &lt;ecg&gt;" in text
    assert "窦性心律。请总结。" in text


def test_classes_are_no_matter_of_an_instruction(instruction, results, tmp_path):
    data = results["data"]
    assert ["hospital-a", "1,209 / 403", "2,419 / 604", "–"] in Page(
        render(instruction | {"data": data}, tmp_path)
    ).rows
    assert "labels<br>seen" in render(results, tmp_path)


def test_hospitals_and_rounds_fall_back_to_the_metric_they_have(instruction, tmp_path):
    arms = instruction["arms"]
    for arm in ("federated", "federated_dp"):
        arms[arm]["sites"] = {"a": {"metrics": {"loss": 0.7}}}
        arms[arm]["rounds"] = [{"round": 1, "loss": 2.0, "metrics": {"loss": 0.8}}]
    arms["local"]["sites"]["a"]["own"] = {"loss": 0.9}
    text = render(instruction, tmp_path)
    assert "Is it better for us?" in text
    assert text.count("loss (lower is better)") == 2  # the axis of either figure
    for entry in (*arms.values(), arms["local"]["sites"]["a"]):
        entry["metrics"]["exact_match"] = 0.0
    assert "lower is better" in verdict(instruction)


def test_synthetic_patients_are_called_so(results, tmp_path):
    text = render(results, tmp_path)
    assert "The patients are synthetic" in text
    assert "Human Phenotype Ontology (HPO), release 2025-01-16" in text
    results["data"]["synthetic"] = False
    assert "The patients are synthetic" not in render(results, tmp_path)


def test_a_missing_part_is_left_out_and_nothing_breaks(results, tmp_path):
    full = len(Page(render(results, tmp_path)).tags)
    for key in set(results) - {"arms"}:
        rest = {k: v for k, v in results.items() if k != key}
        assert len(Page(render(rest, tmp_path)).tags) <= full
        report.summary_table(rest)
    for arm, entry in results["arms"].items():
        render(results | {"arms": {arm: entry}}, tmp_path)
    for key in set().union(*results["arms"].values()):
        fewer = copy.deepcopy(results)
        for entry in fewer["arms"].values():
            entry.pop(key, None)
        render(fewer, tmp_path)
    text = render({"arms": {"federated": {"metrics": {"top1": 0.5}}}}, tmp_path)
    for heading in ("Hospitals", "Privacy", "Examples", "Notes", "Where this comes from"):
        assert f"<h2>{heading}" not in text


def test_values_that_are_not_finite_are_dashes(results, tmp_path):
    results["arms"]["federated_dp"]["metrics"]["top1"] = float("nan")
    results["arms"]["federated"]["rounds"][1]["metrics"]["top1"] = float("inf")
    results["sweep"].append({"epsilon": None, "metrics": metrics(0.7)})
    rows = {r[0]: r[1:] for r in Page(render(results, tmp_path)).rows}
    assert rows["together, private"][0] == "–"
    assert "nan" not in verdict(results)


def test_the_same_results_give_the_same_bytes(results, tmp_path):
    first = report.write_report(results, tmp_path / "a").read_bytes()
    again = report.write_report(copy.deepcopy(results), tmp_path / "b").read_bytes()
    assert first == again
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["report.html"]


def test_figures_follow_the_page_in_light_and_dark(results, tmp_path):
    text = render(results, tmp_path)
    drawings = re.findall(r"<svg.*?</svg>", text, re.S)
    assert len(drawings) == 4
    for drawing in drawings:
        bare = re.sub(r"var\(--[a-z-]+, #[0-9a-f]{6}\)", "", drawing)
        assert re.findall(r"#[0-9a-f]{6}\b", bare) == []
    used = set(re.findall(r"var\((--[a-z-]+),", text))
    assert used <= set(re.findall(r"(--[a-z-]+):", text))


def test_results_without_arms_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no arms"):
        report.write_report({"schema": 1}, tmp_path)


def test_a_folder_that_cannot_be_written_is_a_storage_error(results, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        report.write_report(results, tmp_path / "file")
