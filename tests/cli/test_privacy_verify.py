"""``huizhen privacy verify``: a certificate that holds, one that does not, and what is no such."""

import json

import pytest
import rfc8785

from huizhen.cli.main import main
from huizhen.protocol.certificate import parse_certificate
from huizhen.server.certificate import issue


@pytest.fixture(scope="module")
def issued(make_study):
    study = make_study(study={"name": "rare"}, privacy={"delta": 1e-5}, rounds={"count": 3})
    return issue(study, issued="2026-11-22")


@pytest.fixture
def verified(tmp_path, capsys):
    """Write bytes and verify them; return the exit code and what was printed."""

    def verified(data, *options):
        path = tmp_path / "privacy.json"
        path.write_bytes(data)
        code = main(["privacy", "verify", str(path), *options])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return verified


def test_a_certificate_that_holds_is_told_in_words(verified, issued):
    code, out, err = verified(issued.canonical())
    assert (code, err) == (0, "")
    assert f"study 'rare', digest {issued.digest}" in out
    assert f"epsilon is at most {issued.epsilon:.4g} at delta 1e-05 for each patient" in out
    sigma = issued.mechanism.per_round.noise_multiplier
    assert f"site 'A': epsilon {issued.epsilon:.4g} after 3 rounds, 6 steps of noise {sigma:g}" in (
        out
    )
    assert "delta 1e-05 is below one over the 8 patients of the largest site" in out
    assert "ledgers, 0 of 2: none states less" in out
    assert "attacks at 18 false positive rates" in out
    assert "not checked:" in out
    assert f"SHA-256 {issued.fingerprint()}" in out


def test_json_says_that_it_holds(verified, issued):
    code, out, err = verified(issued.canonical(), "--json")
    document = json.loads(out)
    assert (code, err, document["holds"]) == (0, "", True)
    assert document["sha256"] == issued.fingerprint()
    assert document["epsilon_by_site"] == {"A": issued.epsilon, "B": issued.epsilon}
    assert len(document["checked"]) == 5
    assert document["not_checked"]


def better(issued):
    """Return the bytes of a certificate that states a tenth less than was spent."""
    table = json.loads(issued.canonical())
    for site in table["sites"]:
        site["epsilon"] *= 0.9
    table["epsilon"] *= 0.9
    data = rfc8785.dumps(table)
    parse_certificate(data)  # its form is right
    return data


def test_a_certificate_that_is_too_good_is_one_line(verified, issued):
    code, out, err = verified(better(issued))
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("huizhen: privacy.json does not hold: epsilon of site 'A' is stated as ")


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff", b"[]"])
def test_what_is_no_certificate_is_one_line(verified, data):
    code, out, err = verified(data)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("huizhen: privacy.json does not hold: certificate ")


def test_json_says_that_it_does_not_hold(verified, issued):
    code, out, err = verified(better(issued), "--json")
    document = json.loads(out)
    assert (code, document["holds"]) == (1, False)
    assert document["reason"] in err


def test_a_file_that_is_not_there_is_one_line(capsys, tmp_path):
    assert main(["privacy", "verify", str(tmp_path / "none.json")]) == 2
    assert capsys.readouterr().err.startswith("huizhen: cannot read")


def test_the_help_explains(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["privacy", "verify", "--help"])
    assert "huizhen privacy verify runs/fed6/privacy.json" in capsys.readouterr().out
