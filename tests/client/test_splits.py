"""Whole patients, the same share of each class, and nobody ever changes sides."""

from hypothesis import given
from hypothesis import strategies as st

from huizhen.client.splits import draw

KEY = b"k" * 32
people = st.dictionaries(st.text("0123456789", min_size=1, max_size=4), st.sampled_from("abc"))
shares = st.floats(0, 0.99)


def test_a_share_of_each_class_is_held_out():
    strata = {f"p{i}": "rare" if i % 10 == 0 else "common" for i in range(200)}
    drawn = draw(strata, 0.25, before={}, key=KEY)
    for stratum, wanted in (("rare", 5), ("common", 45)):
        assert sum(drawn[p] for p in strata if strata[p] == stratum) == wanted


def test_halves_go_to_training_and_a_single_patient_too():
    assert draw({"a": ""}, 0.5, before={}, key=KEY) == {"a": False}
    assert sum(draw({"a": "", "b": "", "c": ""}, 0.5, before={}, key=KEY).values()) == 1
    assert draw({"a": ""}, 0.51, before={}, key=KEY) == {"a": True}


def test_many_small_classes_do_not_round_to_nobody():
    strata = {f"p{i}": f"class {i // 2}" for i in range(1000)}
    drawn = draw(strata, 0.2, before={}, key=KEY)
    assert sum(drawn.values()) == 200
    assert max(sum(drawn[f"p{i + j}"] for j in (0, 1)) for i in range(0, 1000, 2)) == 1


def test_who_is_held_out_depends_on_the_key():
    strata = dict.fromkeys((f"p{i}" for i in range(50)), "")
    assert draw(strata, 0.5, before={}, key=KEY) != draw(strata, 0.5, before={}, key=b"j" * 32)


@given(people, people, shares)
def test_nobody_changes_sides_when_patients_come_and_go(first, more, share):
    before = draw(first, share, before={}, key=KEY)
    after = draw(first | more, share, before=before, key=KEY)
    assert all(after[patient] == before[patient] for patient in first)
    fewer = {patient: after[patient] for patient in more}
    assert draw(more, share, before=after, key=KEY) == fewer


@given(people, shares)
def test_all_at_once_are_drawn_alike_in_any_order_and_as_near_to_the_share_as_can_be(some, share):
    drawn = draw(some, share, before={}, key=KEY)
    backwards = dict(reversed(list(some.items())))
    assert draw(backwards, share, before={}, key=KEY) == drawn
    for stratum in set(some.values()):
        group = [patient for patient in some if some[patient] == stratum]
        held = sum(drawn[patient] for patient in group)
        assert abs(held - share * len(group)) < 1 + 1e-9
    assert abs(sum(drawn.values()) - share * len(some)) <= 0.5 + 1e-9


@given(people, people, shares)
def test_new_patients_bring_the_share_back(first, more, share):
    before = dict.fromkeys(first, False)  # as after a share of 0
    after = draw(first | more, share, before=before, key=KEY)
    new = [patient for patient in more if patient not in first]
    for stratum in set(more.values()):
        group = [p for p in first | more if (first | more)[p] == stratum]
        fresh = [p for p in new if more[p] == stratum]
        held = sum(after[p] for p in fresh)
        assert held < share * len(group) + 1 + 1e-9
        if held < len(fresh):
            assert held + 1 + 1e-9 > share * len(group)
