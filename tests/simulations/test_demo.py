"""The demo keeps to its own files and says what its patients are."""

import json

import pytest

from huizhen.protocol.errors import ConfigError
from huizhen.simulations import demo


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "results.json").write_text("{}")
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ConfigError, match="something else than a demo"):
        demo.clear_finished_demo(tmp_path)
    assert (tmp_path / "results.json").exists()


@pytest.mark.parametrize("change", [b"", b'{"patient": "mine"}\n', None])
def test_a_cohort_that_is_not_the_demos_is_left_alone_with_all_beside_it(tmp_path, change):
    """Whatever else the folder holds, and though it may begin as the demo's or lack its end."""
    whole = demo.write_demo_cohort(tmp_path).read_bytes()
    (tmp_path / "cohort.jsonl").write_bytes(whole[:-1] if change is None else change)
    for name in ("results.json", "run.json", "report.html"):
        (tmp_path / name).write_text("mine")
    (tmp_path / "state").mkdir()
    before = {path: path.is_dir() or path.read_bytes() for path in tmp_path.iterdir()}
    for step in (demo.clear_finished_demo, demo.write_demo_cohort):
        with pytest.raises(ConfigError, match="something else than a demo"):
            step(tmp_path)
    assert {path: path.is_dir() or path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_beginning_of_a_killed_demos_patients_does_not_stop_the_next(tmp_path):
    (tmp_path / ".cohort.jsonl.4711").write_text("{")
    demo.clear_finished_demo(tmp_path)
    assert demo.write_demo_cohort(tmp_path).exists()


def test_a_finished_demo_is_cleared_and_nothing_beside_it(tmp_path):
    demo.write_demo_cohort(tmp_path)
    for name in ("results.json", "run.json", "notes.txt"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "state").mkdir()
    demo.clear_finished_demo(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cohort.jsonl", "notes.txt"]


def test_an_interrupted_demo_is_kept(tmp_path):
    written = demo.write_demo_cohort(tmp_path).stat().st_mtime_ns
    (tmp_path / "run.json").write_text("{}")
    demo.clear_finished_demo(tmp_path)
    assert demo.write_demo_cohort(tmp_path).stat().st_mtime_ns == written
    assert (tmp_path / "run.json").exists()


def test_the_demo_is_six_hospitals_with_patients_of_several_records(tmp_path):
    path = demo.write_demo_cohort(tmp_path)
    experiment = demo.demo_experiment(path)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    visits: dict[str, int] = {}
    for record in records:
        visits[record["patient"]] = visits.get(record["patient"], 0) + 1
    assert len({record["site"] for record in records}) == 6
    assert set(visits.values()) == {1, 2, 3, 4}
    assert experiment.simulation.synthetic
    assert "Human Phenotype Ontology" in experiment.simulation.notice
    assert experiment.simulation.arms == ("local", "pooled", "federated", "federated_dp")
    assert experiment.study.privacy.unit == "patient"
