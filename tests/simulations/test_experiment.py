"""An experiment file is parsed strictly: what is misspelt or impossible is named."""

import pytest

from huizhen.protocol.errors import ConfigError
from huizhen.simulations.experiment import ARMS, SplitTerms, load_experiment


def test_a_file_gives_its_study_and_its_simulation(experiment_file):
    experiment = load_experiment(experiment_file())
    assert experiment.study.adapter is not None
    assert experiment.study.adapter.target_modules == ("q_proj", "v_proj")
    assert experiment.simulation.arms == ARMS
    assert experiment.simulation.site == "hospital"
    assert experiment.simulation.seeds == (1,)


def test_the_simulation_is_no_part_of_the_studys_digest(experiment_file):
    one = load_experiment(experiment_file())
    other = load_experiment(experiment_file(('site = "hospital"', 'site = "clinic"\nseeds = [4]')))
    assert one.study.digest() == other.study.digest()


def test_a_split_and_a_partition_may_be_drawn(experiment_file):
    drawn = 'partition = {kind = "dirichlet", alpha = 0.3, sites = 6}\nsplit = {by = "pmid"}'
    terms = load_experiment(experiment_file(('site = "hospital"', drawn))).simulation
    assert terms.split == SplitTerms(by="pmid", test=0.3)
    assert terms.partition is not None
    assert (terms.partition.sites, terms.site) == (6, None)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ('patient = "id"', 'patiant = "id"', r"\[simulation\].*'patiant': did you mean 'patient'"),
        ('patient = "id"', "", r"\[simulation\] has no 'patient'"),
        ("local_steps", "local_step", r"\[rounds\].*'local_step': did you mean 'local_steps'"),
        ("[privacy]", "[privcy]", "'privcy': did you mean 'privacy'"),
        ("[simulation]", "[simulate]", "'simulate': did you mean 'simulation'"),
        ("epsilon = 8.0", "epsilon = 0", r"\[privacy\] epsilon is 0"),
        ("epsilon = 8.0", "epsilon = -1.0", r"\[privacy\] epsilon is -1"),
        ("epsilon = 8.0", 'epsilon = "8"', r"\[privacy\] epsilon is '8', expected a number"),
        ("delta = 1e-3", "delta = 1.0", r"\[privacy\] delta is 1"),
        ('site = "hospital"', "", "needs either 'site' or 'partition'"),
        ('site = "hospital"', 'site = "h"\narms = ["local", "lokal"]', "'lokal', expected one of"),
        ('site = "hospital"', 'site = "h"\narms = []', "at least one arm"),
        ('site = "hospital"', 'site = "h"\nseeds = []', "one seed"),
        ('site = "hospital"', 'site = "h"\nseeds = [1, 1]', "repeats"),
        ('site = "hospital"', 'site = "h"\nsplit = {by = "x", tset = 0.3}', "'tset': did you mean"),
        ('site = "hospital"', 'site = "h"\nsplit = {by = "x", test = 1.0}', "test is 1.0"),
        ('site = "hospital"', 'site = "h"\nseeds = [2, -1]', r"seeds is \(2, -1\), expected 0"),
        ('site = "hospital"', 'site = "h"\nsplit = {by = "x", seed = -1}', "seed is -1"),
        (
            'site = "hospital"',
            'partition = {kind = "dirichlet", alpha = 1, sites = 2, seed = -1}',
            "seed is -1",
        ),
        ('site = "hospital"', 'site = {field = "x", below = [nan]}', "below is"),
        ('site = "hospital"', 'site = {field = "x", below = [1, inf]}', "below is"),
        ('text = "{text}"', 'text = "hello"', r"\[task\] text is 'hello', expected a field"),
        ('site = "hospital"', 'site = "h"\nevaluate_every = 0', "at least 1"),
        ('site = "hospital"', 'site = "h"\nsweep_patients = [1.5]', "between 0 and 1"),
        ('site = "hospital"', 'partition = {kind = "iid", alpha = 1, sites = 2}', "'iid'"),
        ('site = "hospital"', 'partition = {kind = "dirichlet", alpha = 0, sites = 2}', "alpha is"),
        ('unit = "patient"', 'unit = "none"', "unit is 'none', the arm federated_dp needs"),
        ('text = "{text}"', 'text = "{text.x}"', r"\[task\] text holds"),
        ("seeds", "seeds = ", "is not TOML"),
    ],
)
def test_what_is_misspelt_or_impossible_is_named(experiment_file, old, new, problem):
    path = experiment_file((old, new)) if old != "seeds" else experiment_file(more="seeds = \n")
    with pytest.raises(ConfigError, match=problem) as caught:
        load_experiment(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read .*none.toml"):
        load_experiment(tmp_path / "none.toml")
