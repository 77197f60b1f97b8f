"""``huizhen privacy plan``: a table for people, JSON for programs, one line for bad input."""

import json
import shlex

import pytest

from huizhen.cli.main import build_parser, main
from huizhen.cli.privacy import EPILOG
from huizhen.protocol.errors import ConfigError, StorageError
from huizhen.protocol.planning import Terms, plan
from huizhen.simulations.experiment import load_experiment
from huizhen.simulations.plan_size import trained_parameters

SMALL = ("--rounds", "3", "--steps", "2", "--parameters", "900")


@pytest.fixture
def planned(capsys):
    """Run the command; return its exit code and what it printed."""

    def planned(*options):
        code = main(["privacy", "plan", *map(str, options)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return planned


@pytest.fixture
def refused(planned):
    """Run the command, expect one line of refusal and return it."""

    def refused(error, *options):
        code, out, err = planned(*options)
        assert (code, out) == (error.exit_code, "")
        assert err.startswith("huizhen: ")
        assert err.count("\n") == 1
        return err

    return refused


def test_a_plan_is_a_table_with_a_verdict_and_advice(planned):
    code, out, err = planned("--patients", "30,250", *SMALL)
    assert (code, err) == (0, "")
    assert "ε = 8 at δ = 1e-05 for each patient; 3 rounds of 2 steps" in out
    lines = out.splitlines()
    assert [line.split()[0] for line in lines if line.endswith(("drowned", "noisy  "))]
    assert any(line.startswith("together") for line in lines)
    assert "site 1 (30 patients): over the study the noise is" in out
    assert "twice the patients" in out


def test_json_has_every_number_and_nothing_else_is_printed(planned):
    code, out, err = planned("--patients", "30,250", *SMALL, "--json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    terms = Terms(
        epsilon=8, delta=1e-5, rounds=3, steps_per_round=2, parameters=900, sampling_rate=0.2
    )
    found = plan({"site 1": 30, "site 2": 250}, terms)
    assert document["schema"] == 1
    assert document["study_ratio"] == found.study_ratio
    assert [site["patients"] for site in document["sites"]] == [30, 250]
    assert document["sites"][0]["noise_multiplier"] == found.sites[0].noise_multiplier
    assert document["epsilon_after"] == [list(point) for point in found.epsilon_after]
    assert {one["lever"] for one in document["advice"]} >= {"rate", "epsilon", "patients"}
    assert document["explanation"][0].startswith("site 1 (30 patients)")


def test_every_option_reaches_the_plan(planned):
    options = ("--epsilon", 3, "--delta", 1e-4, "--rounds", 5, "--steps", 6, "--parameters", 70)
    more = ("--sampling-rate", 0.3, "--batch-cap", 30, "--max-grad-norm", 0.4)
    found = planned("--patients", "30", *options, *more, "--weights", "public", "--json")[1]
    terms = json.loads(found)["terms"]
    assert terms == {
        "epsilon": 3.0,
        "delta": 1e-4,
        "rounds": 5,
        "steps_per_round": 6,
        "parameters": 70,
        "sampling_rate": 0.3,
        "expected_batch": None,
        "batch_cap": 30,
        "max_grad_norm": 0.4,
        "weights": "public",
    }


def test_an_expected_batch_replaces_the_rate(planned):
    out = planned("--patients", "30,250", "--expected-batch", 15, *SMALL, "--json")[1]
    assert [site["sampling_rate"] for site in json.loads(out)["sites"]] == [0.5, 0.06]


def test_sizes_are_repeated_for_more_sites(planned):
    out = planned("--patients", "30,250", "--sites", 6, *SMALL, "--json")[1]
    assert [site["patients"] for site in json.loads(out)["sites"]] == [30, 250] * 3
    table = planned("--patients", "30,250", "--sites", 6, *SMALL)[1].splitlines()
    rows = [line.split() for line in table if line.startswith(("site ", "together"))]
    assert [row[:4] for row in rows if row[0] == "site"][1:3] == [
        ["site", "1", "3", "30"],
        ["site", "2", "3", "250"],
    ]
    assert rows[3][:2] == ["together", "6"]


def test_a_table_says_what_is_spent_after_some_rounds(planned):
    options = ("--patients", "30,250,250", "--rounds", 8, "--steps", 2)
    alike = planned(*options)[1].splitlines()
    [names] = [line.split() for line in alike if line.startswith("sites of size")]
    assert names[3:] == ["round", "1", "round", "2", "round", "4", "round", "6", "round", "8"]
    [spent] = [line.split() for line in alike if line.startswith("every size")]
    document = json.loads(planned(*options, "--json")[1])
    assert spent[2:] == [f"{e:.3g}" for _, e in document["epsilon_of_sites"]["site 1"]]
    assert spent[-1] in ("8", "7.99", "8.00")
    own = planned(*options, "--expected-batch", 15)[1].splitlines()
    table = own[next(i for i, line in enumerate(own) if line.startswith("sites of size")) :]
    rows = [line.split() for line in table[1:3]]
    assert [row[0] for row in rows] == ["30", "250"]
    assert float(rows[0][1]) < float(rows[1][1])


def test_a_study_gives_the_terms_and_options_win(planned, experiment_file):
    path = experiment_file(("epsilon = 8.0", "epsilon = 5.0"))
    given = ("--patients", "30", "--parameters", 70, "--json")
    terms = json.loads(planned(path, *given)[1])["terms"]
    assert (terms["epsilon"], terms["delta"], terms["sampling_rate"]) == (5.0, 1e-3, 0.5)
    assert (terms["rounds"], terms["steps_per_round"], terms["parameters"]) == (2, 2, 70)
    terms = json.loads(planned(path, *given, "--epsilon", 2)[1])["terms"]
    assert (terms["epsilon"], terms["sampling_rate"]) == (2.0, 0.5)


def test_a_study_gives_the_number_of_trained_parameters(planned, experiment_file, home):
    path = experiment_file()
    options = ("--patients", "30", "--home", home, "--json")
    found = json.loads(planned(path, *options)[1])["terms"]["parameters"]
    assert found == trained_parameters(load_experiment(path), home)
    given = planned(path, *options, "--parameters", 70)[1]
    assert json.loads(given)["terms"]["parameters"] == 70


def test_what_can_be_refused_is_refused_before_the_base_is_loaded(
    refused, experiment_file, tmp_path
):
    path = experiment_file(('name = "tiny"\n[adapter]', 'name = "gone"\n[adapter]'))
    options = (path, "--patients", "30", "--home", tmp_path)
    assert "rounds is 0" in refused(ConfigError, *options, "--rounds", 0)
    assert "base 'gone' is not in the catalogue" in refused(ConfigError, *options)


def test_a_study_with_sites_needs_no_sizes(planned, experiment_file):
    path = experiment_file(
        ("[simulation]", "[sites]\nNorth = {patients_public = 60}\n[simulation]")
    )
    document = json.loads(planned(path, *SMALL, "--json")[1])
    assert [(s["name"], s["patients"]) for s in document["sites"]] == [("North", 60)]


def test_the_unit_of_the_study_is_named(planned, experiment_file):
    path = experiment_file(('unit = "patient"', 'unit = "record"'))
    out = planned(path, "--patients", "30", *SMALL)[1]
    assert "for each record" in out
    assert "records" in out


def test_the_picture_is_written_where_asked(planned, tmp_path):
    code, out, _ = planned("--patients", "30", *SMALL, "--out", tmp_path / "plan.png")
    assert code == 0
    assert f"picture: {tmp_path / 'plan.png'}" in out
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ((), "--patients is needed, such as --patients 40,200,1200"),
        (("--patients", "30", "--epsilon", "0"), "epsilon is 0.0, expected more than 0"),
        (("--patients", "30", "--epsilon", "nan"), "epsilon is nan"),
        (("--patients", "30", "--delta", "0.05"), "delta is 0.05, site 1 has 30 patients"),
        (("--patients", "30", "--sampling-rate", "1.5"), "sampling_rate is 1.5"),
        (("--patients", "30", "--rounds", "0"), "rounds is 0"),
        (("--patients", "30", "--steps", "-1"), "steps_per_round is -1"),
        (("--patients", "30", "--parameters", "0"), "parameters is 0"),
        (("--patients", "30", "--batch-cap", "15"), "batch_cap is 15, site 1 has 30 patients"),
        (("--patients", "30", "--batch-cap", "0"), "batch_cap is 0"),
        (("--patients", "30", "--max-grad-norm", "0"), "max_grad_norm is 0.0"),
        (("--patients", "30,40", "--sites", "3"), "--sites is 3, expected a multiple of the 2"),
        (("--patients", "30,40", "--sites", "0"), "--sites is 0"),
        (("--patients", "30", "--epsilon", "1e-7"), "no noise up to 10000 gives epsilon 1e-07"),
        (("no-such.toml", "--patients", "30"), "cannot read 'no-such.toml'"),
        (("--patients", "30", *SMALL, "--out", "plan.gif"), "expected a name in .png, .svg, .pdf"),
    ],
)
def test_bad_input_is_one_line(refused, options, line):
    assert line in refused(ConfigError, *options)


