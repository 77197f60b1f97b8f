"""The federation's benchmark: its arithmetic, and each measurement to its end on small sizes."""

import json
import os
import subprocess
import sys
import time
import warnings
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest

with warnings.catch_warnings():
    # Flower's command line asks click for a name that click 8.5 calls deprecated.
    warnings.filterwarnings("ignore", "'click", DeprecationWarning)
    from huizhen.benchmarks import federation
    from huizhen.benchmarks.federation_light import RoundTimes, commit_times, stages
    from huizhen.benchmarks.federation_many import made_up_records
    from huizhen.benchmarks.federation_stock import DATABASES, run_stock
    from huizhen.benchmarks.federation_stock_app import record
    from huizhen.benchmarks.federation_values import (
        LARGE,
        Spread,
        between,
        random_tensors,
        status_bytes,
        tensor_shapes,
    )
    from huizhen.benchmarks.federation_watch import Watch, below, children

LOG = """\
2026-11-22 10:45:18,349 INFO huizhen.server.conductor round committed: study=b7743b904afc round=1 \
counted=3 record=20c71712f919
2026-11-22 10:45:19,001 INFO huizhen.server.conductor site does not count: site=a code=late
2026-11-22 10:45:20,500 INFO huizhen.server.conductor round committed: study=ffffffffffff round=1 \
counted=3 record=6e9a7c1d0b2f
2026-11-22 10:45:31,658 INFO huizhen.server.conductor round committed: study=b7743b904afc round=2 \
counted=3 record=be46ad9c25bc
"""


def test_updates_have_the_size_that_is_asked_for_and_are_never_equal():
    first, second = random_tensors(800), random_tensors(800)
    assert sum(one.nbytes for one in first.values()) == 3200
    assert {name: one.shape for name, one in first.items()} == tensor_shapes(800)
    for name, one in first.items():
        assert one.dtype == np.float32
        assert -0.001 <= one.min() < 0 < one.max() <= 0.001
        assert not np.array_equal(one, second[name])  # Flower would store them once


def test_each_tensor_of_the_large_adapter_is_one_chunk_of_flowers():
    [size] = {4 * int(np.prod(shape)) for shape in tensor_shapes(LARGE).values()}
    assert 4_900_000 < size < 5 << 20


@pytest.mark.parametrize("values", [0, 4, 1002])
def test_a_number_of_values_that_eight_tensors_cannot_hold_is_refused(values, capsys):
    with pytest.raises(SystemExit):
        federation.parse(["trivial", "--values", str(values)])
    assert "expected a multiple of 8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value"), [("--rounds", "2"), ("--many-rounds", "1"), ("--many-sites", "2")]
)
def test_too_little_to_measure_is_refused(option, value, capsys):
    with pytest.raises(SystemExit):
        federation.parse([option, value])
    assert f"{option} is {value}, expected at least" in capsys.readouterr().err


def test_the_stock_app_sends_the_same_arrays():
    sent = record(800)
    assert sorted(sent) == sorted(tensor_shapes(800))
    assert sum(one.nbytes for one in sent.to_numpy_ndarrays()) == 3200


def test_times_lie_between_moments():
    assert between([3.0, 5.0, 10.0]) == [2.0, 5.0]
    with pytest.raises(ValueError, match="run more rounds"):
        between([3.0])
    assert Spread.of([3.0, 1.0, 2.0, 9.0]) == Spread(2.5, 1.0, 9.0, 4)


def test_commits_are_read_from_the_log_of_the_one_study():
    found = commit_times(LOG, "b7743b904afc" + 52 * "0")
    assert found.keys() == {1, 2}
    assert found[2] - found[1] == pytest.approx(13.309)
    assert found[1] == datetime(2026, 11, 22, 10, 45, 18, 349_000).astimezone().timestamp()


def test_the_stages_of_a_round_make_up_the_round():
    times = [
        RoundTimes(announced=t, first_answer=t + 2, last_answer=t + 5, committed=t + 6)
        for t in (0.0, 70.0, 77.0, 84.0)  # the first round, with its warming up, does not count
    ]
    found = stages(times)
    assert found == {"to_first_answer": 2, "to_last_answer": 3, "to_next_announcement": 2}
    assert sum(found.values()) == 7


def test_a_stock_run_is_compared_with_its_own_size():
    times = {
        "trivial": Spread.of([0.5]),
        "large": Spread.of([4.0]),
        "stock large, state in SQLite": Spread.of([6.0]),
    }
    assert federation.speedups(times) == {"stock large, state in SQLite": 1.5}


def test_runs_take_turns_and_a_run_without_its_counterpart_is_left_out():
    options = federation.parse(["large", "stock", "memory", "--memory-sites", "3", "6"])
    assert list(federation.runs_of(options.names, options)) == [
        "stock trivial, state in SQLite", "stock trivial, state in memory",
        "large", "stock large, state in SQLite", "stock large, state in memory",
        "memory, 3 sites", "memory, 6 sites",
    ]  # fmt: skip
    told: list[str] = []
    runs = {"a": lambda folder: {"seconds": [1.0]}, "b": lambda folder: {"seconds": [2.0]}}
    found = federation.measure(runs, 2, told.append)
    assert [text[0] for text in told] == ["a", "b", "a", "b"]
    assert [len(one) for one in found.values()] == [2, 2]
    assert all(one["load"] >= 0 for results in found.values() for one in results)


