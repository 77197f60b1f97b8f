"""Every strategy behind Flower's own interface comes to what it comes to without it."""

import io
import itertools
import json
import os
import subprocess
import sys
from typing import Any, cast

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from tests.strategies.federation import BIAS, HEAD, SHAPES, A, B, f32, first_adapter

from huizhen.protocol.adapter import difference
from huizhen.protocol.errors import ConfigError
from huizhen.protocol.strategy_terms import PARAMETERS
from huizhen.server.flower import as_flower_strategy
from huizhen.strategies import mean
from huizhen.strategies.base import Averaging, Given, Stacking
from huizhen.strategies.catalogue import Public, strategy_of

PEFT = {
    A: "base_model.model.l.0.query.lora_A.default.weight",
    B: "base_model.model.l.0.query.lora_B.default.weight",
}
NODES, ROUNDS = (7, 11, 13), 3
EXAMPLES = {7: 10, 11: 30, 13: 60}


@pytest.fixture(autouse=True)
def a_run_of_flowers(monkeypatch):
    """Flower's messages ask who they are of, which its own processes are told at their start."""
    monkeypatch.setattr(TaskIdentity, "_run_id", 1)
    monkeypatch.setattr(TaskIdentity, "_task_id", 1)
    monkeypatch.setattr(TaskIdentity, "_node_id", 1)


class Federation:
    """Flower's grid with nodes that train by adding what a seed says."""

    def __init__(self, nodes=NODES, lie=None):
        self.nodes, self.lie, self.sent, self.configs = nodes, lie, [], []

    def get_node_ids(self):
        return list(self.nodes)

    def send_and_receive(self, messages, timeout=None):
        replies = []
        for message in messages:
            if message.metadata.message_type != "train":
                continue
            config = message.content.config_records["config"]
            arrays = message.content.array_records["arrays"]
            self.configs.append(dict(config))
            node, round = message.metadata.dst_node_id, config["server-round"]
            after = {key: array.numpy() for key, array in arrays.items()}
            self.sent.append((round, after))
            for key in config["huizhen-trains"]:
                after[key] = after[key] + step_of(round, node, after[key].shape)
            content = RecordDict(
                {
                    "arrays": ArrayRecord({k: Array(v) for k, v in after.items()}),
                    "metrics": MetricRecord({"num-examples": EXAMPLES[node], "loss": 1.0}),
                }
            )
            if self.lie is not None and node == 13:
                content = self.lie(content, after)
            replies.append(Message(content=content, reply_to=message))
        return replies


def step_of(round, node, shape):
    return (0.3 * np.random.default_rng([round, node]).normal(size=shape)).astype(np.float32)


def arrays_of(x, names=PEFT):
    return ArrayRecord({names.get(key, key): Array(value) for key, value in x.items()})


def first():
    """Return a new adapter, B = 0."""
    return {**first_adapter(), B: np.zeros(SHAPES[B], np.float32)}


def run(strategy, grid: Any, names=PEFT):
    return strategy.start(grid, arrays_of(first(), names), num_rounds=ROUNDS)


def expected(name, nodes=NODES, shares=None, **terms):
    """Return the adapter after the same rounds without Flower."""
    from huizhen.protocol.strategy_terms import StrategyTerms

    shares = shares or {node: EXAMPLES[node] / sum(EXAMPLES[n] for n in nodes) for node in nodes}
    strategy = strategy_of(StrategyTerms(name=name, **terms), Public(0, 2 * len(NODES), len(NODES)))
    state = strategy.init(first())
    shapes = {key: value.shape for key, value in state.x.items()}
    for round in range(1, ROUNDS + 1):
        given = []
        for node in nodes:
            trained = {
                key: state.x[key] + step_of(round, node, shapes[key])
                for key in strategy.sends(shapes, round)
            }
            given.append(Given(f"{node:020}", shares[node], difference(trained, state.x)))
        if isinstance(strategy, Stacking):
            state = strategy.join(state, given, round)
            continue
        assert isinstance(strategy, Averaging)
        total = mean.start()
        for one in given:
            total = mean.add(total, one.update, one.share)
        state = strategy.step(state, mean.finish(total, 1.0), round)
    return state.x


