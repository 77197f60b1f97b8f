"""What a monitor sees: whether every part runs, and figures of rounds and sites alone."""

import asyncio

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.federation.lying_federation import FIRST, LIES, SIZES, LyingSite, make_study
from tests.server.test_studies import ENDS

from huizhen.protocol.errors import StorageError
from huizhen.protocol.statements import stamp
from huizhen.server.open_round import OpenRound
from huizhen.server.status import make_status
from huizhen.server.studies import change, find, offer

PARTS = {"superlink": True, "rounds": True, "edge": True}


def ask(desk, parts, path, method="GET"):
    async def asked():
        app = make_status(desk, lambda: parts)
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://127.0.0.1"
        ) as client:
            return await client.request(method, path)

    return asyncio.run(asked())


def samples(desk, parts):
    answer = ask(desk, parts, "/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        (one.name, *one.labels.values()): one.value
        for family in text_string_to_metric_families(answer.text)
        for one in family.samples
    }


def test_it_is_well_when_every_part_runs(desk):
    answer = ask(desk, PARTS, "/health")
    assert (answer.status_code, answer.json()) == (
        200, {"status": "ok", "parts": {**PARTS, "store": True}},
    )  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_is_down_is_named(desk, part):
    answer = ask(desk, PARTS | {part: False}, "/health")
    assert (answer.status_code, answer.json()["status"]) == (503, "failing")
    assert [name for name, is_up in answer.json()["parts"].items() if not is_up] == [part]


def test_a_store_that_cannot_be_read_is_named(desk, monkeypatch):
    def broken(_):
        raise StorageError("gone")

    monkeypatch.setattr(type(desk.store), "counts", broken)
    answer = ask(desk, PARTS, "/health")
    assert (answer.status_code, answer.json()["parts"]["store"]) == (503, False)


def test_the_figures_are_those_of_the_store(desk, clock):
    made = offer(desk, make_study(), FIRST, ends=ENDS)
    change(desk, find(desk, made.digest), "open")
    opened = OpenRound(desk.parts, made, desk.registry.trust(), tuple(SIZES))
    opened.receive("South", *LIES["up 1, a NaN"][0](LyingSite("South"), opened))
    for site in ("North", "South"):
        opened.receive(site, *LyingSite(site).honest(opened))
    opened.close()
    desk.report("North", version="0.1.0", codes=["idle"], time=stamp(clock()), studies=[])
    found = samples(desk, PARTS | {"rounds": False})
    short = made.digest[:12]
    assert found["huizhen_rounds_committed_total", short] == 1
    assert found["huizhen_updates_counted_total", short] == 2
    assert found["huizhen_answers_refused_total", "malformed"] == 1
    assert found["huizhen_studies", "open"] == 1
    assert found["huizhen_site_last_seen_seconds", "North"] == 0
    assert found["huizhen_site_clock_skew_seconds", "North"] == 0
    assert (found["huizhen_part_up", "rounds"], found["huizhen_part_up", "edge"]) == (0, 1)


def test_nothing_else_is_served(desk):
    assert ask(desk, PARTS, "/docs").status_code == 404
    assert ask(desk, PARTS, "/health", "POST").status_code == 405
