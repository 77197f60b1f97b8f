"""``huizhen audit`` as a hospital, the coordinator and an inspector call it."""

import json
import re
from datetime import UTC, datetime

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from huizhen.cli.main import main
from huizhen.protocol.documents import countersign, public_of
from huizhen.protocol.errors import ForkError
from huizhen.protocol.statements import Board, Checkpoint, Member, Membership
from huizhen.storage.audit import AuditLog
from huizhen.storage.keys import load_key, make_key
from huizhen.storage.witness import WitnessBook

S, T = "5" * 64, "7" * 64
COORDINATOR, SOUTH, STRANGER = (
    Ed25519PrivateKey.from_private_bytes(bytes([n] * 32)) for n in (1, 2, 3)
)


class Clock:
    """A clock that goes on by a minute with each look."""

    def __init__(self):
        self.minute = 0

    def __call__(self):
        self.minute += 1
        return datetime(2026, 3, 1, 8, self.minute, tzinfo=UTC)


def hexed(key):
    return public_of(key).raw.hex()


@pytest.fixture
def home(tmp_path):
    return tmp_path / "home"


@pytest.fixture
def key(home):
    return make_key(home / "site" / "identity.pem")


@pytest.fixture
def log(home, key):
    """A log of eight entries: five witnessed by the coordinator, three of them by South as well."""
    with AuditLog.create(
        home / "site" / "audit.sqlite", alliance="rare", log="North", clock=Clock()
    ) as log:
        log.append("study_offered", study=S)
        log.append("approval_given", study=S, cohort="all", epsilon_cap=2.5)
        own = log.checkpoint(key)
        log.countersigned(countersign(own, SOUTH), [public_of(SOUTH)])
        log.append("study_offered", study=T)
        log.append("ledger_charged", study=S, round=1, ledger={"size": 4, "root": "ab" * 32})
        own = log.checkpoint(key)
        log.countersigned(countersign(own, COORDINATOR), [public_of(COORDINATOR)])
        log.append("training_started", study=S, round=1, attempt=1)
        log.append("training_ended", study=S, round=1, attempt=1, code=None)
        log.append("work_paused", code="kill_file")
        yield log


@pytest.fixture
def membership(tmp_path, key):
    board = Ed25519PrivateKey.from_private_bytes(bytes([9] * 32))

    def member(site, its):
        return Member(
            site=site,
            identity=hexed(its),
            node_key=site,
            status="active",
            since="2026-01-01T00:00:00Z",
            until=None,
            former=(),
        )

    said = Membership(
        alliance="rare",
        version=1,
        previous=None,
        issued="2026-01-01T00:00:00Z",
        board=Board(keys=(hexed(board),), threshold=1),
        coordinator=hexed(COORDINATOR),
        members=(member("North", key), member("South", SOUTH)),
    )
    path = tmp_path / "membership.json"
    path.write_bytes(said.signed(board))
    return path


