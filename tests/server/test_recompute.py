"""CO-2: what a study's rounds gave follows from what was signed, and nothing else passes for it."""

import json

import pytest
from sqlalchemy import delete, text, update
from tests.federation.lying_federation import FIRST, SIZES, LyingSite, make_study
from tests.server.test_open_round import counts as metric_counts
from tests.server.test_studies import ENDS

from huizhen.cli.main import main
from huizhen.protocol.statements import Record
from huizhen.server.open_round import OpenRound
from huizhen.server.recompute import recompute
from huizhen.server.studies import change, find, offer
from huizhen.server.tables import counted, records, updates


@pytest.fixture
def made(desk):
    """A study with noised metrics after its two rounds, all of which are committed."""
    made = offer(desk, make_study(), FIRST, ends=ENDS)
    change(desk, find(desk, made.digest), "open")
    for sites in (tuple(SIZES), ("East", "South")):
        opened = OpenRound(desk.parts, made, desk.registry.trust(), tuple(SIZES))
        for number, site in enumerate(sites):
            said = LyingSite(site, (0.25 + number, -0.5))
            assert opened.receive(site, *said.honest(opened)) is None
        opened.close()
    return made


def change_rows(desk, statement):
    """Do what the store itself never would: whoever has the file can."""
    with desk.store._database.writing() as connection:
        names = connection.execute(text("SELECT name FROM sqlite_master WHERE type = 'trigger'"))
        for name in names.scalars().all():
            connection.execute(text(f"DROP TRIGGER {name}"))
        connection.execute(text("PRAGMA defer_foreign_keys = ON"))
        connection.execute(statement)


def test_each_round_follows_from_its_updates(desk, made):
    found = list(recompute(desk, made))
    assert [(one.round, one.counted, one.problem) for one in found] == [
        (1, ("East", "North", "South"), ""),
        (2, ("East", "South"), ""),
    ]
    assert found[-1].adapter == desk.store.rounds.last_record(made.digest).adapter


def test_a_study_without_rounds_has_nothing_to_compute(desk):
    assert list(recompute(desk, offer(desk, make_study(), FIRST, ends=ENDS))) == []


def forge(desk, made, round, **changes):
    """Put another record, signed by the coordinator itself, in a round's place."""
    stored = desk.store.rounds.records(made.digest)[round - 1]
    record = Record.read(stored.document, desk.registry.trust().coordinator)
    document = record.model_copy(update=changes).signed(desk.keys.identity)
    change_rows(
        desk,
        update(records)
        .where(records.c.study == made.digest, records.c.round == round)
        .values(document=document),
    )


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"result": "a" * 64}, "result is a"),
        ({"adapter": "a" * 64}, "announced adapter is a"),
        ({"parent": "a" * 64}, "parent is a"),
        ({"study": "a" * 64}, "study is a"),
        ({"counted": ()}, "has 0 of 3 updates"),
    ],
)
def test_a_coordinator_that_lies_about_a_round_is_found_out(desk, made, changes, problem):
    forge(desk, made, 1, **changes)
    [found] = recompute(desk, made)
    assert problem in found.problem


def test_an_update_left_out_of_the_sum_is_found_out(desk, made):
    """The record names two of the three that are in the result."""
    record = Record.read(
        desk.store.rounds.records(made.digest)[0].document, desk.registry.trust().coordinator
    )
    forge(desk, made, 1, counted=record.counted[:2])
    [found] = recompute(desk, made)
    assert found.problem.startswith("result is")


def test_an_update_that_is_gone_or_changed_is_named(desk, made):
    kept = desk.store.updates.counted(made.digest, 1)[0]
    place = next(desk.objects.folder.rglob(kept.payload))
    good = place.read_bytes()
    place.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    [found] = recompute(desk, made)
    assert "was changed" in found.problem
    place.unlink()
    [found] = recompute(desk, made)
    assert "is missing" in found.problem


def test_an_update_that_its_site_never_signed_is_found_out(desk, made):
    kept = desk.store.updates.counted(made.digest, 2)[0]
    change_rows(
        desk,
        update(updates)
        .where(updates.c.study == made.digest, updates.c.round == 2, updates.c.site == kept.site)
        .values(document=b"{}"),
    )
    first, second = recompute(desk, made)
    assert first.problem == ""
    assert f"the signed update of site '{kept.site}' is not kept" in second.problem


def test_a_round_that_was_taken_out_is_found_out(desk, made):
    for table in (counted, records):
        change_rows(desk, delete(table).where(table.c.study == made.digest, table.c.round == 1))
    [found] = recompute(desk, made)
    assert found.problem.startswith("round is 2")


def test_metrics_change_no_adapter(desk):
    study = make_study(
        privacy={
            "unit": "patient", "epsilon": 8.0, "delta": 1e-4, "sampling_rate": 0.3,
            "metrics_epsilon": 0.5, "learning_rate": 0.5,
        },
        rounds={"count": 2, "local_steps": 2},
        task={"labels": ["a", "b", "c", "d"]},
    )  # fmt: skip
    made = offer(desk, study, FIRST, ends=ENDS)
    change(desk, find(desk, made.digest), "open")
    for _ in range(3):
        opened = OpenRound(desk.parts, made, desk.registry.trust(), tuple(SIZES))
        for site in map(LyingSite, SIZES):
            answer = (
                site.signed(opened, site.metrics(opened, counts=metric_counts(opened)))
                if opened.is_metrics
                else site.honest(opened)
            )
            assert opened.receive(site.site, *answer) is None
        opened.close()
    found = list(recompute(desk, made))
    assert [one.problem for one in found] == ["", "", ""]
    assert found[2].adapter == found[1].adapter


def test_the_command_says_it_for_people_and_for_programs(desk, made, tmp_path, capsys):
    words = ["coordinator", "study", "verify", made.digest[:8], "--home", str(tmp_path)]
    assert main(words) == 0
    assert (
        capsys.readouterr()
        .out.splitlines()[0]
        .startswith("round 1 follows from East, North, South: ")
    )
    forge(desk, made, 2, result="a" * 64)
    assert main(words) == 1
    assert "round 2 DOES NOT FOLLOW: result is aaaa" in capsys.readouterr().out
    assert main([*words, "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert (said["verified"], [bool(one["problem"]) for one in said["rounds"]]) == (
        False, [False, True],
    )  # fmt: skip
