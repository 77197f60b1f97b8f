"""Bad input of ``huizhen simulate`` gets one clear line and an exit code, and loses nothing."""

import gzip
import json
import shutil

import pytest
import torch

from huizhen.cli.main import main
from huizhen.protocol.errors import (
    ConfigError,
    GovernanceError,
    HuizhenError,
    PrivacyError,
    StorageError,
)

FEDERATED = ('site = "hospital"', 'site = "hospital"\narms = ["federated"]')


@pytest.fixture
def simulate(home, tmp_path, capsys):
    """Run the command; return its exit code and what it printed."""

    def simulate(path, *options, out="run"):
        threads = torch.get_num_threads()
        where = ["--out", str(tmp_path / out), "--home", str(home)]
        try:
            code = main(["simulate", str(path), *where, *options])
        finally:
            torch.set_num_threads(threads)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return simulate


@pytest.fixture
def refused(simulate):
    """Run the command, expect one line of refusal and return it."""

    def refused(error: type[HuizhenError], path, *options, out="run"):
        code, printed, err = simulate(path, *options, out=out)
        assert code == error.exit_code != 0
        assert printed == ""
        lines = [line for line in err.splitlines() if not line.startswith("reading ")]
        assert len(lines) == 1, err
        assert lines[0].startswith("huizhen: ")
        assert "Traceback" not in err
        assert "SECRET" not in err
        return lines[0]

    return refused


def test_a_run_prints_its_table_and_leaves_its_files(simulate, experiment_file, tmp_path):
    code, out, err = simulate(experiment_file(FEDERATED))
    assert code == 0
    assert "report.html" in out
    assert "federated-1: round 2/2" in err
    for name in ("report.html", "results.json", "federated/adapter_config.json"):
        assert (tmp_path / "run" / name).stat().st_size > 0


