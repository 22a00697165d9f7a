"""The suites of `python -m bench`, and their options; nothing heavy is imported for them."""

import argparse
from importlib import import_module
from pathlib import Path
from typing import Any

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
    "compat": ("bench.compat.suite", "somebody's program as it is against the same on our kernels"),
    "paper": ("bench.paper.suite", "the experiments of the paper, beside its numbers"),
    "gpu": ("bench.gpu.suite", "GPU kernels on a GPU: right, how fast, how lean"),
    "gpu-report": ("bench.gpu_report.suite", "machine code of the GPU kernels, without a GPU"),
}
SOLVER_PARTS = ("step", "solve", "kept", "precision")
MODEL_DATASETS = ("Cora", "PubMed", "CoauthorCS", "Computers", "ogbn-arxiv")
VARIANTS = ("nl", "l")
LAYERS = ("TransformerConv", "GATConv")
PAPER_PARTS = ("table1", "table2", "depth", "solvers", "rewiring", "superpixels", "parameters")
PAPER_DATASETS = ("Cora", "CiteSeer", "PubMed", "CoauthorCS", "Computers", "Photo", "ogbn-arxiv")
PAPER_MODELS = ("GRAND-l", "GRAND-nl", "GRAND-nl-rw",
                "GCN", "GAT", "MoNet", "GS-mean", "GS-maxpool")  # fmt: skip
COMPONENTS = ("largest", "all")
PAPER_FOLDER = Path("bench/results/paper")


def _one(names: tuple[str, ...], text: str) -> dict[str, Any]:
    return {"type": one_of(names), "metavar": "|".join(names), "help": text}


def _some(names: tuple[str, ...], text: str) -> dict[str, Any]:
    return {"type": one_of(names), "metavar": "NAME", "nargs": "+", "help": text}


def _count(text: str) -> dict[str, Any]:
    return {"type": number(int, low=1), "metavar": "N", "help": text}


def _switch(text: str) -> dict[str, Any]:
    return {"action": "store_true", "help": text}


_ALL = {
    "--threads": _count("default: torch's own choice"),
    "--allocator": _one(
        ("keep", "system"),
        "keep: the C library keeps freed memory for the next tensor, by which peers gain "
        "(default); system: as it comes, it gives large tensors back at once",
    )
    | {"default": "keep"},
    "--json": {"type": Path, "metavar": "FILE", "help": "write every number here"},
    "--out": {"type": Path, "metavar": "DIR", "help": "draw plots (PNG) into this folder"},
}
_BUT_PAPER = {
    "--rounds": _count("interleaved rounds (default 9)"),
    "--quick": _switch("few rounds, and less of it"),
}
_MAIN = PAPER_SHAPES[0]
# Graph and shape, of the suites that let them be chosen
_PROBLEM = {
    "--graph": _one(
        tuple(graphs.GRAPHS),
        f"arxiv: the real ogbn-arxiv graph from ${graphs.DATA_VARIABLE}; random: its size and "
        "degrees, generated (default); local: numbered by community; grid",
    ),
    "--nodes": _count("size of a generated graph"),
    "--channels": _count(f"channels of the state, d; measures one shape (else {_MAIN.channels})"),
    "--heads": _count(f"attention heads, H; measures one shape (else {_MAIN.heads})"),
    "--attention-channels": _count(
        f"d_att, of all heads together; measures one shape (else {_MAIN.attention_channels})"
    ),
}
_OWN: dict[str, dict[str, dict[str, Any]]] = {
    "ops": {
        "--all": _switch("then the suites memory and scaling too, into the same files"),
        "--base": {
            "metavar": "COMMIT",
            "help": "time the working tree against this commit, and nothing else",
        },
    },
    "tuned": {"--dataset": _one(tuple(BY_DATASET), "one of them (default: all)")},
    "solvers": {"--part": _one(SOLVER_PARTS, "one of the four (default: all)")},
    "models": {
        "--dataset": _one(MODEL_DATASETS, "one of them (default: all)"),
        "--variant": _one(VARIANTS, "one of them (default: both; ogbn-arxiv: nl)"),
        "--layer": _one(LAYERS, "a layer of PyG's against ours, instead of models"),
    },
    "compat": {
        "--repository": {"type": Path, "required": True, "metavar": "DIR", "help": "the checkout"},
        "--script": {
            "default": "src/run_GNN.py", "metavar": "FILE",
            "help": "the program in it, which trains (default src/run_GNN.py)",
        },
        "--dataset": {"metavar": "NAME", "help": "as an option of the program"},
        "--rounds": _count("runs of each kind, in turns, after those of the check (default 5)"),
        "--epochs": _count("that are timed in each run (default 5)"),
        "--tolerance": {
            "type": number(float, above=0), "default": 1e-3, "metavar": "X",
            "help": "of the relative differences (default 1e-3)",
        },
        "--allocator": _one(
            ("both", "keep", "system"), "keep and system as elsewhere; default: both, in turn"
        )
        | {"default": "both"},
        "arguments": {
            "nargs": "*", "metavar": "ARGUMENT", "help": "of the program, after two dashes"
        },
    },
    "gpu": {
        "--minutes": {
            "type": number(float, low=0), "default": 8.0, "metavar": "M",
            "help": "time that it may take (default 8)",
        },
    },
    "gpu-report": {
        "--update-golden": _switch("write golden.json anew, from the kernels as they are, and stop")
    },
    "paper": {
        "--part": _one(PAPER_PARTS, "one of the seven (default: all)"),
        "--budget": {
            "type": number(float, above=0), "metavar": "SECONDS",
            "help": "that each part may take (default: no limit)",
        },
        "--seeds": _count("runs of each model (default: 20 in table1, 10 in table2, 3 elsewhere)"),
        "--datasets": _some(
            PAPER_DATASETS,
            f"of the tables and of parameters, some of {', '.join(PAPER_DATASETS)} (default: all, "
            "in tables without ogbn-arxiv)",
        ),
        "--models": _some(
            PAPER_MODELS,
            f"of the tables, some of {', '.join(PAPER_MODELS)} (default: all of a table)",
        ),
        "--component": _one(
            COMPONENTS,
            "of table1: the largest connected component, which the paper says it uses, with what "
            "lies in it of the published split, or all of the graph (default: largest)",
        ),
        "--resume": {
            "action": argparse.BooleanOptionalAction, "default": True,
            "help": "keep the runs that OUT holds (default), or start again",
        },
    },
}  # fmt: skip
_DEFAULTS = {
    "paper": {"component": "largest", "out": PAPER_FOLDER},
    "compat": {"graph": "the program's"},
}


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
        is_free = name not in ("tuned", "models", "compat", "paper")
        options = _ALL | ({} if name == "paper" else _BUT_PAPER) | (_PROBLEM if is_free else {})
        for flag, values in (options | _OWN.get(name, {})).items():
            added.add_argument(flag, **values)
        graph = {"graph": "random" if is_free else "tuned"}
        added.set_defaults(**graph | _DEFAULTS.get(name, {}))
    return main


def shape_of(options: argparse.Namespace) -> Shape | None:
    """The shape asked for; None, meaning the suite's own, if no part of one is given."""
    names = ("channels", "heads", "attention_channels")
    given = [getattr(options, name, None) for name in names]
    if not any(given):
        return None
    return Shape(*(value or getattr(_MAIN, name) for value, name in zip(given, names, strict=True)))