def test_every_measurement_is_known_and_no_other():
    assert federation.parse([]).names == []
    with pytest.raises(SystemExit):
        federation.parse(["quick"])


def test_a_watch_counts_a_process_and_what_it_started():
    """The child holds 64 MiB, its own child 32."""
    inner = "b = bytearray(32 << 20); print('here', flush=True); input()"
    outer = (
        "import subprocess, sys; b = bytearray(64 << 20);"
        f"subprocess.run([sys.executable, '-c', {inner!r}])"
    )
    with subprocess.Popen(  # noqa: S603 - a program written here
        [sys.executable, "-c", outer], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"here\n"
        assert process.pid in children()[os.getpid()]
        assert len(below(process.pid, children())) == 1
        with Watch({process.pid: ("own", "started")}, seconds=0.05) as watch:
            time.sleep(0.2)
        process.communicate(b"\n")
    peak = watch.peak
    assert peak.processes == 2
    assert 64 << 20 < peak.groups["own"] < 90 << 20
    assert 32 << 20 < peak.groups["started"] < 58 << 20
    assert peak.together == sum(peak.groups.values()) <= peak.bound
    assert peak.single == peak.groups


def test_a_process_that_has_ended_holds_nothing():
    with Watch({2**22 + 1: ("own", "started")}, seconds=0.05) as watch:
        time.sleep(0.1)
    assert (watch.peak.together, watch.peak.bound, watch.peak.processes) == (0, 0, 0)


def test_memory_is_read_in_bytes():
    assert 10 << 20 < status_bytes("self", "VmRSS") <= status_bytes("self", "VmHWM") < 8 << 30


def test_records_of_two_sites_differ_and_hold_both_classes():
    first, again, other = (made_up_records(site) for site in ("site-1", "site-1", "site-2"))
    assert first == again != other
    assert {json.loads(line)["label"] for line in first.splitlines()} == {"A", "B"}


def run(tmp_path, capsys, *words):
    """Return what a run prints as JSON, after checking its table and its file."""
    out = tmp_path / "out.json"
    federation.main([*words, "--json", "--out", str(out)])
    found = json.loads(capsys.readouterr().out)
    assert json.loads(out.read_bytes()) == found
    federation.print_tables(found["runs"])
    return found, capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_light_sites_run_a_study_on_the_real_coordinator(tmp_path, capsys):
    before = set(below(os.getpid(), children()))
    words = ("trivial", "memory", "--rounds", "4", "--small-values", "80", "--values", "262144")
    found, table = run(tmp_path, capsys, *words, "--memory-sites", "2", "--sites", "2")
    for name in ("trivial", "memory, 2 sites"):
        [one] = found["runs"][name]
        assert len(one["seconds"]) == 3
        assert all(0 < time < 60 for time in one["seconds"])
        assert all(part >= 0 for part in one["stages"].values())
        for held in one["memory"].values():
            assert 20 < held["idle_mib"] <= held["peak_mib"] < 2000
    assert one["memory"].keys() == {"rounds", "superlink", "edge and services"}
    assert " adapters" in table
    assert set(below(os.getpid(), children())) <= before  # nothing is left running


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("database", DATABASES)
def test_stock_flower_runs_the_same(tmp_path, database):
    before = set(below(os.getpid(), children()))
    found = run_stock(
        tmp_path / "run", database=database, sites=2, values=80, rounds=2, seconds=300
    )
    assert len(found["seconds"]) == 1
    assert 0 < found["seconds"][0] < 300
    assert found["memory"].keys() == {"serverapp", "superlink"}
    for held in found["memory"].values():
        assert 20 < held["idle_mib"] <= held["peak_mib"] < 2000
    assert (tmp_path / "run" / "state.sqlite").exists() == (database == "SQLite")
    assert set(below(os.getpid(), children())) <= before  # nothing is left running


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_many_real_sites_finish(tmp_path, capsys):
    before = set(below(os.getpid(), children()))
    words = ("many", "--many-sites", "3", "--many-rounds", "2")
    found, table = run(tmp_path, capsys, *words)
    [one] = found["runs"]["many"]
    assert len(one["seconds"]) == 1
    assert 0 < one["first"] < one["wall"]
    memory = one["memory"]
    assert memory["groups_mib"].keys() == {"agents", "workers", "coordinator"}
    assert memory["together_mib"] == pytest.approx(sum(memory["groups_mib"].values()))
    assert memory["largest_mib"]["agents"] < memory["largest_mib"]["workers"]  # it has no torch
    assert "3 real sites: 2 rounds in" in table
    assert set(below(os.getpid(), children())) <= before
    assert not list(Path("/tmp").glob("federation-*/run/federation"))  # noqa: S108