@pytest.fixture
def run(home, monkeypatch, capsys):
    monkeypatch.setenv("HUIZHEN_HOME", str(home))
    monkeypatch.setenv("COLUMNS", "140")

    def run(*words):
        code = main(["audit", *map(str, words)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_show_is_a_table_of_what_happened(run, log):
    code, out, err = run("show")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "audit log of 'North' in alliance 'rare', 8 entries"
    assert lines[1].split() == ["entry", "time", "event", "facts"]
    rows = {int(line.split()[0]): " ".join(line.split()[1:]) for line in lines[2:10]}
    assert (
        rows[3]
        == "2026-03-01T08:03:00Z approval_given cohort all epsilon_cap 2.5 study 555555555555"
    )
    assert rows[5].endswith("ledger_charged ledger 4:abababababab round 1 study 555555555555")
    assert rows[7].endswith("training_ended attempt 1 code - round 1 study 555555555555")
    assert lines[-1] == f"head 8:{log.root(8)}"


def test_show_takes_the_last_ones_or_a_study_s(run, log):
    _, out, _ = run("show", "--last", 2)
    assert [line.split()[0] for line in out.splitlines()[2:4]] == ["7", "8"]
    assert "6 earlier ones are not shown: --last 0" in out
    _, out, _ = run("show", "--json", "--last", 0)
    assert json.loads(out) == [entry.to_json() for entry in log.entries()]
    _, out, _ = run("show", "--json", "--study", "5" * 8)
    assert [one["sequence"] for one in json.loads(out)] == [2, 3, 5, 6, 7]


def test_verify_without_keys_says_what_it_cannot_say(run, log):
    code, out, err = run("verify")
    assert (code, err) == (0, "")
    assert (
        "8 entries of the audit log of 'North' in alliance 'rare', 2026-03-01T08:01:00Z to" in out
    )
    assert "each is as it was written, and 2 checkpoints are of these entries" in out
    assert "the clock went back" not in out
    assert "no key was given: the signatures of the checkpoints were not verified" in out
    assert "no witnessed head was given: an older copy of this log would pass as well" in out
    assert out.splitlines()[-1] == f"head 8:{log.root(8)}"


def test_verify_with_a_membership_says_who_has_seen_what(run, log, membership):
    code, out, _ = run("verify", "--membership", membership)
    assert code == 0
    assert "its owner has signed entries 1 to 5\n" in out
    assert "coordinator has seen entries 1 to 5\n" in out
    assert "South has seen entries 1 to 3\n" in out
    assert "entries 6 to 8 are covered by no known witness" in out
    code, out, _ = run("verify", "--membership", membership, "--json")
    found = json.loads(out)
    assert found["signed"] == {"North": 5, "coordinator": 5, "South": 3}
    assert (found["entries"], found["witnessed"], found["checkpoints"]) == (8, 5, 2)
    assert found["clock_went_back"] == []


def test_verify_with_the_owner_s_key_knows_no_witness(run, log, key):
    code, out, _ = run("verify", "--key", hexed(key))
    assert code == 0
    assert "its owner has signed entries 1 to 5\n" in out
    assert "entries 1 to 8 are covered by no known witness" in out
    code, out, _ = run("verify", "--key", hexed(STRANGER))
    assert "its owner has signed none with the key that was given" in out
    assert "2 checkpoints are signed with keys that were not given" in out


def test_a_clock_that_went_back_is_told(run, log):
    log._clock.minute = 0
    log.append("work_resumed", code="command")
    log.append("work_paused", code="command")
    _, out, _ = run("verify")
    assert "the clock went back before 1 of them, first before entry 9" in out


def test_verify_finds_an_older_copy_by_a_head_or_a_checkpoint_of_a_witness(run, log, tmp_path):
    head = f"8:{log.root(8)}"
    assert "the log has had the head that was witnessed" in run("verify", "--witnessed", head)[1]
    code, out, err = run("verify", "--witnessed", f"9:{'a' * 64}")
    assert (code, out) == (8, "")
    assert "saw 9 entries, the audit log ends with 8: this is an older copy" in err
    said = Checkpoint(
        alliance="rare", log="North", size=8, root="a" * 64, issued="2026-03-01T09:00:00Z"
    )
    seen = tmp_path / "seen.json"
    seen.write_bytes(said.signed(SOUTH))
    code, out, err = run("verify", "--witnessed", seen)
    assert (code, out) == (8, "")
    assert "this is another log" in err
    seen.write_text("{}")
    code, _, err = run("verify", "--witnessed", seen)
    assert (code, err.count("\n")) == (2, 1)
    assert "is neither a checkpoint nor N:ROOT" in err


def test_an_export_is_verified_without_the_log(run, log, home, key, membership, tmp_path):
    out_file = tmp_path / "log.json"
    pem = home / "site" / "identity.pem"
    code, out, _ = run("export", "--out", out_file, "--key", pem, "--membership", membership)
    assert code == 0
    assert f"8 of entries 1 to 8 are in {out_file}, SHA-256 " in out
    (home / "site" / "audit.sqlite").rename(home / "elsewhere.sqlite")
    code, out, err = run("verify", "--export", out_file, "--membership", membership)
    assert (code, err) == (0, "")
    assert "entries 1 to 8 are all there, each in its place\n" in out
    assert "its owner has signed entries 1 to 8\n" in out
    assert "coordinator has seen entries 1 to 5\n" in out
    assert "entries 6 to 8 are covered by no known witness" in out
    code, out, _ = run("verify", "--export", out_file, "--key", hexed(key), "--json")
    found = json.loads(out)
    assert (found["entries"], found["signers"], found["witnesses"]) == (8, ["North"], [])
    code, _, err = run("verify", "--export", out_file, "--key", hexed(SOUTH))
    assert code == 5
    code, _, err = run("verify", "--export", out_file)
    assert code == 2
    assert "nothing was given to check the export against" in err
    text = out_file.read_text()
    out_file.write_text(text.replace('"kill_file"', '"command__"'))
    code, out, err = run("verify", "--export", out_file, "--key", hexed(key))
    assert (code, out) == (8, "")
    assert err == "huizhen: entry 8 of the audit log is not the one that was signed\n"


def test_a_part_or_a_study_is_exported_alone_and_said_to_be(run, log, key, tmp_path):
    code, out, _ = run("export", "--out", tmp_path / "a.json", "--from", 2, "--to", 4, "--json")
    assert (code, json.loads(out)["entries"]) == (0, 3)
    _, out, _ = run("verify", "--export", tmp_path / "a.json", "--key", hexed(key))
    assert "entries 2 to 4 of 5 are all there" in out
    code, _, _ = run("export", "--out", tmp_path / "b.json", "--study", "5" * 8)
    assert code == 0
    _, out, _ = run("verify", "--export", tmp_path / "b.json", "--key", hexed(key))
    assert "3 entries of the audit log of 'North'" in out
    assert "of entries 1 to 5 those of study 555555555555 alone:" in out
    assert "that it has no more of them is its owner's word" in out
    code, _, err = run("export", "--out", tmp_path / "c.json", "--study", "9" * 8)
    assert code == 2
    assert "no study here begins with '99999999'" in err
    assert not (tmp_path / "c.json").exists()


def test_that_it_was_exported_is_in_the_log_before_the_file_is(run, log, tmp_path):
    """AU-2: with a log that cannot be written nothing is exported either."""
    out_file = tmp_path / "a.json"
    code, out, _ = run("export", "--out", out_file, "--json")
    entry = log.entries()[-1]
    assert (entry.sequence, entry.event) == (9, "log_exported")
    assert entry.facts["document"] == json.loads(out)["sha256"]
    assert (entry.facts["first"], entry.facts["last"], entry.facts["study"]) == (1, 5, None)
    code, _, err = run("export", "--out", out_file)
    assert code == 2
    assert "exists: choose another --out" in err
    assert log.head().size == 9
    code, _, err = run("export", "--out", tmp_path / "none" / "a.json")
    assert code == 7
    assert log.head().size == 10


def test_what_cannot_be_logged_is_not_exported(run, log, tmp_path, monkeypatch):
    from huizhen.protocol.errors import StorageError

    def fail(self, data):
        raise StorageError("the disk is full")

    monkeypatch.setattr("huizhen.storage.audit_file.AuditFile.add", fail)
    assert run("export", "--out", tmp_path / "a.json")[0] == 7
    assert not (tmp_path / "a.json").exists()


def test_no_output_shows_the_bytes_of_a_key(run, log, home, key, membership, tmp_path):
    """ID-6: everything that the commands print and write, and the log itself."""
    pem = home / "site" / "identity.pem"
    texts = [
        *run("export", "--out", tmp_path / "a.json", "--key", pem, "--membership", membership),
        *run("show", "--last", 0),
        *run("verify", "--membership", membership),
        *run("verify", "--log", pem),
        *run("export", "--out", tmp_path / "b.json", "--key", membership),
    ]
    written = [path.read_bytes() for path in (home / "site").glob("audit.sqlite*")]
    written.append((tmp_path / "a.json").read_bytes())
    secret = load_key(pem).private_bytes_raw()
    body = pem.read_bytes().splitlines()[1]
    for form in (secret, secret.hex().encode(), body, body[-30:]):
        assert not any(form in str(text).encode() for text in texts)
        assert not any(form in data for data in written)


@pytest.fixture
def book(home):
    with WitnessBook.create(home / "site" / "witnessed.sqlite") as book:
        yield book


def seen(book, size, root, log="South", key=SOUTH, proof=()):
    said = Checkpoint(
        alliance="rare", log=log, size=size, root=root * 64, issued="2026-03-01T09:00:00Z"
    )
    return book.see(
        said.signed(key), proof, alliance="rare", log=log, owner=[public_of(key)], key=COORDINATOR
    )


def test_witness_lists_what_was_seen_of_others(run, book, tmp_path):
    assert run("witness")[1] == "nothing was seen of any other log yet\n"
    seen(book, 7, "a")
    seen(book, 9, "b")
    seen(book, 4, "c", log="coordinator", key=COORDINATOR)
    code, out, _ = run("witness")
    assert code == 0
    assert f"South: 7 entries on 2026-03-01T09:00:00Z, {'a' * 64}\n" in out
    assert "  then a checkpoint of 9 came that nothing joins to this one\n" in out
    assert f"coordinator: 4 entries on 2026-03-01T09:00:00Z, {'c' * 64}\n" in out
    with pytest.raises(ForkError):
        seen(book, 7, "d")
    _, out, _ = run("witness")
    assert "  has forked: its owner signed two histories" in out
    found = json.loads(run("witness", "--json")[1])["logs"]
    assert [(one["log"], one["size"], one["forked"]) for one in found] == [
        ("South", 7, True),
        ("coordinator", 4, False),
    ]


def test_a_witness_s_checkpoint_is_written_for_whoever_verifies(run, book, log, key, tmp_path):
    out_file = tmp_path / "north.json"
    book.see(
        log.checkpoint(key), (), alliance="rare", log="North", owner=[public_of(key)], key=SOUTH
    )
    assert run("witness", "--of", "North", "--out", out_file)[0] == 0
    assert "the head that was witnessed" in run("verify", "--witnessed", out_file)[1]
    code, _, err = run("witness", "--of", "East", "--out", tmp_path / "east.json")
    assert code == 2
    assert "nothing was seen of the log of 'East'" in err
    code, _, err = run("witness", "--of", "North")
    assert code == 2
    assert "--of and --out go together" in err


@pytest.mark.parametrize("action", ["show", "verify"])
def test_the_log_is_found_by_option_home_or_party(run, log, home, tmp_path, action):
    place = home / "site" / "audit.sqlite"
    assert run(action, "--log", place, "--home", tmp_path)[0] == 0
    code, _, err = run(action, "--home", tmp_path)
    assert code == 2
    assert err == f"huizhen: no audit log at '{tmp_path}/site/audit.sqlite': name the file of one\n"
    other = home / "coordinator" / "audit.sqlite"
    AuditLog.create(other, alliance="rare", log="coordinator").shut()
    code, _, err = run(action)
    assert code == 2
    assert err == f"huizhen: '{place}' and '{other}' exist: name one of them\n"
    assert run(action, "--log", other)[0] == 0
    log.shut()
    place.unlink()
    assert "'coordinator'" in run(action)[1] + run(action, "--json")[1]


def test_a_membership_of_another_alliance_is_refused(run, home, membership):
    AuditLog.create(home / "site" / "audit.sqlite", alliance="other", log="North").shut()
    code, _, err = run("verify", "--membership", membership)
    assert code == 2
    assert "membership is of alliance 'rare', the log of 'other'" in err


@pytest.mark.parametrize(
    "words", [["verify", "--key", "12"], ["verify", "--key", "z" * 64], ["show", "--study", "5"]]
)
def test_a_value_in_another_form_shows_the_usage(run, capsys, words):
    with pytest.raises(SystemExit, match="2"):
        run(*words)
    assert "is not a" in capsys.readouterr().err


def test_what_does_not_go_together_shows_the_usage(run, capsys):
    for words in (["--log", "a", "--export", "b"], ["--key", "a" * 64, "--membership", "b"]):
        with pytest.raises(SystemExit, match="2"):
            run("verify", *words)
        assert re.search("not allowed with", capsys.readouterr().err)


@pytest.mark.parametrize("action", ["show", "verify", "export", "witness"])
def test_every_action_has_help_with_examples(run, capsys, action):
    with pytest.raises(SystemExit, match="0"):
        run(action, "--help")
    text = capsys.readouterr().out
    assert f"huizhen audit {action}" in text.split("examples:")[1]
    assert "--json" in text
