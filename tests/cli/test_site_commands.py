"""What a hospital's people type, against a coordinator on loopback that may lie or be away."""

import contextlib
import io
import json
import os

import pytest
from tests.federation.lying_coordinator import (
    PRIVATE,
    SITES,
    join,
    lying_coordinator,
    make_ledger,
    make_study,
    standing_of,
)

from huizhen.cli.main import main
from huizhen.client import joining
from huizhen.client.home import Home
from huizhen.protocol.documents import public_of, sign
from huizhen.protocol.errors import ConfigError
from huizhen.protocol.invitation import Invitation
from huizhen.simulations.live import edit, free_ports
from huizhen.storage.keys import make_key


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory):
    with lying_coordinator(tmp_path_factory.mktemp("alliance")) as made:
        for site in SITES[1:]:
            join(made, tmp_path_factory.mktemp("sites"), site)
        yield made


@pytest.fixture(scope="module")
def north(coordinator, tmp_path_factory):
    """A hospital whose approvals two stewards must sign."""
    folder = tmp_path_factory.mktemp("north")
    joined = join(coordinator, folder, "North")
    home = Home(folder / "home" / "site")
    home.folder.parent.mkdir()
    joined.folder.rename(home.folder)
    make_ledger(home)
    return home


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Two people with keys of their own."""
    folder = tmp_path_factory.mktemp("people")
    for name in ("wang", "li"):
        make_key(folder / "keys" / f"{name}.pem")
    return folder / "keys"


@pytest.fixture
def two_must_sign(north, keys):
    from huizhen.storage.keys import load_key

    people = {name: public_of(load_key(keys / f"{name}.pem")).raw.hex() for name in ("wang", "li")}
    place = north.folder / "policy.toml"
    text = place.read_text("utf-8")
    named = "".join(f'{name} = "{key}"\n' for name, key in people.items())
    edit(place, {"people = 0 ": f"people = 2\n[approval.stewards]\n{named}# "})
    yield
    place.write_text(text, "utf-8")


@pytest.fixture
def study(coordinator):
    number = len(coordinator.desk.store.studies.studies())
    return coordinator.offer(make_study(study={"name": f"study {number}"}, privacy=PRIVATE))


@pytest.fixture(autouse=True)
def same_environment(monkeypatch):
    """The commands put the site's way out into the environment, for Flower."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def run(north, capsys):
    def run(*words, home=north.folder.parent):
        capsys.readouterr()
        code = main(["site", *map(str, words), "--home", str(home)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def consent(coordinator, study):
    said = coordinator.desk.store.studies.standing(study.digest).get("North")
    return None if said is None else said.kind


# Withdraw.


@contextlib.contextmanager
def nobody_there(home):
    place = home.folder / "site.toml"
    text = place.read_text("utf-8")
    edit(place, {home.settings().coordinator.service: f"127.0.0.1:{free_ports(1)}"})
    yield
    place.write_text(text, "utf-8")


@pytest.mark.parametrize("called", ["digest", "name"])
def test_a_consent_ends_at_once_without_the_coordinator(run, north, coordinator, study, called):
    assert run("approve", study.digest[:12], "--cohort", "all", "--epsilon", 3)[0] == 0
    word = study.digest[:12] if called == "digest" else study.agreed().study.name
    with nobody_there(north):
        code, out, _ = run("withdraw", word)
    assert code == 0
    assert "is withdrawn; no further round is answered" in out
    assert "the coordinator could not be told yet" in out
    assert north.study(study.digest).approval() is None
    assert consent(coordinator, study) == "approval"
    with standing_of(north) as standing:
        assert standing._audit.entries()[-1].event == "approval_withdrawn"
        standing.refresh(version="1", codes=[])
    assert consent(coordinator, study) == "withdrawal"


def test_a_withdrawal_that_is_told_says_nothing_of_it(run, coordinator, study):
    run("approve", study.digest, "--cohort", "all", "--epsilon", 3)
    code, out, _ = run("withdraw", study.digest[:12], "--json")
    assert (code, json.loads(out)["told"]) == (0, True)
    assert consent(coordinator, study) == "withdrawal"


def test_what_is_kept_of_a_study_that_nobody_can_read_is_withdrawn_by_its_digest(run, north):
    folder = north.study("ab" * 32)
    folder.keep_offer(b"of another version")
    folder.keep_approval(b"of another version")
    assert run("withdraw", "abababab")[0] == 0
    assert folder.approval() is None


# Stop and pause.


def test_stop_and_pause_make_their_files_and_take_them_away(run, north):
    for action, name in (("stop", "STOP"), ("pause", "PAUSED")):
        assert run(action)[0] == 0
        assert (north.folder / name).exists()
        assert run(action, "--off")[0] == 0
        assert not (north.folder / name).exists()


@pytest.mark.parametrize("trouble", ["broken", "writable by others"])
def test_a_site_with_an_unusable_policy_can_be_stopped(run, north, trouble):
    place = north.folder / "policy.toml"
    text = place.read_text("utf-8")
    if trouble == "broken":
        place.write_text(text + "[", "utf-8")
    else:
        place.chmod(0o666)
    try:
        code, _, err = run("stop")
        assert code == 2
        assert f"policy.toml cannot be used; {north.folder / 'STOP'} was made" in err
        assert (north.folder / "STOP").exists()
        assert run("stop", "--off")[0] == 2
        assert not (north.folder / "STOP").exists()
    finally:
        place.write_text(text, "utf-8")
        place.chmod(0o600)


def test_the_stop_is_taken_back_whichever_file_it_was(run, north):
    place = north.folder / "policy.toml"
    text = place.read_text("utf-8")
    edit(place, {'file = "STOP"': 'file = "HALT"'})
    for name in ("STOP", "HALT"):
        (north.folder / name).touch()
    assert run("stop", "--off")[0] == 0
    assert not (north.folder / "STOP").exists()
    assert not (north.folder / "HALT").exists()
    place.write_text(text, "utf-8")


def test_where_no_site_is_nothing_is_stopped(run, tmp_path):
    assert run("stop", home=tmp_path)[0] == 2
    assert list(tmp_path.iterdir()) == []


# Approval by two people.


def approved(run, study):
    rows = json.loads(run("studies", "--json")[1])["studies"]
    shown = json.loads(run("status", "--json")[1])["studies"]
    [one] = [row["approved"] for row in rows if row["study"] == study.digest]
    [two] = [row["approved"] for row in shown if row["study"] == study.digest]
    assert one == two
    return one


def test_two_stewards_sign_on_machines_of_their_own(
    run, north, coordinator, study, keys, two_must_sign, tmp_path
):
    draft, nowhere = tmp_path / "rare.approval", tmp_path / "nowhere"
    terms = (study.digest[:12], "--cohort", "all", "--epsilon", 3.5)
    code, out, _ = run("approve", *terms, "--draft", draft)
    assert code == 0
    assert json.loads(draft.read_bytes())["cohort"] == "all"  # people can read it
    code, _, err = run("approve", "--sign", draft)
    assert (code, "0 of 2 [approval] people" in err) == (3, True)
    for name in ("wang", "li"):
        code, out, _ = run(
            "approve", "--sign", draft, "--steward", keys / f"{name}.pem", home=nowhere
        )
        assert code == 0
        signed = f"study {study.digest} at site 'North': cohort 'all', ε 3.5, until {study.ends}"
        assert signed in out
        if name == "wang":
            code, _, err = run("approve", "--sign", draft)
            assert (code, "1 of 2 [approval] people" in err) == (3, True)
    assert not approved(run, study)
    assert not nowhere.exists()
    code, out, _ = run("approve", "--sign", draft)
    assert code == 0
    assert "cohort 'all', ε 3.5, until" in out
    assert "is not here, so no round can be answered yet: huizhen models fetch tiny" in out
    assert approved(run, study)
    assert consent(coordinator, study) == "approval"
    with standing_of(north) as standing:
        facts = standing._audit.entries()[-1].facts
    assert (facts["cohort"], facts["epsilon_cap"]) == ("all", 3.5)


def test_what_one_has_signed_counts_for_nothing_and_keeps_its_terms(
    run, north, study, keys, two_must_sign, tmp_path
):
    terms = (study.digest[:12], "--cohort", "all", "--epsilon", 3)
    assert run("approve", *terms, "--steward", keys / "wang.pem")[0] == 3  # li has not signed
    assert north.study(study.digest).approval() is not None
    assert not approved(run, study)
    for changed, words in (
        (("--cohort", "other", "--epsilon", 3), "--cohort is 'other', the approval that is kept"),
        (
            ("--cohort", "all", "--epsilon", 5),
            "--epsilon is 5.0, the approval that is kept says",
        ),
    ):
        code, _, err = run("approve", study.digest, *changed, "--steward", keys / "li.pem")
        assert code == 3
        assert words in err
    assert not approved(run, study)
    draft = tmp_path / "half.approval"
    assert run("approve", study.digest, "--cohort", "all", "--draft", draft)[0] == 0
    assert run("approve", "--sign", draft, "--steward", keys / "li.pem")[0] == 0
    code, out, _ = run("approve", "--sign", draft, "--json")
    assert (code, json.loads(out)["epsilon"]) == (0, 3.0)
    assert approved(run, study)


def test_a_stranger_s_signature_does_not_count(run, study, keys, two_must_sign, tmp_path):
    stranger, draft = tmp_path / "people" / "stranger.pem", tmp_path / "draft"
    make_key(stranger)
    run("approve", study.digest, "--cohort", "all", "--epsilon", 3, "--draft", draft)
    assert run("approve", "--sign", draft, "--steward", stranger)[0] == 0
    assert run("approve", "--sign", draft, "--steward", keys / "li.pem")[0] == 0
    code, _, err = run("approve", "--sign", draft)
    assert (code, "1 of 2 [approval] people" in err) == (3, True)


def test_a_steward_signs_approvals_alone(run, keys, tmp_path):
    """A document of another kind with an approval's words is not signed."""
    from huizhen.storage.keys import load_key

    draft = tmp_path / "draft"
    body = {
        "schema": 1, "alliance": "rare", "study": "5" * 64, "site": "North", "cohort": "all",
        "epsilon_cap": 1.0, "issued": "2026-03-01T09:00:00Z", "expires": "2026-03-01T09:00:00Z",
    }  # fmt: skip
    for data in (b"", b"[]", b"{}", sign("membership", body, load_key(keys / "wang.pem"))):
        draft.write_bytes(data)
        assert run("approve", "--sign", draft, "--steward", keys / "li.pem")[0] == 5
        assert draft.read_bytes() == data


def test_an_approval_for_another_alliance_is_not_taken_in(run, study, tmp_path):
    draft = tmp_path / "draft"
    run("approve", study.digest, "--cohort", "all", "--epsilon", 3, "--draft", draft)
    draft.write_text(draft.read_text("utf-8").replace('"rare"', '"common"'), "utf-8")
    code, _, err = run("approve", "--sign", draft)
    assert (code, "for alliance 'common', this site is in 'rare'" in err) == (3, True)


@pytest.mark.parametrize(
    "words",
    [[], ["9c1e"], ["--cohort", "all"], ["9c1e", "--sign", "x"], ["--sign", "x", "--epsilon", 1]],
)
def test_approve_says_what_it_needs(run, words):
    code, _, err = run("approve", *words)
    assert code == 2
    assert "--sign" in err


# Join.


@pytest.fixture
def invited(coordinator, tmp_path):
    """A hospital's home that has not joined, and its invitation's file."""
    joining.init(Home(tmp_path / "home" / "site"), "West")
    made = coordinator.desk.registry.invite("West", coordinator.desk.settings.public, days=7)
    place = tmp_path / "West.invitation"
    place.write_bytes(made.to_bytes())
    return tmp_path / "home", place


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("way", ["wrong", "short", "no terminal", "n", "just enter"])
def test_an_invitation_that_nobody_has_compared_sends_nothing(
    run, coordinator, invited, monkeypatch, way
):
    home, place = invited
    fingerprint = Invitation.parse(place.read_bytes()).pins.fingerprint
    words = {
        "wrong": ["--fingerprint", fingerprint[::-1]],
        "short": ["--fingerprint", fingerprint[:4]],
    }.get(way, [])
    typed = {"n": Terminal("n\n"), "just enter": Terminal("\n")}.get(way, io.StringIO("y\n"))
    monkeypatch.setattr("sys.stdin", typed)
    before = coordinator.desk.audit.head().size
    code, _, err = run("join", place, *words, home=home)
    assert code in (2, 3)
    assert fingerprint in err
    assert coordinator.desk.audit.head().size == before
    assert not (home / "site" / "alliance").exists()


@pytest.mark.parametrize("way", ["blanks", "colons", "typed", "--yes"])
def test_an_invitation_that_was_compared_is_used(run, coordinator, invited, monkeypatch, way):
    home, place = invited
    fingerprint = Invitation.parse(place.read_bytes()).pins.fingerprint
    words = {
        "blanks": ["--fingerprint", fingerprint],
        "colons": ["--fingerprint", fingerprint.replace(" ", ":").upper()],
        "--yes": ["--yes"],
    }.get(way, [])
    monkeypatch.setattr("sys.stdin", Terminal("y\n") if way == "typed" else io.StringIO())
    reached = []

    def refuse(*arguments):
        reached.append(arguments)
        raise ConfigError("far enough")

    monkeypatch.setattr(joining, "join", refuse)
    code, _, err = run("join", place, *words, home=home)
    assert (code, len(reached)) == (2, 1)
    assert (fingerprint in err) == (way in ("typed", "--yes"))
