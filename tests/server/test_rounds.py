"""Rounds as a state machine: whoever lies is refused with a code, and the round goes on."""

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from huizhen.protocol.adapter import shapes_of
from huizhen.protocol.errors import AggregationError, ConfigError, WireError
from huizhen.protocol.strategy_terms import MIXED_RANKS, PARAMETERS
from huizhen.protocol.study import parse_study
from huizhen.protocol.wire import Message, decode, encode
from huizhen.server.rounds import Coordinator, Receipt, RoundState
from huizhen.strategies.public_random import orthonormal_rows
from huizhen.strategies.ranks import at_rank, site_rank
from huizhen.strategies.stored import decode_state, encode_state


def f32(values):
    return np.array(values, np.float32)


A, B, BIAS = "l.0.lora_A", "l.0.lora_B", "head.bias"
SHAPES = {A: (1, 3), B: (2, 1), BIAS: (2,)}
SIZES = {"north": 400, "south": 300, "east": 100}  # shares 1/2, 3/8 and 1/8: exact in binary


def own_terms(strategy, rounds):
    """Two merges of one rank fill the layer of 2 x 3."""
    return {"every": rounds.get("count", 2) // 2} if strategy == "ffa_refresh" else {}


def study(strategy="ffa_ortho", weights="public", sizes=SIZES, **rounds):
    return parse_study(
        {
            "study": {"name": "s", "seed": 5},
            "base": {"name": "tiny"},
            "adapter": {"target_modules": ["query"], "rank": 1},
            "task": {"kind": "classification", "text": "{t}", "label": "y"},
            "privacy": {"unit": "none" if strategy == "fedsa" else "patient"},
            "strategy": {"name": strategy, "weights": weights, **own_terms(strategy, rounds)},
            "rounds": {"count": 2, **rounds},
            "sites": {site: {"patients_public": size} for site, size in sizes.items()},
        },
        "study.toml",
    )


def first_adapter():
    return {
        A: f32([[9, 9, 9]]),
        B: f32([[1], [-2]]),
        BIAS: f32([0.5, 0]),
    }


def update(coordinator, site, B_values, bias=(0, 0), **changes):
    tensors = {B: f32(B_values).reshape(2, 1), BIAS: np.float32(bias)}
    values = {"kind": "update", "study": coordinator.digest, "round": 1, "site": site}
    return encode(Message(**{**values, "tensors": tensors, **changes}))


def honest(coordinator, round=1):
    """Return one update for each site, by site."""
    return {
        "north": update(coordinator, "north", [4, -2], [8, 0], round=round),
        "south": update(coordinator, "south", [-8, 16], [0, 8], round=round),
        "east": update(coordinator, "east", [32, 0.5], [-16, 1], round=round),
    }


def receive_all(coordinator, state, messages):
    for data in messages:
        state, receipt = coordinator.receive(state, data)
        assert receipt.refusal is None
    return state


def raw(state):
    return {name: value.tobytes() for name, value in state.strategy.x.items()}


def test_a_full_round_by_hand():
    coordinator = Coordinator(study(), SHAPES)
    state = coordinator.first(first_adapter())
    assert (state.round, state.counted, state.refused) == (1, (), ())
    for site, data in honest(coordinator).items():
        state, receipt = coordinator.receive(state, data)
        assert receipt == Receipt(site, None)
    assert state.counted == ("north", "south", "east")
    after = coordinator.close_round(state)
    # B: 1 + 4/2 − 8·3/8 + 32/8 = 4, −2 − 2/2 + 16·3/8 + 0.5/8 = 3.0625
    # bias: 0.5 + 8/2 − 16/8 = 2.5, 8·3/8 + 1/8 = 3.125
    assert after.strategy.x[B].tolist() == [[4], [3.0625]]
    assert after.strategy.x[BIAS].tolist() == [2.5, 3.125]
    assert after.strategy.x[A].tobytes() == orthonormal_rows(5, A, (1, 3)).tobytes()
    assert (after.round, after.counted, after.refused) == (2, (), ())
    assert not after.accumulator.sums
    assert state.round == 1  # the state before is a value of its own


def test_a_study_ends_after_its_last_round():
    coordinator = Coordinator(study(), SHAPES)
    state = coordinator.first(first_adapter())
    for round in (1, 2):
        assert not coordinator.is_finished(state)
        messages = honest(coordinator, round).values()
        state = coordinator.close_round(receive_all(coordinator, state, messages))
    assert coordinator.is_finished(state)
    assert state.strategy.x[B].tolist() == [[7], [8.125]]  # twice the mean update


@given(st.permutations(sorted(SIZES)))
def test_any_order_of_arrival_gives_the_same_bytes(order):
    coordinator = Coordinator(study(weights="equal"), SHAPES)
    first = coordinator.first(first_adapter())
    found = []
    for sites in (sorted(SIZES), order):
        messages = [update(coordinator, site, [ord(site[0]) / 7, 0.1]) for site in sites]
        found.append(raw(coordinator.close_round(receive_all(coordinator, first, messages))))
    assert found[0] == found[1]


def attacks(coordinator):
    """Return what a liar may send while ``north`` has been counted, and the code it gets."""
    good = update(coordinator, "east", [32, 0.5])
    other = Coordinator(study(count=3), SHAPES)
    with_a = {A: np.zeros((1, 3), np.float32), B: np.zeros((2, 1), np.float32)}
    nan = bytearray(good)
    nan[-4:] = b"\0\0\xc0\x7f"
    return {
        "another study": (update(other, "east", [1, 1]), "wrong_study"),
        "the next round": (update(coordinator, "east", [1, 1], round=2), "wrong_round"),
        "a duplicate": (update(coordinator, "north", [4, -2], [8, 0]), "duplicate"),
        "a second, other update": (update(coordinator, "north", [100, 100]), "duplicate"),
        "an unknown site": (update(coordinator, "west", [1, 1]), "unknown_site"),
        "a site without a name": (update(coordinator, "", [1, 1]), "unknown_site"),
        "a site by another case": (update(coordinator, "East", [1, 1]), "unknown_site"),
        "an adapter": (update(coordinator, "", [1, 1], kind="adapter"), "wrong_kind"),
        "nothing": (b"", "malformed"),
        "noise": (b"\x80\x04\x95 pickle", "malformed"),
        "a truncation": (good[:-1], "malformed"),
        "a NaN": (bytes(nan), "malformed"),
        "a value over the limit": (update(coordinator, "east", [2.0**21, 0]), "norm_too_large"),
        "a frozen A": (update(coordinator, "east", [1, 1], tensors=with_a), "malformed"),
        "the announcement": (
            coordinator.announcement(coordinator.first(first_adapter())),
            "wrong_kind",
        ),
    }


NAMES = list(attacks(Coordinator(study(), SHAPES)))


@pytest.mark.parametrize("name", NAMES)
def test_an_attack_is_refused_with_its_code_and_the_round_goes_on(name):
    coordinator = Coordinator(study(), SHAPES)
    first = coordinator.first(first_adapter())
    messages = honest(coordinator)
    undisturbed = coordinator.close_round(receive_all(coordinator, first, messages.values()))

    before = receive_all(coordinator, first, [messages["north"]])
    data, code = attacks(coordinator)[name]
    state, receipt = coordinator.receive(before, data)
    assert receipt.refusal == code
    assert state.refused == (code,)
    assert state.counted == ("north",)
    assert replace(state, refused=()) == before  # the same sum, to the same object

    state = receive_all(coordinator, state, [messages["south"], messages["east"]])
    assert raw(coordinator.close_round(state)) == raw(undisturbed)


def test_all_attacks_together_are_counted_and_change_nothing():
    coordinator = Coordinator(study(), SHAPES)
    first = coordinator.first(first_adapter())
    messages = honest(coordinator)
    state = receive_all(coordinator, first, [messages["north"]])
    for data, _ in attacks(coordinator).values():
        state, _receipt = coordinator.receive(state, data)
    assert state.refused == tuple(code for _, code in attacks(coordinator).values())
    state = receive_all(coordinator, state, [messages["south"], messages["east"]])
    after = coordinator.close_round(state)
    assert after.strategy.x[B].tolist() == [[4], [3.0625]]
    assert after.refused == ()


def test_an_update_of_the_last_round_replayed_is_refused():
    coordinator = Coordinator(study(), SHAPES)
    messages = honest(coordinator)
    state = receive_all(coordinator, coordinator.first(first_adapter()), messages.values())
    state, receipt = coordinator.receive(coordinator.close_round(state), messages["north"])
    assert receipt.refusal == "wrong_round"


def test_a_round_under_the_quorum_raises_and_names_who_is_missing():
    coordinator = Coordinator(study(), SHAPES)
    state = coordinator.first(first_adapter())
    state = receive_all(coordinator, state, [honest(coordinator)["south"]])
    with pytest.raises(AggregationError, match=r"round 1 has 1 of 3 .* missing north, east$"):
        coordinator.close_round(state)
    rest = [honest(coordinator)[site] for site in ("east", "north")]  # and it is still open
    assert coordinator.close_round(receive_all(coordinator, state, rest)).round == 2


def test_an_empty_round_raises_even_with_the_least_quorum():
    coordinator = Coordinator(study(quorum=1), SHAPES)
    with pytest.raises(AggregationError, match="has 0 of 3 updates, the quorum is 1"):
        coordinator.close_round(coordinator.first(first_adapter()))


def test_with_a_quorum_the_mean_is_over_those_present():
    coordinator = Coordinator(study(quorum=2), SHAPES)
    state = coordinator.first(first_adapter())
    messages = honest(coordinator)
    state = receive_all(coordinator, state, [messages["east"], messages["south"]])
    after = coordinator.close_round(state)
    # south 3/8 and east 1/8 become 3/4 and 1/4: 1 − 8·3/4 + 32/4 = 3, −2 + 16·3/4 + 0.5/4
    assert after.strategy.x[B].tolist() == [[3], [10.125]]
    assert after.strategy.x[BIAS].tolist() == [-3.5, 6.25]


def test_with_equal_weights_those_present_count_alike():
    coordinator = Coordinator(study(weights="equal", quorum=1), SHAPES)
    state = coordinator.first(first_adapter())
    messages = honest(coordinator)
    state = receive_all(coordinator, state, [messages["north"], messages["east"]])
    after = coordinator.close_round(state)
    assert after.strategy.x[B].tolist() == [[19], [-2.75]]


def random_update(coordinator, state, site):
    rng = np.random.default_rng([state.round, *site.encode()])
    shapes = coordinator.sent_shapes(state)
    shapes = at_rank(shapes, site_rank(coordinator.study, site))
    tensors = {n: rng.normal(size=shape).astype(np.float32) for n, shape in shapes.items()}
    return update(coordinator, site, [0, 0], round=state.round, tensors=tensors)


@pytest.mark.parametrize("strategy", PARAMETERS)
def test_a_coordinator_rebuilt_from_its_state_goes_on_bit_by_bit(strategy):
    def run(crash):
        coordinator = Coordinator(study(strategy, count=4), SHAPES)
        state = coordinator.first(first_adapter())
        coordinator = Coordinator(study(strategy, count=4), shapes_of(state.strategy.x))
        announced = []
        while not coordinator.is_finished(state):
            if crash:  # all that is left is the round and the bytes of the state
                kept = decode_state(encode_state(state.strategy))
                coordinator = Coordinator(study(strategy, count=4), shapes_of(kept.x))
                state = RoundState(round=state.round, strategy=kept)
            announced.append(coordinator.announcement(state))
            messages = [random_update(coordinator, state, site) for site in SIZES]
            state = coordinator.close_round(receive_all(coordinator, state, messages))
        return raw(state), announced

    assert run(crash=True) == run(crash=False)


@pytest.mark.parametrize("strategy", PARAMETERS)
def test_the_order_of_arrival_does_not_change_a_bit_of_any_strategy(strategy):
    terms, results = study(strategy, quorum=2), set()
    first = Coordinator(terms, SHAPES).first(first_adapter())
    coordinator = Coordinator(terms, shapes_of(first.strategy.x))
    for absent in (None, "south"):
        for order in permutations(site for site in SIZES if site != absent):
            messages = [random_update(coordinator, first, site) for site in order]
            after = coordinator.close_round(receive_all(coordinator, first, messages))
            results.add((absent, *sorted(raw(after).items())))
    assert len(results) == 2  # with all, and without one


RANKS = {"north": {"patients_public": 400, "rank": 2}, "south": {"patients_public": 400}}


def of_ranks(strategy, combine="mean"):
    return parse_study(
        {
            "study": {"name": "s", "seed": 5},
            "base": {"name": "tiny"},
            "adapter": {"target_modules": ["query"], "rank": 3},
            "task": {"kind": "classification", "text": "{t}", "label": "y"},
            "privacy": {"unit": "none"},
            "strategy": {"name": strategy, "combine": combine, **own_terms(strategy, {"count": 4})},
            "rounds": {"count": 3},
            "sites": RANKS,
        },
        "study.toml",
    )


WIDE = {A: (3, 4), B: (5, 3), BIAS: (2,)}


@pytest.mark.parametrize("strategy", sorted(MIXED_RANKS))
def test_each_site_sends_its_own_rank_and_no_other(strategy):
    rng = np.random.default_rng(2)
    x = {name: rng.normal(size=shape).astype(np.float32) for name, shape in WIDE.items()}
    terms = of_ranks(strategy)
    state = Coordinator(terms, WIDE).first(x)
    coordinator = Coordinator(terms, shapes_of(state.strategy.x))
    shapes = coordinator.sent_shapes(state)
    for site, wrong in (("north", 3), ("north", 1), ("south", 2)):
        tensors = {n: np.zeros(s, np.float32) for n, s in at_rank(shapes, wrong).items()}
        data = update(coordinator, site, [0, 0], tensors=tensors)
        assert coordinator.receive(state, data)[1] == Receipt(None, "malformed")
    while not coordinator.is_finished(state):
        messages = [random_update(coordinator, state, site) for site in RANKS]
        state = coordinator.close_round(receive_all(coordinator, state, messages))
    assert state.strategy.x[B].shape == WIDE[B]
    assert all(np.isfinite(value).all() for value in state.strategy.x.values())


def test_what_a_site_of_a_lower_rank_has_not_trained_is_moved_by_the_others_alone():
    x = {A: np.zeros((3, 4), np.float32), B: np.zeros((5, 3), np.float32), BIAS: f32([0, 0])}
    coordinator = Coordinator(of_ranks("ffa"), WIDE)
    state = coordinator.first(x)
    for site, rank, value in (("north", 2, 2), ("south", 3, 4)):
        tensors = {B: np.full((5, rank), value, np.float32), BIAS: f32([0, 0])}
        data = update(coordinator, site, [0, 0], tensors=tensors)
        state, receipt = coordinator.receive(state, data)
        assert receipt.refusal is None
    after = coordinator.close_round(state).strategy.x[B]
    assert after[0].tolist() == [3, 3, 2]
    with pytest.raises(ConfigError, match="would take what a site cannot train for a vote"):
        of_ranks("ffa", "median")


def test_a_rule_that_bears_liars_is_asked_in_place_of_the_mean():
    sizes = dict.fromkeys("abcde", 100)
    tables = study(sizes=sizes).resolved()
    del tables["format"]
    tables["strategy"] = {"name": "ffa_ortho", "combine": "trimmed_mean", "byzantine": 1}
    terms = parse_study(tables, "s")
    coordinator = Coordinator(terms, SHAPES)
    state = coordinator.first(first_adapter())
    values = {"a": [1, 1], "b": [2, 2], "c": [3, 3], "d": [4, 4], "e": [6000, -6000]}
    messages = [update(coordinator, site, own) for site, own in values.items()]
    after = coordinator.close_round(receive_all(coordinator, state, messages))
    assert after.strategy.x[B].reshape(-1).tolist() == [1 + 3, -2 + 2]
    assert after.given == ()


def test_the_announcement_carries_only_what_is_trained():
    coordinator = Coordinator(study(), SHAPES)
    state = coordinator.first(first_adapter())
    shapes = coordinator.sent_shapes(state)
    assert shapes == {B: (2, 1), BIAS: (2,)}
    message = decode(coordinator.announcement(state), shapes=shapes)
    assert (message.kind, message.round, message.site) == ("adapter", 1, "")
    assert message.study == study().digest()
    assert message.tensors[B].tolist() == [[1], [-2]]
    with pytest.raises(WireError):
        decode(coordinator.announcement(state), shapes=SHAPES)
    assert b"lora_A" not in coordinator.announcement(state)


def test_fedavg_announces_every_tensor():
    coordinator = Coordinator(study("fedavg"), SHAPES)
    state = coordinator.first(first_adapter())
    assert decode(coordinator.announcement(state), shapes=SHAPES).tensors[A].tolist() == [[9, 9, 9]]


def test_the_next_announcement_carries_the_next_round_and_the_new_adapter():
    coordinator = Coordinator(study(), SHAPES)
    state = coordinator.first(first_adapter())
    state = coordinator.close_round(receive_all(coordinator, state, honest(coordinator).values()))
    message = decode(coordinator.announcement(state), shapes=coordinator.sent_shapes(state))
    assert message.round == 2
    assert message.tensors[B].tolist() == [[4], [3.0625]]


@pytest.mark.parametrize("terms", [study(quorum=4), study(sizes={})], ids=["quorum", "no site"])
def test_a_quorum_that_no_round_can_meet_is_refused_at_the_start(terms):
    with pytest.raises(AggregationError, match=r"quorum is \d, the study has \d sites"):
        Coordinator(terms, SHAPES)
