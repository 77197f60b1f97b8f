"""Health and metrics of a running coordinator, for loopback only: ``/health`` and ``/metrics``.

No figure here is of a hospital's data: rounds, answers, refusals by code, when a site was seen.
"""

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from huizhen.protocol.errors import HuizhenError
from huizhen.server.desk import Desk

_TEXT = "text/plain; version=0.0.4; charset=utf-8"


class _Numbers(Collector):
    """Reads the store at every scrape: there is nothing to keep in step."""

    def __init__(self, desk: Desk, parts: Callable[[], Mapping[str, bool]]) -> None:
        self._desk, self._parts = desk, parts

    def collect(self) -> Iterator[Metric]:
        """Give every figure."""
        store, clock = self._desk.store, self._desk.clock
        counts = store.counts()
        rounds = CounterMetricFamily(
            "huizhen_rounds_committed", "Committed rounds.", labels=["study"]
        )
        for study, number in counts.rounds.items():
            rounds.add_metric([study[:12]], number)
        yield rounds
        updates = CounterMetricFamily(
            "huizhen_updates_counted", "Updates in committed rounds.", labels=["study"]
        )
        for study, number in counts.updates.items():
            updates.add_metric([study[:12]], number)
        yield updates
        refusals = CounterMetricFamily(
            "huizhen_answers_refused", "Answers that were not counted.", labels=["code"]
        )
        for code, number in counts.refusals.items():
            refusals.add_metric([code], number)
        yield refusals
        states = GaugeMetricFamily("huizhen_studies", "Studies by state.", labels=["state"])
        found = [one.state for one in store.studies.studies()]
        for state in sorted(set(found)):
            states.add_metric([state], found.count(state))
        yield states
        seen = GaugeMetricFamily(
            "huizhen_site_last_seen_seconds", "Since a site was heard of.", labels=["site"]
        )
        skew = GaugeMetricFamily(
            "huizhen_site_clock_skew_seconds", "A site's clock less this one.", labels=["site"]
        )
        for status in store.sites.statuses():
            seen.add_metric([status.site], (clock() - status.seen).total_seconds())
            skew.add_metric([status.site], status.clock_skew_seconds)
        yield seen
        yield skew
        up = GaugeMetricFamily("huizhen_part_up", "Whether a part runs.", labels=["part"])
        for name, is_up in self._parts().items():
            up.add_metric([name], float(is_up))
        yield up


def make_status(desk: Desk, parts: Callable[[], Mapping[str, bool]]) -> Starlette:
    """Return the ASGI application.

    Args:
        desk: the coordinator's state.
        parts: gives whether each part of it runs, by name.
    """
    registry = CollectorRegistry()
    registry.register(_Numbers(desk, parts))

    def health(_: Request) -> Response:
        found = dict(parts())
        try:
            desk.store.counts()
            found["store"] = True
        except HuizhenError:
            found["store"] = False
        is_well = all(found.values())
        return JSONResponse(
            {"status": "ok" if is_well else "failing", "parts": found}, 200 if is_well else 503
        )

    def metrics(_: Request) -> Response:
        return Response(generate_latest(registry), media_type=_TEXT)

    return Starlette(routes=[Route("/health", health), Route("/metrics", metrics)])
