"""`python -m bench ops --base COMMIT`: the working tree timed against another commit.

Each tree has a process of its own (`base_worker.py`). They are given the same numbers and take
turns; while one is timed the other sleeps.
"""

import argparse
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

from bench.core.harness import Timing
from bench.core.problem import MODES, Mode, Shape
from bench.core.report import Report
from bench.core.tables import milliseconds, print_table, timed_rows
from bench.ops.base_trees import ROOT, Worker, WorkerError, checked_out, find_commit, git, worker
from grand_fast import Graph
from grand_fast.testing import TOLERANCE, assert_close

BASE, TREE = "base", "working tree"


@dataclass(frozen=True)
class Case:
    """An operator, and those of its options that are not the default: older commits lack some."""

    op: str
    label: str = ""
    options: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return ", ".join(filter(None, (self.op, self.label)))


_SQUAREPLUS, _SENDER = {"normalizer": "squareplus"}, {"normalize": "sender"}
CASES = (
    Case("projected_attention_diffusion", "softmax by receiver"),
    Case("projected_attention_diffusion", "softmax by sender", _SENDER),
    Case("projected_attention_diffusion", "squareplus by receiver", _SQUAREPLUS),
    Case("projected_attention_diffusion", "squareplus by sender", _SQUAREPLUS | _SENDER),
    Case("attention_diffusion", "softmax by receiver"),
    Case("csr_diffusion"),
    Case("edge_attention", "softmax by receiver"),
)


def run(graph: Graph, shape: Shape, options: argparse.Namespace, report: Report) -> None:
    """Compare, time, print, and fill `report`."""
    commit = find_commit(options.base)
    rounds = options.rounds or (3 if options.quick else 9)
    header = report.header
    header["base_commit"] = git("describe", "--always", commit)
    report.compared_with = "the base"
    print(
        f"{TREE.capitalize()} {header['commit']} over {BASE} {header['base_commit']}, "
        f"rounds: {rounds}, threads: {header['threads']}.",
        flush=True,
    )
    with checked_out(commit) as tree:
        folder = tree.parent
        graph_file = folder / "graph.npz"
        np.savez(graph_file, edge_index=graph.edge_index().numpy(), num_nodes=graph.num_nodes)
        with worker(BASE, tree, graph_file) as base, worker(TREE, ROOT, graph_file) as ours:
            for each in (base, ours):
                try:
                    each.answer()
                except WorkerError as error:
                    name, reason = error.args
                    raise ValueError(f"base: the {name} cannot be loaded: {reason}") from None
            report.start(len(CASES))
            try:
                for case in CASES:
                    _measure(case, (base, ours), graph, shape, rounds, folder, report)
                    report.done()
            finally:
                report.close()
                if report.rows:
                    _print(report, graph)
    if not report.rows and not report.failed:
        raise ValueError(f"base: nothing can be compared. {report.skipped[-1]}")


def _measure(
    case: Case, workers: tuple[Worker, Worker], graph: Graph, shape: Shape, rounds: int,
    folder: Path, report: Report,
) -> None:  # fmt: skip
    """One case: its rows, or why there are none."""
    files = {each.name: folder / f"{each.name}.npz" for each in workers}
    asked = {"op": case.op, "options": case.options} | asdict(shape)
    try:
        for each in workers:
            report.say(f"{case}: {each.name}")
            each.ask(do="prepare", case=asked, path=str(files[each.name]))
        _compare(f"{case}: ", files[TREE], files[BASE])
        report.say(f"{case}: time")
        seconds = _time(workers, rounds)
    except WorkerError as error:
        name, reason = error.args
        told = report.skipped if name == BASE else report.failed
        told.append(f"{case}: the {name} cannot run it: {reason}")
        return
    except AssertionError as difference:
        report.failed.append(str(difference))
        return
    common = {"op": case.op, "case": str(case), "shape": str(shape), "nodes": graph.num_nodes,
              "edges": graph.num_edges, "graph": report.header["graph"]}  # fmt: skip
    rows = timed_rows({f"{name}|{mode}": Timing(tuple(seconds[name, mode]))
                       for mode in MODES for name in (BASE, TREE)}, **common)  # fmt: skip
    for row in rows[1::2]:  # of the tree
        times = seconds[TREE, row["mode"]], seconds[BASE, row["mode"]]
        ratios = Timing(tuple(ours / theirs for ours, theirs in zip(*times, strict=True)))
        row["over_base"] = ratios.median
        row["over_base_p10"], row["over_base_p90"] = ratios.percentile(10), ratios.percentile(90)
    report.rows += rows


def _compare(name: str, got: Path, want: Path) -> None:
    """Raise AssertionError if two files of outputs and gradients differ."""
    with np.load(got) as ours, np.load(want) as theirs:
        for key in theirs.files:
            values = (torch.from_numpy(arrays[key]) for arrays in (ours, theirs))
            assert_close(f"{name}{key}", *values, tolerance=TOLERANCE[torch.float32])
    got.unlink()
    want.unlink()


def _time(workers: tuple[Worker, Worker], rounds: int) -> dict[tuple[str, Mode], list[float]]:
    """Seconds of every round; who goes first changes from one to the next."""
    seconds: dict[tuple[str, Mode], list[float]] = {}
    for r in range(-1, rounds):  # the first to warm up
        for mode in MODES:
            for each in workers if r % 2 == 0 else reversed(workers):
                taken = each.seconds(mode)
                if r >= 0:
                    seconds.setdefault((each.name, mode), []).append(taken)
    return seconds


def _print(report: Report, graph: Graph) -> None:
    head, lines = ["", f"{BASE} ms", f"{TREE} ms", "tree over base"], []
    for base, tree in zip(report.rows[::2], report.rows[1::2], strict=True):
        spread = f"{tree['over_base_p10']:.3f}–{tree['over_base_p90']:.3f}"
        lines.append([f"{base['case']}, {base['mode']}", milliseconds(base), milliseconds(tree),
                      f"{tree['over_base']:.3f}× [{spread}]"])  # fmt: skip
    print_table(f"d/H/d_att = {report.rows[0]['shape']}, {graph}", head, lines)