def test_a_study_without_sites_asks_for_sizes(refused, experiment_file):
    path = experiment_file()
    line = refused(ConfigError, path)
    assert f"{path.name} has no [sites]: --patients is needed" in line


def test_a_study_without_privacy_is_refused(refused, experiment_file):
    path = experiment_file(
        ('unit = "patient"', 'unit = "none"'),
        ('site = "hospital"', 'site = "hospital"\narms = ["federated"]'),
    )
    assert "unit is 'none'" in refused(ConfigError, path, "--patients", "30")


def test_sites_without_sizes_are_refused(refused, experiment_file):
    path = experiment_file(
        ("[simulation]", "[sites]\nNorth = {patients_public = 60}\n[simulation]")
    )
    assert "--sites is given without --patients" in refused(ConfigError, path, "--sites", 4)


def test_a_picture_that_cannot_be_written_is_one_line(refused, tmp_path):
    where = tmp_path / "nowhere" / "plan.png"
    assert "cannot write" in refused(StorageError, "--patients", "30", *SMALL, "--out", where)


@pytest.mark.parametrize(
    "options",
    [
        ("--patients", "thirty"),
        ("--patients", "30,,40"),
        ("--patients", "0"),
        ("--patients", "30", "--sampling-rate", "0.2", "--expected-batch", "6"),
        ("--patients", "30", "--weights", "heavy"),
    ],
)
def test_a_wrong_option_shows_the_usage(options, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["privacy", "plan", *options])
    assert caught.value.code == 2
    assert "usage: huizhen privacy plan" in capsys.readouterr().err


def test_the_examples_of_the_help_parse():
    lines = EPILOG.replace("\\\n", "").split("\n\n")[0].splitlines()[1:]
    calls = [shlex.split(line.split("     ")[0]) for line in lines]
    assert len(calls) == 5
    for program, *arguments in calls:
        assert program == "huizhen"
        assert build_parser().parse_args(arguments).action == "plan"


@pytest.mark.parametrize("words", [["privacy"], ["privacy", "plan"]])
def test_the_help_explains(words, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*words, "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "plan" in out
    assert ("huizhen privacy plan --patients 40,200,1200" in out) == (len(words) == 2)
