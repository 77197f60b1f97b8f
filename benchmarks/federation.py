"""How fast the real federation goes round, beside stock Flower, and what its processes hold.

    python -m huizhen.benchmarks.federation trivial large stock memory many --json

    trivial   1,000 values, light sites: what a round costs when nothing has to be carried
    large     10 million values, 40 MB each way for each site
    stock     both sizes with stock Flower, its state in SQLite and in memory
    memory    the coordinator's processes, idle and at their peak, with 3 sites and with 6
    many      30 real sites with workers on the base ``tiny``

All of it runs on this machine, over TLS on loopback. Light sites speak to the real coordinator and
answer with random updates (``federation_site``). In each repeat every measurement has its turn on
processes of its own, so that a busy machine slows all of them; times are pooled over the repeats.
A round is from commit to commit; stock Flower's is the time between two calls of the ServerApp's
own evaluation. The load before each run stands in the JSON: figures of a busy machine say little.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huizhen.benchmarks.federation_light import run_light
from huizhen.benchmarks.federation_many import run_many
from huizhen.benchmarks.federation_stock import DATABASES, run_stock
from huizhen.benchmarks.federation_values import LARGE, SMALL, Spread, tensor_shapes

NAMES = ("trivial", "large", "stock", "memory", "many")
STOCK_ROUND_SECONDS = 120.0

Run = Callable[[Path], dict[str, Any]]
Found = Mapping[str, Sequence[dict[str, Any]]]


def runs_of(names: Sequence[str], options: argparse.Namespace) -> dict[str, Run]:
    """Return what is run in each repeat, in order; the stock runs follow their own counterpart."""
    sites, rounds = options.sites, options.rounds
    sizes = {"trivial": options.small_values, "large": options.values}
    found: dict[str, Run] = {}
    for size, values in sizes.items():
        if size in names:
            found[size] = light(sites, values, rounds)
        if "stock" in names:
            for database in DATABASES:
                found[stock_name(size, database)] = stock(database, sites, values, rounds)
    if "memory" in names:
        for count in options.memory_sites:
            found[f"memory, {count} sites"] = light(count, options.values, rounds)
    if "many" in names:
        found["many"] = lambda folder: run_many(
            folder, sites=options.many_sites, rounds=options.many_rounds
        )
    return found


def stock_name(size: str, database: str) -> str:
    """Return the name under which a run of stock Flower is reported."""
    return f"stock {size}, state in {database}"


def light(sites: int, values: int, rounds: int) -> Run:
    """Return a run with light sites."""
    return lambda folder: run_light(folder, sites=sites, values=values, rounds=rounds)


def stock(database: Any, sites: int, values: int, rounds: int) -> Run:
    """Return a run of stock Flower."""
    return lambda folder: run_stock(
        folder,
        database=database,
        sites=sites,
        values=values,
        rounds=rounds,
        seconds=(rounds + 1) * STOCK_ROUND_SECONDS,
    )


def measure(
    runs: Mapping[str, Run], repeats: int, say: Callable[[str], None]
) -> dict[str, list[dict[str, Any]]]:
    """Return what each run found in each repeat, the runs taking turns.

    Args:
        runs: by name.
        repeats: how often each is run; each time in a temporary folder that is removed.
        say: is told what begins.
    """
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in runs}
    for repeat in range(repeats):
        for name, run in runs.items():
            load = os.getloadavg()[0]
            say(f"{name}, repeat {repeat + 1} of {repeats}, load {load:.1f}")
            with tempfile.TemporaryDirectory(prefix="federation-") as folder:
                found[name].append({"load": load, **run(Path(folder) / "run")})
    return found


def spreads(found: Found) -> dict[str, Spread]:
    """Return the seconds a round of each run, pooled over its repeats."""
    return {
        name: Spread.of([time for one in results for time in one["seconds"]])
        for name, results in found.items()
    }


def speedups(times: Mapping[str, Spread]) -> dict[str, float]:
    """Return the median of each stock run over the median of its own counterpart."""
    return {
        stock_name(size, database): times[stock_name(size, database)].median / times[size].median
        for size in ("trivial", "large")
        for database in DATABASES
        if size in times and stock_name(size, database) in times
    }


def print_tables(found: Found) -> None:
    """Print times, ratios and memory."""
    times = spreads(found)
    ratios = speedups(times)
    for name, spread in times.items():
        print(f"{name:32s} {spread} a round")
        if stages := [one["stages"] for one in found[name] if "stages" in one]:
            parts = {key: statistics.median(one[key] for one in stages) for key in stages[0]}
            print(f"{'':32s}   " + ", ".join(f"{k} {v:.2f} s" for k, v in parts.items()))
        if name in ratios:
            print(f"{'':32s}   {ratios[name]:.2f} x the time of huizhen")
    for name, results in found.items():
        for one in results:
            _print_many(one) if name == "many" else _print_memory(name, one)


def _print_memory(name: str, one: Mapping[str, Any]) -> None:
    adapter = 4 * one["values"] / (1 << 20)
    for process, held in one["memory"].items():
        grown = held["peak_mib"] - held["idle_mib"]
        # of an adapter under a megabyte the multiple says nothing
        multiple = f", {grown / adapter:.1f} adapters" if adapter >= 1 else ""
        print(
            f"{name:32s} {process:18s} idle {held['idle_mib']:6.0f} MiB, peak "
            f"{held['peak_mib']:6.0f} MiB: + {grown:.0f} MiB{multiple}"
        )


def _print_many(one: Mapping[str, Any]) -> None:
    memory = one["memory"]
    groups = ", ".join(f"{name} {held:.0f}" for name, held in memory["groups_mib"].items())
    largest = ", ".join(f"{name} {held:.0f}" for name, held in memory["largest_mib"].items())
    print(
        f"{one['sites']} real sites: {one['rounds']} rounds in {one['wall']:.0f} s, the first in "
        f"{one['first']:.0f} s; made ready in {one['prepared']:.0f} s\n"
        f"  {memory['processes']} processes hold {memory['together_mib']:.0f} MiB together, at "
        f"most {memory['upper_bound_mib']:.0f}; MiB: {groups}; the largest of each: {largest}"
    )


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        description="Seconds a round and memory of the real federation, beside stock Flower.",
        epilog="example: python -m huizhen.benchmarks.federation trivial large stock --repeats 3",
    )
    parser.add_argument(
        "names", nargs="*", choices=[*NAMES, []], metavar="NAME", help=f"of {', '.join(NAMES)}"
    )
    for option, default, help in (
        ("--repeats", 1, "of everything"),
        ("--sites", 3, "of trivial, large and stock"),
        ("--rounds", 12, "of all but many; the first is not timed"),
        ("--small-values", SMALL, "of trivial"),
        ("--values", LARGE, "of large and memory"),
        ("--many-sites", 30, "of many"),
        ("--many-rounds", 10, "of many"),
    ):
        parser.add_argument(option, type=int, default=default, help=f"{help} (default {default:,})")
    parser.add_argument(
        "--memory-sites", type=int, nargs="+", default=[3, 6], help="of memory (default 3 6)"
    )
    parser.add_argument("--out", type=Path, help="write the JSON to this file, too")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(words)
    # the shares of a round's stages leave out the first and the last; policies ask for three sites
    for name, least in (("rounds", 3), ("many_rounds", 2), ("many_sites", 3), ("repeats", 1)):
        if (value := getattr(options, name)) < least:
            option = f"--{name.replace('_', '-')}"
            parser.error(f"{option} is {value}, expected at least {least}")
    for values in (options.small_values, options.values):
        try:
            tensor_shapes(values)
        except ValueError as error:
            parser.error(str(error))
    return options


def main(words: Sequence[str] | None = None) -> None:
    """Measure and print."""
    options = parse(words)
    runs = runs_of(options.names or NAMES, options)
    found = measure(runs, options.repeats, lambda text: print(text, file=sys.stderr))
    times = spreads(found)
    result = {
        "cores": len(os.sched_getaffinity(0)),
        "runs": found,
        "seconds": {name: asdict(spread) for name, spread in times.items()},
        "speedups": speedups(times),
    }
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    if options.json:
        print(json.dumps(result))
        return
    print_tables(found)


if __name__ == "__main__":
    main()