@pytest.mark.parametrize("name", PARAMETERS)
def test_each_strategy_comes_to_the_same_adapter_as_without_flower(name):
    own: dict[str, Any] = {"every": 2} if name == "ffa_refresh" else {}
    travel: dict[str, Any] = {"travel": 1.0} if name == "scaffold" else {}
    strategy = as_flower_strategy(name, sites=3, **travel, **own)
    result = run(strategy, Federation())
    whole = expected(name, **own)
    found = {key: array.numpy() for key, array in result.arrays.items()}
    assert found.keys() == {PEFT.get(key, key) for key in whole}
    for key, value in whole.items():
        assert found[PEFT.get(key, key)].tobytes() == value.tobytes()
    assert strategy.refused == []
    assert result.train_metrics_clientapp[ROUNDS]["loss"] == pytest.approx(1.0)


def test_what_to_train_is_said_in_each_message_by_the_keys_of_the_arrays():
    grid = Federation()
    run(as_flower_strategy("rolora", sites=3), grid)
    trains = [config["huizhen-trains"] for config in grid.configs[:: len(NODES)]]
    odd = sorted([BIAS, HEAD, PEFT[B]])
    even = sorted([BIAS, HEAD, PEFT[A]])
    assert [sorted(one) for one in trains] == [odd, even, odd]
    grid = Federation()
    run(as_flower_strategy("fedprox", sites=3, mu=0.25), grid)
    assert {config["proximal-mu"] for config in grid.configs} == {0.25}


def test_what_a_site_goes_on_with_as_it_has_it_is_said_too():
    grid = Federation()
    run(as_flower_strategy("fedsa", sites=3), grid)
    for config in grid.configs:
        assert sorted(config["huizhen-keeps"]) == sorted([BIAS, HEAD, PEFT[B]])
    grid = Federation()
    run(as_flower_strategy("fedavg", sites=3), grid)
    assert not any("huizhen-keeps" in config for config in grid.configs)


def test_scaffold_tells_everyone_c_from_the_second_round_on():
    grid = Federation()
    run(as_flower_strategy("scaffold", sites=3, travel=0.5), grid)
    told = [{key for key in sent if key.endswith(".control")} for _, sent in grid.sent]
    assert told[: len(NODES)] == [set()] * len(NODES)
    assert all(len(one) == len(SHAPES) for one in told[len(NODES) :])


def test_equal_weights_count_every_node_alike_and_need_no_metric():
    def without(content, after):
        del content["metrics"]
        return content

    strategy = as_flower_strategy("fedavg", sites=3, weights="equal")
    result = run(strategy, Federation(lie=without))
    whole = expected("fedavg", shares=dict.fromkeys(NODES, 1 / 3))
    assert result.arrays[PEFT[A]].numpy() == pytest.approx(whole[A], abs=1e-6)
    assert dict(result.train_metrics_clientapp) == {}


def changed(key, value):
    def lie(content, after):
        arrays = {k: Array(v) for k, v in {**after, key: value(after[key])}.items()}
        return RecordDict({**content, "arrays": ArrayRecord(arrays)})

    return lie


LIES = {
    "missing_array": lambda content, after: RecordDict(
        {**content, "arrays": ArrayRecord({HEAD: Array(after[HEAD])})}
    ),
    "malformed": lambda content, after: RecordDict({"metrics": content["metrics"]}),
    "wrong_shape_or_dtype": changed(HEAD, lambda value: value[:1]),
    "no_weight": lambda content, after: RecordDict({"arrays": content["arrays"]}),
    "not_finite": changed(HEAD, lambda value: value * np.float32(np.nan)),
    "norm_too_large": changed(HEAD, lambda value: value + np.float32(1e5)),
}


@pytest.mark.parametrize("code", LIES)
def test_a_reply_that_cannot_count_is_left_out_with_its_node_and_the_round_goes_on(code):
    strategy = as_flower_strategy("fedavg", sites=3)
    result = run(strategy, Federation(lie=LIES[code]))
    assert strategy.refused == [(round, 13, code) for round in range(1, ROUNDS + 1)]
    whole = expected("fedavg", nodes=NODES[:2])
    assert result.arrays[PEFT[B]].numpy() == pytest.approx(whole[B], abs=1e-6)


def test_an_integer_array_is_no_update():
    strategy = as_flower_strategy("fedavg", sites=3)
    run(strategy, Federation(lie=changed(HEAD, lambda value: value.astype(np.int64))))
    assert {code for _, _, code in strategy.refused} == {"wrong_shape_or_dtype"}


