"""The suites of `python -m bench`, and their options; nothing heavy is imported for them."""

import argparse
from importlib import import_module
from pathlib import Path

from bench.core import graphs
from bench.core.configurations import BY_DATASET
from bench.core.problem import PAPER_SHAPES, Shape
from grand_fast.training.option_types import OneLineParser, number, one_of

SUITES = {
    "ops": ("bench.ops.suite", "time of every operator against its peers and memory's floor"),
    "memory": ("bench.ops.memory", "peak memory of attention_diffusion against its peers"),
    "scaling": ("bench.ops.scaling", "time per edge against the size of the graph"),
    "overhead": ("bench.ops.overhead", "Python around the kernels: of an evaluation, of a call"),
    "tuned": ("bench.tuned.suite", "seven tuned configurations of the paper on their graphs"),
    "solvers": ("bench.solvers.suite", "error, time and memory of the solvers against torchdiffeq"),
    "models": ("bench.models.suite", "an epoch of tuned models against the released code's"),
    "paper": ("bench.paper.suite", "the experiments of the paper, beside its numbers"),
    "gpu": ("bench.gpu.suite", "GPU kernels on a GPU: right, how fast, how lean"),
    "gpu-report": ("bench.gpu_report.suite", "machine code of the GPU kernels, without a GPU"),
}
SOLVER_PARTS = ("step", "solve", "kept", "precision")
MODEL_DATASETS = ("Cora", "PubMed", "CoauthorCS", "Computers", "ogbn-arxiv")
VARIANTS = ("nl", "l")
PAPER_PARTS = ("table1", "table2", "depth", "solvers", "rewiring", "superpixels", "parameters")
PAPER_DATASETS = ("Cora", "CiteSeer", "PubMed", "CoauthorCS", "Computers", "Photo", "ogbn-arxiv")
PAPER_MODELS = ("GRAND-l", "GRAND-nl", "GRAND-nl-rw",
                "GCN", "GAT", "MoNet", "GS-mean", "GS-maxpool")  # fmt: skip
COMPONENTS = ("largest", "all")
PAPER_FOLDER = Path("bench/results/paper")
_COUNT = number(int, low=1)


def parser(arguments: list[str]) -> argparse.ArgumentParser:
    """Of all suites; those named among the arguments with their own text."""
    main = OneLineParser(
        prog="python -m bench",
        description="Benchmarks of grand-fast against the ways to do the same without it.",
        epilog="`python -m bench SUITE --help` explains a suite. Try: python -m bench ops "
        "--graph random --quick",
    )
    suites = main.add_subparsers(dest="suite", title="suites", metavar="SUITE", required=True)
    for name, (path, summary) in SUITES.items():
        added = suites.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            # its own text only when asked for: importing a suite imports its peers, which is slow
            epilog=import_module(path).EPILOG if name in arguments else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add = added.add_argument
        add("--threads", type=_COUNT, metavar="N", help="default: torch's own choice")
        add("--json", type=Path, metavar="FILE", help="write every number here")
        add("--out", type=Path, metavar="DIR", help="draw plots (PNG) into this folder")
        if name != "paper":
            add("--rounds", type=_COUNT, metavar="N", help="interleaved rounds (default 9)")
            add("--quick", action="store_true", help="few rounds, and less of it")
        if name in ("tuned", "models", "paper"):
            added.set_defaults(graph="tuned")
        else:
            _add_problem(added)
        _OWN.get(name, lambda parser: None)(added)
    return main


def shape_of(options: argparse.Namespace) -> Shape | None:
    """The shape asked for; None, meaning the suite's own, if no part of one is given."""
    names = ("channels", "heads", "attention_channels")
    given = tuple(getattr(options, name, None) for name in names)
    if given == (None, None, None):
        return None
    return Shape(*(value or getattr(PAPER_SHAPES[0], name)
                   for value, name in zip(given, names, strict=True)))  # fmt: skip


