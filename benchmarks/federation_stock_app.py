"""The app that stock Flower runs in ``federation_stock``: FedAvg, and clients that train nothing.

Clients read the arrays that came and answer with random ones of the same shapes. The ServerApp
notes the time before its first round and after each, and its own memory, and writes both to the
file that the run's configuration names.
"""

import json
import time
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from huizhen.benchmarks.federation_values import random_tensors, status_bytes

client = ClientApp()
server = ServerApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    """Return random arrays of the shapes that came."""
    arrays = message.content["arrays"]
    if not isinstance(arrays, ArrayRecord):
        raise TypeError(f"message holds {type(arrays).__name__}, expected an ArrayRecord")
    values = sum(array.size for array in arrays.to_numpy_ndarrays())
    content = RecordDict({"arrays": record(values), "metrics": MetricRecord({"num-examples": 1})})
    return Message(content=content, reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Run FedAvg and write what was measured."""
    from flwr.serverapp.strategy import FedAvg  # the clients' processes do not load it

    config = context.run_config
    sites, rounds, values = (int(config[name]) for name in ("sites", "rounds", "values"))
    moments: list[float] = []

    def note(round: int, arrays: ArrayRecord) -> None:
        moments.append(time.time())

    idle = status_bytes("self", "VmRSS")
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=sites, min_available_nodes=sites)
    strategy.start(
        grid,
        record(values),
        num_rounds=rounds,
        train_config=ConfigRecord(),
        evaluate_fn=note,
    )
    found = {"moments": moments, "idle": idle, "peak": status_bytes("self", "VmHWM")}
    Path(str(config["out"])).write_text(json.dumps(found), "utf-8")


def record(values: int) -> ArrayRecord:
    """Return random arrays with so many numbers together."""
    from flwr.app import Array

    return ArrayRecord({name: Array(one) for name, one in random_tensors(values).items()})