def test_a_rule_that_bears_a_liar():
    strategy = as_flower_strategy("ffa_ortho", sites=3, combine="median", weights="equal")
    far = changed(BIAS, lambda value: value + np.float32(900))
    result = run(strategy, Federation(lie=far))
    assert np.abs(result.arrays[BIAS].numpy() - first_adapter()[BIAS]).max() < 10


def test_too_few_replies_for_the_rule_leave_the_adapter_as_it_was():
    strategy = as_flower_strategy(
        "ffa", sites=3, weights="equal", combine="trimmed_mean", byzantine=1
    )
    result = run(strategy, Federation(lie=LIES["not_finite"]))
    assert len(strategy.refused) == ROUNDS
    assert len(result.arrays) == 0  # Flower's: no round has given any


def test_names_of_this_project_and_of_peft_are_the_same_arrays():
    for names in (
        {},
        {A: "base_model.model.l.0.query.lora_A.weight", B: "l.0.query.lora_B.default.weight"},
    ):
        strategy = as_flower_strategy("svd", sites=3)
        result = run(strategy, Federation(), names)
        whole = expected("svd")
        assert result.arrays[names.get(A, A)].numpy().tobytes() == whole[A].tobytes()


def test_arguments_that_make_no_sense_are_refused_before_anything_starts():
    for name, own, problem in (
        ("svdd", {}, "did you mean 'svd'"),
        ("svd", {"mu": 1.0}, "mu has no meaning for 'svd'"),
        ("svd", {"combine": "median"}, "works on each site's product"),
        ("ffa", {"combine": "multi_krum", "byzantine": 1}, "it needs 5 updates"),
        ("ffa", {"speed": 1}, "speed"),
        ("ffa", {"combine": "median"}, "a node that lies about its examples"),
    ):
        with pytest.raises(ConfigError, match=problem):
            as_flower_strategy(name, sites=3, **own)
    doubled = {A: Array(f32([[1]])), "base_model.model.l.0.query.lora_A.weight": Array(f32([[1]]))}
    strategy, grid = as_flower_strategy("fedavg", sites=3), cast(Any, Federation())
    with pytest.raises(ConfigError, match="are both"):
        strategy.start(grid, ArrayRecord(doubled))


def test_the_order_of_replies_changes_no_bit():
    for name in ("fedavg", "svd", "flora"):
        results = set()
        for order in itertools.permutations(NODES):
            result = run(as_flower_strategy(name, sites=3), Federation(nodes=order))
            results.add(tuple(array.numpy().tobytes() for array in result.arrays.values()))
        assert len(results) == 1
    assert SHAPES[A] == (2, 7)


def test_strangers_bytes_and_metrics_end_no_run():
    def array_of(data, stype="numpy.ndarray"):
        return Array(dtype="float32", shape=SHAPES[HEAD], stype=stype, data=data)

    packed = io.BytesIO()
    np.savez(packed, a=np.ones(3, np.float32))
    header = (
        b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (%d,)}" % 10**14
    )
    for data in (b"", packed.getvalue(), header.ljust(128) + b"\n", b"junk", bytes(10**6)):

        def lie(content, after, data=data):
            arrays = {key: Array(value) for key, value in after.items()} | {HEAD: array_of(data)}
            return RecordDict({**content, "arrays": ArrayRecord(arrays)})

        strategy = as_flower_strategy("fedavg", sites=3)
        run(strategy, Federation(lie=lie))
        assert [node for _, node, _ in strategy.refused] == [13] * ROUNDS

    def odd(content, after):
        metrics = MetricRecord({"num-examples": 60, "loss": [1.0, 2.0]})
        return RecordDict({**content, "metrics": metrics})

    result = run(as_flower_strategy("fedavg", sites=3), Federation(lie=odd))
    assert len(result.arrays) == len(SHAPES)
    assert dict(result.train_metrics_clientapp) == {}
    for examples in (0, -1, float("inf"), 1.7e308):

        def many(content, after, examples=examples):
            return RecordDict({**content, "metrics": MetricRecord({"num-examples": examples})})

        strategy = as_flower_strategy("fedavg", sites=3)
        run(strategy, Federation(lie=many))
        assert {code for _, _, code in strategy.refused} == {"no_weight"}


