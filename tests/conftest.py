"""Small made-up data and the base ``tiny``, for everything that trains."""

import dataclasses
import json
import signal
import tomllib

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from huizhen.client.examples import make_examples, make_held_out
from huizhen.client.governance import SitePolicy, admit
from huizhen.client.records.record import Record
from huizhen.client.selection import select
from huizhen.learning.bases import resolve
from huizhen.learning.model import AdaptedModel
from huizhen.learning.tasks import fields_read
from huizhen.protocol.study import parse_study

# A shell starts what is in its background with Ctrl-C ignored, and every child inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# How fast a test is says nothing here: speed is measured in benchmarks/.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

WORDS = {
    "asthma": ["cough", "wheeze", "dyspnoea"],
    "epilepsy": ["seizure", "tremor", "ataxia"],
    "measles": ["fever", "rash", "conjunctivitis"],
}

EXPERIMENT = """
[study]
name = "tiny"
[base]
name = "tiny"
[adapter]
rank = 2
alpha = 4
target_modules = ["q_proj", "v_proj"]
[task]
kind = "classification"
text = "{text}"
label = "disease"
max_tokens = 48
[privacy]
unit = "patient"
epsilon = 8.0
delta = 1e-3
sampling_rate = 0.5
[rounds]
count = 2
local_steps = 2
batch_size = 8
learning_rate = 1e-2
[simulation]
data = "records.jsonl"
site = "hospital"
patient = "id"
generate = 1
exact_match_records = 2
"""


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Small tensors gain nothing by more, and runs beside each other lose much."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A home for base models that holds ``tiny``."""
    path = tmp_path_factory.mktemp("home")
    resolve("tiny", home=path)
    return path


@pytest.fixture(scope="session")
def tiny(home):
    return resolve("tiny", home=home)


@pytest.fixture(scope="session")
def minilm():
    return resolve("minilm")


@pytest.fixture(scope="session")
def make_study():
    """Return a study of sites A and B; sections are updated by keyword arguments."""

    def make(kind="classification", **sections):
        tables = tomllib.loads(EXPERIMENT)
        del tables["simulation"]
        if kind == "classification":
            tables["task"]["labels"] = sorted(WORDS)
        else:
            tables["task"] = {"kind": kind, "text": "{text}", "answer": "{disease}"}
            tables["task"]["max_tokens"] = 96
        tables["sites"] = {"A": {"patients_public": 8}, "B": {"patients_public": 8}}
        for name, values in sections.items():
            tables[name] = {**tables.get(name, {}), **values}
        return parse_study(tables, "test")

    return make


@pytest.fixture(scope="session")
def make_parts():
    """Return a site's records as examples, and the held-out ones, by the way of a hospital's."""

    def make(model, rows, held_out):
        records = [
            Record(patient, {"text": text, "disease": disease, "id": patient}, f"rows:{i}")
            for i, (patient, text, disease) in enumerate([*rows, *held_out], 1)
        ]
        policy = SitePolicy(site="A", minimum_patients=1)
        admitted = admit(records[: len(rows)], policy, held_out=records[len(rows) :])
        clean = select(admitted, fields_read(model.study.task))
        encoder = model.encoder()
        return make_examples(clean, encoder, model), make_held_out(clean, encoder, model)

    return make


@pytest.fixture(scope="session")
def make_site(make_parts):
    """Return a site's records as examples, none held out."""
    return lambda model, rows: make_parts(model, rows, [])[0]


@pytest.fixture(scope="session")
def rows():
    """Eight patients of one to four records of different lengths."""
    generator = np.random.default_rng(11)
    found = []
    for patient in range(8):
        disease = sorted(WORDS)[patient % 3]
        for _ in range(1 + patient % 4):
            words = generator.choice(WORDS[disease], generator.integers(1, 6))
            found.append((f"p{patient}", " ".join(words), disease))
    return found


@pytest.fixture
def randomised():
    """Load an adapter whose every tensor is random, so that each has a gradient."""

    def load(model, seed=5, scale=0.3):
        generator = np.random.default_rng(seed)
        tensors = {
            name: scale * generator.standard_normal(shape).astype(np.float32)
            for name, shape in model.shapes.items()
        }
        model.load(tensors)
        return tensors

    return load


@pytest.fixture(scope="session")
def loaded():
    """Return models that are loaded once; each call puts the study's first adapter in."""
    models: dict[str, AdaptedModel] = {}

    def load(name, base, study):
        if name not in models:
            models[name] = AdaptedModel(base, study)
        models[name].load(models[name].first_tensors(0))
        return models[name]

    return load


@pytest.fixture
def tiny_classifier(tiny, make_study, loaded):
    return loaded("classifier", tiny, make_study())


@pytest.fixture
def tiny_assistant(tiny, make_study, loaded):
    return loaded("assistant", tiny, make_study("instruction"))


@pytest.fixture
def minilm_classifier(minilm, make_study, loaded):
    """An encoder whose last layer alone is adapted, so that the rest is computed once."""
    terms = {"layers": 1, "target_modules": ["query", "key", "value", "dense"]}
    return loaded("encoder", minilm, make_study(adapter=terms, base={"name": "minilm"}))


@pytest.fixture
def with_terms():
    """Return a copy of a study with values of its sections replaced."""

    def replace(study, /, **sections):
        values = {
            name: dataclasses.replace(getattr(study, name), **terms)
            for name, terms in sections.items()
        }
        return dataclasses.replace(study, **values)

    return replace


@pytest.fixture(scope="session")
def cohort():
    """Return the records of two made-up hospitals as an export has them."""

    def make(patients=9, test=3):
        generator = np.random.default_rng(7)
        found = []
        for hospital in ("North", "South"):
            for number in range(patients + test):
                disease = sorted(WORDS)[number % 3]
                for _ in range(1 + number % 2):
                    found.append(
                        {
                            "id": f"{hospital}-{number}",
                            "hospital": hospital,
                            "split": "train" if number < patients else "test",
                            "text": " ".join(generator.choice(WORDS[disease], 3)),
                            "disease": disease,
                        }
                    )
        return found

    return make


@pytest.fixture
def experiment_file(tmp_path, cohort):
    """Write an experiment and its records; return the file.

    ``changes`` are pairs of a line's beginning and the line that replaces it.
    """

    def write(*changes, records=None, raw=None, name="records.jsonl", more=""):
        data = tmp_path / name
        if raw is None:
            lines = [json.dumps(one, ensure_ascii=False) for one in records or cohort()]
            raw = "".join(f"{line}\n" for line in lines).encode()
        data.write_bytes(raw)
        text = EXPERIMENT.replace('"records.jsonl"', f'"{data}"')
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / "experiment.toml"
        path.write_text(text + more, encoding="utf-8")
        return path

    return write