def test_json_is_all_that_is_printed_when_asked_for(simulate, experiment_file, tmp_path):
    code, out, err = simulate(experiment_file(FEDERATED), "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == json.loads((tmp_path / "run" / "results.json").read_text())


@pytest.mark.parametrize(
    ("old", "new", "error", "line"),
    [
        ("sampling_rate", "sampling_rat", ConfigError, "did you mean 'sampling_rate'"),
        ('name = "tiny"\n[adapter]', 'name = "tinny"\n[adapter]', ConfigError, "tin"),
        ("rank = 2", "rank = 17", ConfigError, "rank is 17"),
        ("rank = 2", "rank = 0", ConfigError, "rank is 0"),
        ('"q_proj", "v_proj"', '"query"', ConfigError, "'query'"),
        ("epsilon = 8.0", "epsilon = 0.0", ConfigError, "epsilon is 0.0"),
        ("epsilon = 8.0", "epsilon = -3", ConfigError, "epsilon is -3"),
        ("epsilon = 8.0", "epsilon = nan", ConfigError, "epsilon is nan"),
        ("delta = 1e-3", "delta = 0.12", ConfigError, "delta is 0.12, site 'North' has about 9"),
        ("delta = 1e-3", "delta = 0", ConfigError, "delta is 0"),
        ("count = 2", "count = 0", ConfigError, "count is 0"),
        ('text = "{text}"', 'text = "{free}"', ConfigError, "reads the field 'free'"),
        ('label = "disease"', 'label = "illness"', ConfigError, "'illness'"),
        ('site = "hospital"', 'site = "clinic"', ConfigError, "'clinic'"),
        ('patient = "id"', 'patient = "nhs"', GovernanceError, "no patient id in 'nhs'"),
        ("[rounds]", '[strategy]\nname = "fedavgg"\n[rounds]', ConfigError, "mean 'fedavg'"),
        ('patient = "id"', 'patient = "id"\nencoding = "klingon"', ConfigError, "'klingon'"),
    ],
)
def test_a_wrong_setting_is_one_line(refused, experiment_file, old, new, error, line):
    assert line in refused(error, experiment_file((old, new)))


@pytest.mark.parametrize(
    ("change", "error", "line"),
    [
        ({"id": None}, GovernanceError, "records.jsonl:2: record has no patient id"),
        ({"id": ""}, GovernanceError, "records.jsonl:2: record has no patient id"),
        ({"text": ""}, GovernanceError, "records.jsonl:2: text is empty"),
        ({"text": None}, GovernanceError, "records.jsonl:2: text is empty"),
        ({"disease": None}, GovernanceError, "records.jsonl:2: 'disease' is empty"),
        ({"disease": ""}, GovernanceError, "records.jsonl:2: 'disease' is empty"),
        ({"hospital": None}, ConfigError, "records.jsonl:2: there is no site"),
        ({"split": "SECRET"}, ConfigError, "records.jsonl:2: 'split' is neither"),
        ({"hospital": "West"}, GovernanceError, "site 'West' has 1 training patient"),
        ({"hospital": "West", "split": "test"}, GovernanceError, "site 'West' has 0 training"),
        ({"split": "test"}, GovernanceError, "in training and in test"),
    ],
)
def test_a_wrong_record_is_one_line(refused, experiment_file, cohort, change, error, line):
    records = [one | {"note": "SECRET"} for one in cohort()]
    records[1] |= change
    assert line in refused(error, experiment_file(records=records))


@pytest.mark.parametrize(
    ("raw", "name", "line"),
    [
        ("Fièvre, céphalée\n".encode("latin-1"), "a.jsonl", "neither UTF-8 nor UTF-16 nor GB18030"),
        (b"", "a.jsonl", "holds no records"),
        (b"", "a.csv", "holds no records"),
        (b"SECRET\n", "a.jsonl", "a.jsonl:1: line is not JSON"),
        (b"SECRET\n", "a.jsonl.gz", "is not gzip"),
        (gzip.compress(b"SECRET" * 999)[:-4], "a.jsonl.gz", "a.jsonl.gz"),
        (b"id,text\nSECRET,x,y\n", "a.csv", "a.csv:2: row has 3 columns, the header 2"),
        (b"SECRET", "a.xlsx", "expected a file that ends in"),
    ],
    ids=[
        "latin-1",
        "no lines",
        "no rows",
        "text",
        "no gzip",
        "cut gzip",
        "ragged",
        "xlsx",
    ],
)
def test_a_wrong_file_is_one_line(simulate, experiment_file, raw, name, line):
    code, out, err = simulate(experiment_file(raw=raw, name=name))
    assert code in (ConfigError.exit_code, GovernanceError.exit_code)
    assert out == ""
    assert line in err
    assert len(err.splitlines()) == 1
    assert "SECRET" not in err


@pytest.mark.parametrize("is_named", [True, False])
def test_a_gb18030_file_runs_whether_its_encoding_is_named_or_not(
    simulate, experiment_file, cohort, is_named
):
    lines = [
        json.dumps(one | {"text": f"发热 {one['text']}"}, ensure_ascii=False) for one in cohort()
    ]
    raw = "\n".join(lines).encode("gb18030")
    named = ('patient = "id"', 'patient = "id"\nencoding = "gb18030"')
    changes = (named,) if is_named else ()
    assert simulate(experiment_file(FEDERATED, *changes, raw=raw))[0] == 0


@pytest.mark.parametrize("missing", ["experiment", "data"])
def test_a_missing_file_is_one_line(refused, experiment_file, tmp_path, missing):
    path = experiment_file()
    (path if missing == "experiment" else tmp_path / "records.jsonl").unlink()
    assert "cannot read" in refused(ConfigError, path)


def test_a_base_folder_with_a_pickle_is_refused(refused, experiment_file, tiny, tmp_path):
    shutil.copytree(tiny.folder, tmp_path / "base")
    (tmp_path / "base" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    path = experiment_file(('name = "tiny"\n[adapter]', f'name = "{tmp_path}/base"\n[adapter]'))
    assert "pytorch_model.bin" in refused(ConfigError, path)


def test_a_base_with_another_digest_than_agreed_is_refused(
    refused, experiment_file, tiny, tmp_path
):
    shutil.copytree(tiny.folder, tmp_path / "base")
    digests = "\n".join(f'"{name}" = "{value}"' for name, value in tiny.digests.items())
    named = f'name = "{tmp_path}/base"\n[base.digests]\n{digests}\n[adapter]'
    path = experiment_file(('name = "tiny"\n[adapter]', named))
    weights = tmp_path / "base" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert "'model.safetensors' has digest" in refused(ConfigError, path)


def test_a_delta_not_below_one_over_the_true_patients_is_refused(refused, experiment_file):
    lies = "[sites.North]\npatients_public = 2\n[sites.South]\npatients_public = 2\n"
    private = ('site = "hospital"', 'site = "hospital"\narms = ["federated_dp"]')
    path = experiment_file(("delta = 1e-3", "delta = 0.2"), private, more=lies)
    assert "not below one over the patients" in refused(PrivacyError, path)


def test_a_folder_of_another_study_is_refused_and_keeps_its_results(
    simulate, refused, experiment_file, tmp_path
):
    simulate(experiment_file(FEDERATED))
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    other = experiment_file(FEDERATED, ("learning_rate = 1e-2", "learning_rate = 2e-2"))
    for options in ([], ["--resume"]):
        line = refused(ConfigError, other, *options)
        assert "belongs to another run (other study)" in line
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


def test_other_records_are_another_run(simulate, refused, experiment_file, cohort):
    simulate(experiment_file(FEDERATED))
    path = experiment_file(FEDERATED, records=[*cohort(), cohort()[0]])
    assert "(other data)" in refused(ConfigError, path, "--resume")


def test_an_existing_run_is_refused_without_resume(simulate, refused, experiment_file):
    path = experiment_file(FEDERATED)
    simulate(path)
    assert "add --resume" in refused(ConfigError, path)
    assert simulate(path, "--resume")[0] == 0


def test_a_file_in_the_place_of_the_out_folder_is_refused(refused, experiment_file, tmp_path):
    (tmp_path / "run").write_text("mine")
    assert "cannot write" in refused(StorageError, experiment_file())
    assert (tmp_path / "run").read_text() == "mine"


@pytest.mark.parametrize("threads", ["0", "-2"])
def test_a_number_of_threads_below_one_is_refused(refused, experiment_file, threads):
    assert "expected at least 1" in refused(ConfigError, experiment_file(), "--threads", threads)
