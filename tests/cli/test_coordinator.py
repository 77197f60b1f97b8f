"""A coordinator from its first day, over the command line; nothing here needs a network."""

import json

import pytest

from huizhen.cli.main import main
from huizhen.protocol.documents import public_of
from huizhen.storage.keys import load_key, make_key


@pytest.fixture
def run(tmp_path, capsys):
    def run(*words):
        capsys.readouterr()
        code = main(["coordinator", *words, "--home", str(tmp_path / "c"), "--json"])
        out, err = capsys.readouterr()
        return (json.loads(out) if out.strip() else None), err, code

    return run


@pytest.fixture
def board(tmp_path):
    """Two people with keys of their own."""
    for name in ("wang", "li"):
        make_key(tmp_path / "people" / f"{name}.pem")
    return tmp_path / "people"


def found(run, *more):
    return run("init", "--alliance", "East", "--name", "127.0.0.1", "--port", "30100", *more)


def test_a_new_coordinator_has_a_membership_without_members(run):
    value, _, code = found(run)
    assert (code, value["waiting"]) == (0, "")
    assert run("sites")[0]["sites"] == []
    assert run("status")[0]["studies"] == []


def test_a_folder_is_made_once(run):
    found(run)
    _, err, code = found(run)
    assert code == 2
    assert "holds a coordinator already" in err


def test_an_invitation_is_a_private_file_and_its_token_is_shown_nowhere(run, tmp_path):
    found(run)
    out = tmp_path / "north.invitation"
    value, err, code = run("invite", "North", "--out", str(out))
    assert code == 0
    assert out.stat().st_mode & 0o777 == 0o600
    token = json.loads(out.read_bytes())["token"]
    assert token not in json.dumps(value) + err
    assert run("invite", "North", "--out", str(out))[2] == 2  # no file is written over


def test_a_board_of_two_signs_the_first_membership(run, board, tmp_path):
    keys = [public_of(load_key(board / f"{name}.pem")).raw.hex() for name in ("wang", "li")]
    value, _, code = found(run, "--board", keys[0], "--board", keys[1], "--threshold", "2")
    assert code == 0
    assert "waits for 2 of the board" in value["waiting"]
    [draft] = (tmp_path / "c" / "coordinator" / "board").glob("membership-1-*.json")
    assert run("approve", str(draft))[2] == 5  # nobody has signed
    assert run("approve", str(draft), "--key", str(board / "wang.pem"))[2] == 0
    assert run("approve", str(draft))[2] == 5  # one has
    assert run("approve", str(draft), "--key", str(board / "wang.pem"))[2] == 0
    assert run("approve", str(draft))[2] == 5  # the same one, twice
    assert run("approve", str(draft), "--key", str(board / "li.pem"))[2] == 0
    value, _, code = run("approve", str(draft))
    assert (code, value["membership"]) == (0, 1)
    assert not draft.exists()


def test_a_wrong_port_or_threshold_is_refused_before_anything_is_made(run, tmp_path):
    assert found(run, "--threshold", "2")[2] == 2
    assert not (tmp_path / "c" / "coordinator" / "coordinator.toml").exists()
    assert found(run)[2] == 0


def test_the_doctor_finds_that_it_does_not_run(run):
    found(run)
    value, _, code = run("doctor")
    states = {one["name"]: one["state"] for one in value["findings"]}
    assert code == 0
    assert states["running"] == states["edge"] == "warning"
    assert states["audit"] == states["members"] == "ok"