def test_a_strategy_that_is_started_again_begins_anew():
    strategy = as_flower_strategy("flora", sites=3)
    once = run(strategy, Federation()).arrays
    again = run(strategy, Federation()).arrays
    assert {k: a.numpy().tobytes() for k, a in once.items()} == {
        k: a.numpy().tobytes() for k, a in again.items()
    }
    grid = cast(Any, Federation())
    with pytest.raises(ConfigError, match="what an earlier run has merged"):
        as_flower_strategy("flora", sites=3).start(grid, once, num_rounds=1)


def test_no_more_nodes_train_than_the_strategy_was_made_for():
    grid = Federation(nodes=(7, 11, 13))
    run(as_flower_strategy("flora", sites=2), grid)
    assert len(grid.sent) == 2 * ROUNDS


@pytest.mark.parametrize("name", ["flora", "ffa_ortho", "ffa_refresh", "fedsvd", "fed_sb"])
def test_a_trained_adapter_is_not_thrown_away(name):
    grid = cast(Any, Federation())
    with pytest.raises(ConfigError, match=r"would throw away what 'l\.0\.query' has learnt"):
        as_flower_strategy(name, sites=3).start(grid, arrays_of(first_adapter()))
    as_flower_strategy("svd", sites=3).start(grid, arrays_of(first_adapter()), num_rounds=1)


def test_only_floats_can_be_averaged():
    grid = cast(Any, Federation())
    whole = ArrayRecord({"steps": Array(np.array([1, 2]))})
    with pytest.raises(ConfigError, match="array 'steps' is int64"):
        as_flower_strategy("fedavg", sites=3).start(grid, whole)


IN_FLOWERS_SIMULATION = """
import json, sys
import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.simulation import run_simulation
from huizhen.server.flower import as_flower_strategy

client, server, found = ClientApp(), ServerApp(), {}

@client.train()
def train(message, context):
    arrays = {key: array.numpy().copy() for key, array in message.content["arrays"].items()}
    site = 1 + int(context.node_config["partition-id"])
    for key in message.content["config"]["huizhen-trains"]:
        arrays[key] += np.float32(0.125 * site)
    after = ArrayRecord({key: Array(value) for key, value in arrays.items()})
    metrics = MetricRecord({"num-examples": 10 * site})
    return Message(content=RecordDict({"arrays": after, "metrics": metrics}), reply_to=message)

@server.main()
def main(grid, context):
    strategy = as_flower_strategy("fedex", sites=3, sampling={"fraction_evaluate": 0.0})
    x = {"m.lora_A": np.ones((1, 2), np.float32), "m.lora_B": np.zeros((3, 1), np.float32)}
    first = ArrayRecord({key: Array(value) for key, value in x.items()})
    result = strategy.start(grid=grid, initial_arrays=first, num_rounds=1)
    found.update({key: array.numpy().tolist() for key, array in result.arrays.items()})

resources = {"client_resources": {"num_cpus": 1}}
network = {"init_args": {"num_cpus": 2, "_node_ip_address": "127.0.0.1"}}
run_simulation(server, client, num_supernodes=3, backend_config={**resources, **network})
print(json.dumps(found))
"""


@pytest.mark.slow
def test_an_unmodified_flower_simulation_runs_one():
    """With 10, 20 and 30 examples: weights 1/6, 1/3 and 1/2 of steps 1/8, 1/4 and 3/8."""
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "FLWR_TELEMETRY_ENABLED": "0"}
    done = subprocess.run(  # noqa: S603  # our own command
        [sys.executable, "-c", IN_FLOWERS_SIMULATION],
        env={**os.environ, **quiet},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = {
        key: np.array(value) for key, value in json.loads(done.stdout.splitlines()[-1]).items()
    }
    steps, shares = np.array([1, 2, 3]) / 8, np.array([1, 2, 3]) / 6
    mean_B, mean_A = shares @ steps, 1 + shares @ steps
    assert found["m.lora_B"] == pytest.approx(np.full((3, 1), mean_B), abs=1e-6)
    assert found["m.lora_A"] == pytest.approx(np.full((1, 2), mean_A), abs=1e-6)
    whole = found["m.lora_B"] @ found["m.lora_A"] + found["m.merged_B"] @ found["m.merged_A"]
    assert whole == pytest.approx(np.full((3, 2), shares @ (steps * (1 + steps))), abs=1e-6)