def _choice(parser: argparse.ArgumentParser, flag: str, names: tuple[str, ...], text: str) -> None:
    parser.add_argument(flag, type=one_of(names), metavar="|".join(names), help=text)


def _add_problem(parser: argparse.ArgumentParser) -> None:
    """Graph and shape, of the suites that let them be chosen."""
    _choice(
        parser, "--graph", tuple(graphs.GRAPHS),
        f"arxiv: the real ogbn-arxiv graph from ${graphs.DATA_VARIABLE}; random: its size "
        "and degrees, generated (default); local: numbered by community; grid",
    )  # fmt: skip
    parser.set_defaults(graph="random")
    parser.add_argument("--nodes", type=_COUNT, metavar="N", help="size of a generated graph")
    for name, text in (
        ("channels", "channels of the state, d"),
        ("heads", "attention heads, H"),
        ("attention_channels", "d_att, of all heads together"),
    ):
        default = getattr(PAPER_SHAPES[0], name)
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=_COUNT, metavar="N",
            help=f"{text}; measures one shape (else {default})",
        )  # fmt: skip


def _add_ops(parser: argparse.ArgumentParser) -> None:
    text = "then the suites memory and scaling too, into the same files"
    parser.add_argument("--all", action="store_true", help=text)
    text = "time the working tree against this commit, and nothing else"
    parser.add_argument("--base", metavar="COMMIT", help=text)


def _add_models(parser: argparse.ArgumentParser) -> None:
    _choice(parser, "--dataset", MODEL_DATASETS, "one of them (default: all)")
    _choice(parser, "--variant", VARIANTS, "one of them (default: both; ogbn-arxiv: nl)")


def _add_gpu(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--minutes", type=number(float, low=0), default=8.0, metavar="M",
        help="time that it may take (default 8)",
    )  # fmt: skip


def _add_gpu_report(parser: argparse.ArgumentParser) -> None:
    text = "write golden.json anew, from the kernels as they are, and stop"
    parser.add_argument("--update-golden", action="store_true", help=text)


def _add_paper(parser: argparse.ArgumentParser) -> None:
    _choice(parser, "--part", PAPER_PARTS, "one of the seven (default: all)")
    parser.add_argument(
        "--budget", type=number(float, above=0), metavar="SECONDS",
        help="that each part may take (default: no limit)",
    )  # fmt: skip
    parser.add_argument(
        "--seeds", type=_COUNT, metavar="N",
        help="runs of each model (default: 20 in table1, 10 in table2, 3 elsewhere)",
    )  # fmt: skip
    parser.add_argument(
        "--datasets", type=one_of(PAPER_DATASETS), nargs="+", metavar="NAME",
        help=f"of the tables and of parameters, some of {', '.join(PAPER_DATASETS)} (default: all, "
        "in tables without ogbn-arxiv)",
    )  # fmt: skip
    parser.add_argument(
        "--models", type=one_of(PAPER_MODELS), nargs="+", metavar="NAME",
        help=f"of the tables, some of {', '.join(PAPER_MODELS)} (default: all of a table)",
    )  # fmt: skip
    _choice(
        parser, "--component", COMPONENTS,
        "of table1: the largest connected component, which the paper says it uses, with what "
        "lies in it of the published split, or all of the graph (default: largest)",
    )  # fmt: skip
    parser.add_argument(
        "--resume", action=argparse.BooleanOptionalAction, default=True,
        help="keep the runs that OUT holds (default), or start again",
    )  # fmt: skip
    parser.set_defaults(component="largest", out=PAPER_FOLDER)


_OWN = {
    "ops": _add_ops,
    "tuned": lambda parser: _choice(
        parser, "--dataset", tuple(BY_DATASET), "one of them (default: all)"
    ),
    "solvers": lambda parser: _choice(
        parser, "--part", SOLVER_PARTS, "one of the four (default: all)"
    ),
    "models": _add_models,
    "paper": _add_paper,
    "gpu": _add_gpu,
    "gpu-report": _add_gpu_report,
}
