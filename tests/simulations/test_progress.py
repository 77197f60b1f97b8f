"""What a run shows while it goes on: bars on a terminal, a line per round elsewhere."""

import dataclasses
import math
from io import StringIO

import pytest
import torch
from rich.console import Console
from rich.progress import TextColumn

from huizhen.client.examples import Examples
from huizhen.protocol.mechanism import Mechanism
from huizhen.simulations.bars import LiveBars
from huizhen.simulations.engine import Work
from huizhen.simulations.progress import Progress
from huizhen.simulations.runner import arm_study


@pytest.fixture
def study(make_study):
    """Three rounds at two sites of two local steps at q = 0.5, or of three epochs."""
    return make_study(rounds={"count": 3, "local_epochs": 3})


@pytest.fixture
def work(study):
    """Return a unit of work at sites of 5 and 7 records."""

    def work(unit="federated_dp-1", *, private=True):
        sites = {
            name: Examples((torch.zeros(1),) * n, (), (), (), (), 0)
            for name, n in (("A", 5), ("B", 7))
        }
        return Work(unit, arm_study(study, 1, private=private), sites)

    return work


def console(*, is_terminal, **options):
    return Console(file=StringIO(), force_terminal=is_terminal, width=200, **options)


def shown(progress):
    """Return description, done, total and text of each bar."""
    return [(t.description, t.completed, t.total, t.fields["detail"]) for t in progress.bars.tasks]


def entry(round, **more):
    return {"round": round, "bytes_up": 5000, "seconds": 1.25, **more}


def test_the_bar_shows_the_epsilon_that_the_running_round_is_charged_for(work):
    progress, one = Progress(console(is_terminal=True)), work()
    progress.planned([one])
    spent = [Mechanism.of(one.study).epsilon_after(t) for t in (1, 2, 3)]
    assert spent[0] < spent[1] < spent[2] <= 8
    for t in (1, 2, 3):
        for done, site in enumerate("AB", 1):
            progress.site_done(one, t, site, 0.5, 2000)
            text = f"round {t}/3 ε {spent[t - 1]:.2f} {site} loss 0.500 2.0 kB/site"
            assert shown(progress)[1] == ("federated_dp-1", 2 * (t - 1) + done, 6, text)
        progress.round_done(one, entry(t, epsilon=spent[t - 1]))
        if t < 3:  # the next is charged before its first gradient
            assert shown(progress)[1][3] == f"round {t + 1}/3 ε {spent[t]:.2f}"


def test_without_privacy_no_epsilon_is_shown_and_a_loss_that_is_none_is_not(work):
    progress, one = Progress(console(is_terminal=True)), work("federated-1", private=False)
    progress.planned([one])
    progress.site_done(one, 1, "A", math.nan, 123_456)
    assert shown(progress)[1][3] == "round 1/3 A 0.12 MB/site"
    progress.round_done(one, entry(1))
    assert shown(progress)[1][3] == "round 2/3"


def test_the_bar_of_the_whole_run_is_full_when_every_round_is_done(work):
    progress = Progress(console(is_terminal=True))
    private, plain = work(), work("federated-1", private=False)
    progress.planned([plain, private])
    # 12 records: of a round without privacy read 3 times, with it 2 steps of a half of them
    total = 3 * 12 * 3 + 3 * 12 * 2 * 0.5
    assert shown(progress) == [("whole run", 0, total, "")]
    progress.restored(plain, 1)
    for one, rounds in ((plain, (2, 3)), (private, (1, 2, 3))):
        for t in rounds:
            for site in "AB":
                progress.site_done(one, t, site, 0.5, 2000)
            progress.round_done(one, entry(t))
    assert shown(progress)[0][1] == pytest.approx(total)


def test_a_resumed_unit_starts_where_it_was_and_the_next_takes_its_place(work):
    progress = Progress(console(is_terminal=True))
    first, second = work("pooled-1", private=False), work("federated-1", private=False)
    progress.planned([first, second])
    progress.restored(first, 2)
    progress.site_done(first, 3, "A", 0.5, 2000)
    assert shown(progress)[1][:3] == ("pooled-1", 5, 6)
    progress.site_done(second, 1, "A", 0.5, 2000)
    assert [bar[:3] for bar in shown(progress)[1:]] == [("federated-1", 1, 6)]


def written(console):
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def lines(progress):
    return written(progress.console).splitlines()


def test_without_a_terminal_each_round_is_a_line(work):
    with Progress(console(is_terminal=False)) as progress:
        one = work()
        progress.planned([one])
        progress.site_done(one, 1, "A", 0.5, 2000)
        measured = {"top1": 0.25, "top3": 0.5}
        progress.round_done(one, entry(1, loss=1.5, metrics=measured, epsilon=3.456))
        progress.round_done(one, entry(2))
    assert lines(progress) == [
        "federated_dp-1: round 1/3, loss 1.500, top1 0.250, ε 3.46, 2.5 kB/site up, 1.2 s",
        "federated_dp-1: round 2/3, 2.5 kB/site up, 1.2 s",
    ]


def test_on_a_terminal_only_the_last_round_of_a_unit_is_a_line(work):
    progress, one = Progress(console(is_terminal=True)), work()
    for t in (1, 2):
        progress.round_done(one, entry(t))
    assert lines(progress) == []
    progress.round_done(one, entry(3))
    assert len(lines(progress)) == 1
    assert "federated_dp-1: round 3/3" in lines(progress)[0]


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_quiet_console_shows_nothing(work, is_terminal):
    with Progress(console(is_terminal=is_terminal, quiet=True)) as progress:
        one = work()
        progress.planned([one])
        progress.say("reading")
        progress.site_done(one, 1, "A", 0.5, 2000)
        for t in (1, 2, 3):
            progress.round_done(one, entry(t))
    assert lines(progress) == []


@pytest.mark.parametrize("is_terminal", [False, True])
def test_what_is_said_is_shown_as_it_is(is_terminal):
    bars = LiveBars(console(is_terminal=is_terminal))
    bars.say("reading site [red]x[/] :smile:")
    assert "reading site [red]x[/] :smile:" in written(bars.console)


def test_a_long_line_is_folded_on_a_terminal_alone():
    for is_terminal, count in ((False, 1), (True, 2)):
        narrow = Console(file=StringIO(), force_terminal=is_terminal, width=20)
        LiveBars(narrow).say("word " * 6)
        assert len(written(narrow).splitlines()) == count


def test_bars_live_as_long_as_the_context_also_when_it_ends_in_an_error():
    for is_terminal in (True, False):
        bars = LiveBars(console(is_terminal=is_terminal), TextColumn("{task.fields[detail]}"))

        def fail(bars=bars, is_terminal=is_terminal):
            with bars as entered:
                assert entered is bars
                assert bars.bars.live.is_started == is_terminal
                bars.bars.add_task("unit [b]x[/]", total=2, detail="SHOWN")
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fail()
        assert not bars.bars.live.is_started
        text = written(bars.console)
        assert ("SHOWN" in text and "unit [b]x[/]" in text) == is_terminal


def test_a_unit_without_privacy_costs_its_epochs(work, study):
    progress = Progress(console(is_terminal=True))
    one = work("pooled-1", private=False)
    rounds = dataclasses.replace(one.study.rounds, local_epochs=1)
    one = dataclasses.replace(one, study=dataclasses.replace(one.study, rounds=rounds))
    progress.planned([one])
    assert shown(progress)[0][2] == 36
