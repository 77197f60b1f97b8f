"""``huizhen privacy``: what a study's privacy terms come to, before anyone trains."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from huizhen.cli.privacy_audit import add_audit_parser
from huizhen.cli.privacy_verify import add_verify_parser
from huizhen.protocol.strategy_terms import Weights

if TYPE_CHECKING:
    from huizhen.protocol.planning import Terms
    from huizhen.protocol.study import Study
    from huizhen.simulations.experiment import Experiment

PARAMETERS = 50_000

EPILOG = """examples:
  huizhen privacy plan --patients 40,200,1200
  huizhen privacy plan --patients 200 --sites 10 --epsilon 3 --sampling-rate 0.5
  huizhen privacy plan --patients 40,200,1200 --epsilon 8 --delta 1e-5 --rounds 20 --steps 4 \\
      --sampling-rate 0.2 --parameters 50000 --out plan.png
  huizhen privacy plan simulations/experiments/rare_disease_fed6.toml --patients 350,260,230,200
  huizhen privacy plan my.toml --epsilon 3 --json      the file's terms, but for epsilon

Nothing is trained. With an EXPERIMENT the trained parameters are counted: its base is loaded, and
where [task] labels is empty its records are read for their classes; --parameters spares both.
The ratio of noise to signal is a floor: the signal is taken as if every patient pulled the same
way.
"""


def add_parser(groups: Any) -> None:
    """Add the group of commands."""
    privacy = groups.add_parser(
        "privacy",
        help="plan a study's privacy, audit it, verify its certificate",
        description="What a study's privacy terms come to, and whether it keeps them.",
    )
    actions = privacy.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add_plan(actions)
    add_audit_parser(actions)
    add_verify_parser(actions)


def _add_plan(actions: Any) -> None:
    parser = actions.add_parser(
        "plan",
        help="noise and epsilon of a study, before anyone trains",
        description="Say what a study's privacy terms leave of its signal, and what would help.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "experiment", type=Path, nargs="?", metavar="EXPERIMENT.toml",
        help="take the terms from a study; options given beside it win",
    )  # fmt: skip
    add("--patients", type=_sizes, metavar="N,N,…", help="patients of each site, as made public")
    add("--sites", type=int, metavar="N", help="so many sites, of these sizes in turn")
    add("--epsilon", type=float, help="default: 8")
    add("--delta", type=float, help="default: 1e-5")
    add("--rounds", type=int, metavar="N", help="default: 20")
    add("--steps", type=int, metavar="N", help="steps of a round; default: 4")
    sampling = parser.add_mutually_exclusive_group()
    sampling.add_argument(
        "--sampling-rate", type=float, metavar="Q",
        help="how likely a step takes each patient; default: 0.2",
    )  # fmt: skip
    sampling.add_argument(
        "--expected-batch", type=float, metavar="N",
        help="or how many patients a step takes on average, the same at each site",
    )  # fmt: skip
    add("--batch-cap", type=int, metavar="N", help="the most patients of a step; default: no limit")
    add("--max-grad-norm", type=float, metavar="C", help="the clip; default: 1")
    add(
        "--parameters", type=int, metavar="N",
        help=f"trained parameters, heads too; default: the experiment's, else {PARAMETERS:,}",
    )  # fmt: skip
    add("--weights", choices=get_args(Weights), help="of the sites; default: equal")
    add("--out", type=Path, metavar="FILE", help="also draw it: .png, .svg or .pdf")
    add("--home", type=Path, metavar="DIR", help="where base models are cached")
    add("--json", action="store_true", help="print JSON for programs")
    parser.set_defaults(run=run_plan)


def run_plan(arguments: argparse.Namespace) -> int:
    """Plan with the terms of the command line."""
    from huizhen.protocol.plan_advice import advise, explain
    from huizhen.protocol.planning import plan

    experiment = None
    if arguments.experiment is not None:
        from huizhen.simulations.experiment import load_experiment

        experiment = load_experiment(arguments.experiment)
    study = None if experiment is None else experiment.study
    sites = _sites(arguments, study)
    found = plan(sites, _terms(arguments, experiment))
    advice, sentences = advise(found), explain(found)
    if arguments.out is not None:
        from huizhen.simulations.plan_figure import draw_plan

        draw_plan(found, arguments.out)
    if arguments.json:
        document = {
            "schema": 1,
            **dataclasses.asdict(found),
            "advice": [dataclasses.asdict(one) for one in advice],
            "explanation": sentences,
        }
        print(json.dumps(document, ensure_ascii=False, indent=1))
        return 0
    from huizhen.cli.privacy_tables import print_plan

    print_plan(found, advice, sentences, unit=study.privacy.unit if study else "patient")
    if arguments.out is not None:
        print(f"picture: {arguments.out}")
    return 0


def _terms(arguments: argparse.Namespace, experiment: "Experiment | None") -> "Terms":
    from huizhen.protocol.planning import Terms, terms_of
    from huizhen.protocol.study_terms import PrivacyTerms, RoundTerms

    if experiment is None:
        privacy, rounds = PrivacyTerms(), RoundTerms()
        terms = Terms(
            epsilon=privacy.epsilon,
            delta=privacy.delta,
            rounds=rounds.count,
            steps_per_round=rounds.local_steps,
            parameters=PARAMETERS,
            sampling_rate=privacy.sampling_rate,
        )
    else:
        terms = terms_of(experiment.study, PARAMETERS)
    given = {
        "parameters": arguments.parameters,
        "epsilon": arguments.epsilon,
        "delta": arguments.delta,
        "rounds": arguments.rounds,
        "steps_per_round": arguments.steps,
        "sampling_rate": arguments.sampling_rate,
        "expected_batch": arguments.expected_batch,
        "batch_cap": arguments.batch_cap,
        "max_grad_norm": arguments.max_grad_norm,
        "weights": arguments.weights,
    }
    changes: Any = {name: value for name, value in given.items() if value is not None}
    terms = dataclasses.replace(terms, **changes)
    if experiment is None or arguments.parameters is not None:
        return terms
    from huizhen.simulations.plan_size import trained_parameters

    return dataclasses.replace(terms, parameters=trained_parameters(experiment, arguments.home))


def _sites(arguments: argparse.Namespace, study: "Study | None") -> dict[str, int]:
    """Return the public size of each site, by name."""
    from huizhen.protocol.errors import ConfigError

    sizes, count = arguments.patients, arguments.sites
    if sizes is None:
        if study is None or not study.sites:
            where = "" if study is None else f"{arguments.experiment.name} has no [sites]: "
            raise ConfigError(f"{where}--patients is needed, such as --patients 40,200,1200")
        if count is not None:
            raise ConfigError("--sites is given without --patients, the study names its sites")
        return {name: site.patients_public for name, site in study.sites.items()}
    count = len(sizes) if count is None else count
    if count < len(sizes) or count % len(sizes):
        raise ConfigError(
            f"--sites is {count}, expected a multiple of the {len(sizes)} sizes of --patients"
        )
    return {f"site {i + 1}": sizes[i % len(sizes)] for i in range(count)}


def _sizes(text: str) -> list[int]:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected whole numbers such as 40,200,1200")
    return sizes
