"""What sites report replaces what they reported; a log that shows two heads is caught."""

from dataclasses import replace

import pytest

from huizhen.protocol.errors import ForkError
from huizhen.server import store_sites
from huizhen.server.store_sites import SiteProgress, SiteStatus, StoredHead


@pytest.fixture
def status(making):
    return SiteStatus(
        site="A",
        version="1.2",
        codes=("clock_skew", "disk_low"),
        clock_skew_seconds=-2.5,
        seen=making.at(),
    )


def test_a_report_takes_the_place_of_the_one_before(store, status, making):
    assert store.sites.statuses() == ()
    store.sites.report_status(status)
    store.sites.report_status(replace(status, site="北京", codes=()))
    assert store.sites.statuses()[0] == status
    later = replace(status, version="1.3", codes=(), clock_skew_seconds=0.0, seen=making.at(60))
    store.sites.report_status(later)
    assert store.sites.statuses() == (later, replace(status, site="北京", codes=()))


@pytest.mark.parametrize("code", ["", "two words", " x", "line\n"])
def test_a_code_is_one_word(store, status, code):
    with pytest.raises(ValueError, match="expected words"):
        store.sites.report_status(replace(status, codes=("fine", code)))
    assert store.sites.statuses() == ()


def test_progress_is_of_one_study_and_site(opened, making):
    other = "6" * 64
    opened.studies.propose(other, "strokes", b"offer", making.at())
    opened.sites.report_progress(making.study, "B", "training", making.at())
    opened.sites.report_progress(making.study, "A", "waiting", making.at())
    opened.sites.report_progress(other, "A", "refused", making.at())
    opened.sites.report_progress(making.study, "A", "sent", making.at(5))
    assert opened.sites.progress(making.study) == (
        SiteProgress(study=making.study, site="A", code="sent", reported=making.at(5)),
        SiteProgress(study=making.study, site="B", code="training", reported=making.at()),
    )
    assert [one.code for one in opened.sites.progress(other)] == ["refused"]


def head(making, size, root="a", log="A", document=b"\x00signed"):
    root = making.digest(root)
    return StoredHead(log=log, size=size, root=root, document=document, received=making.at(size))


def test_the_largest_head_of_a_log_is_the_latest(store, making):
    sites = store.sites
    assert sites.heads("A") == ()
    assert sites.add_head(head(making, 3)) is True
    assert sites.add_head(head(making, 10, root="b")) is True
    assert sites.add_head(head(making, 99, log="B")) is True
    assert sites.add_head(head(making, 5, root="late")) is False
    assert sites.heads("A") == (head(making, 3), head(making, 10, root="b"))


def test_a_countersigned_head_takes_the_place_of_the_bare_one(store, making):
    store.sites.add_head(head(making, 3))
    assert store.sites.add_head(head(making, 3)) is False
    assert store.sites.add_head(head(making, 3, document=b"countersigned")) is True
    assert store.sites.heads("A") == (head(making, 3, document=b"countersigned"),)


def test_two_heads_of_one_size_are_a_fork_also_when_the_log_has_grown(store, making):
    for size in (3, 7):
        store.sites.add_head(head(making, size))
    for size in (3, 7):
        with pytest.raises(
            ForkError, match=f"log 'A' has shown head 0000.* of size {size} and"
        ) as caught:
            store.sites.add_head(head(making, size, root="rewritten", document=b"other"))
        assert caught.value.evidence == (b"\x00signed", b"other")
    assert store.sites.add_head(head(making, 3, root="rewritten", log="B")) is True
    assert store.sites.heads("A") == (head(making, 3), head(making, 7))


def test_the_history_of_heads_is_bounded(store, making, monkeypatch):
    monkeypatch.setattr(store_sites, "MAX_HEADS", 3)
    store.sites.add_head(head(making, 1, log="B"))
    for size in range(1, 7):
        store.sites.add_head(head(making, size))
    assert [one.size for one in store.sites.heads("A")] == [4, 5, 6]
    assert [one.size for one in store.sites.heads("B")] == [1]
