"""The robustness benchmark lies as it says, and its plan is whole."""

import numpy as np
import pytest

from huizhen.benchmarks import robustness
from huizhen.benchmarks.robustness import ATTACKS, RULES, SEEDS, Unit, key_of, lie, study_of, table
from huizhen.server.validation import update_norm
from huizhen.strategies.robust import rule_of


def f32(values):
    return np.array(values, np.float32)


UPDATE = {"l.lora_B": f32([[1, -2]]), "head.bias": f32([2])}
DRIFT = {"l.lora_B": f32([[0, 6]]), "head.bias": f32([8])}


def flat(tensors):
    return [*tensors["l.lora_B"][0].tolist(), *tensors["head.bias"].tolist()]


def test_the_lies_by_hand():
    assert flat(lie("sign flip", UPDATE, DRIFT)) == [-1, 2, -2]
    assert flat(lie("x 100", UPDATE, DRIFT)) == [100, -200, 200]
    assert flat(lie("slow drift", UPDATE, DRIFT)) == pytest.approx([1, -2 + 1.8, 2 + 2.4])
    for honest in ("none", "NaN", "label flip"):  # these lie in the bytes, or in the labels
        assert lie(honest, UPDATE, DRIFT) is UPDATE
    away = {n: lie("slow drift", UPDATE, DRIFT)[n] - UPDATE[n] for n in UPDATE}
    assert update_norm(away) == pytest.approx(update_norm(UPDATE))


def test_every_rule_meets_every_lie_and_the_honest_mean_comes_first():
    found = robustness.units()
    assert len(found) == len({unit.key for unit in found}) == len(RULES) * len(ATTACKS) * len(SEEDS)
    assert found[0] == Unit("mean", "none", SEEDS[0])
    for rule in RULES:
        combine = rule.split(",")[0]
        if combine != "mean":
            rule_of(combine, 1, 1.0)


def test_bound_and_radius_are_those_of_honest_updates(make_study):
    study = make_study(sites={name: {"patients_public": 9} for name in "CDEF"})
    plain = study_of(study, Unit("mean", "none", 2), None)
    assert plain.rounds.max_update_norm == 1e4
    assert (plain.study.seed, plain.quorum, plain.privacy.unit) == (2, 5, "none")
    assert study_of(study, Unit("mean, norm bound", "none", 1), 3.0).rounds.max_update_norm == 6.0
    clipped = study_of(study, Unit("centred_clipping", "none", 1), 3.0)
    assert (clipped.strategy.combine, clipped.strategy.clip_radius) == ("centred_clipping", 3.0)
    assert study_of(study, Unit("multi_krum", "none", 1), 3.0).strategy.byzantine == 1


def test_the_table_has_means_and_deviations_of_what_is_there():
    results = [
        {"rule": "mean", "attack": "none", "seed": seed, "metrics": {"macro_f1": value}}
        for seed, value in ((1, 0.5), (2, 0.7))
    ]
    rows = table({key_of(one): one for one in results})
    assert rows[0] == ["rule", *ATTACKS]
    assert rows[1][:3] == ["mean", "0.600 ± 0.141", "-"]
