"""`python -m bench ops --base COMMIT`: the working tree timed against another commit.

Each tree has a process of its own (`base_worker.py`). They are given the same numbers and take
turns; while one is timed the other sleeps.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from bench.harness import PAUSE_S, Timing
from bench.problem import MODES, Mode, Shape
from bench.progress import Progress
from bench.report import Report, Row, milliseconds, print_table
from grand_fast import Graph
from grand_fast.testing import TOLERANCE, assert_close

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("base_worker.py")
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


class WorkerError(Exception):
    """A tree cannot do what was asked of it; the text says why."""


class Worker:
    """The process of one tree."""

    def __init__(self, name: str, process: subprocess.Popen[str], errors: IO[str]) -> None:
        self.name, self._process, self._errors = name, process, errors

    def answer(self) -> dict[str, Any]:
        """The next line that it writes.

        Raises:
            WorkerError: it says that it cannot. ChildProcessError: it has ended.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._errors.seek(0)
            last = (self._errors.read().strip().splitlines() or ["it said nothing."])[-1]
            raise ChildProcessError(f"base: the process of the {self.name} ended ({code}): {last}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def ask(self, **request: object) -> dict[str, Any]:
        """The answer to one request; raises as `answer` does."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: `answer` says so
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return self.answer()

    def seconds(self, mode: Mode) -> float:
        """Of one call."""
        return float(self.ask(do="run", mode=mode, pause=PAUSE_S)["seconds"])


def run(graph: Graph, shape: Shape, options: argparse.Namespace, report: Report) -> None:
    """Compare, time, print, and fill `report`."""
    commit = find_commit(options.base)
    rounds = options.rounds or (3 if options.quick else 9)
    report.header["base_commit"] = _git("describe", "--always", commit)
    report.compared_with = "the base"
    print(
        f"{TREE.capitalize()} {report.header['commit']} over {BASE} {report.header['base_commit']}, "
        f"{rounds} rounds, {report.header['threads']} threads.",
        flush=True,
    )
    progress = Progress(len(CASES))
    progress.say("the base's worktree")
    with checked_out(commit) as tree:
        folder = tree.parent
        graph_file = folder / "graph.npz"
        np.savez(graph_file, edge_index=graph.edge_index().numpy(), num_nodes=graph.num_nodes)
        with (
            worker(BASE, tree, graph_file) as base,
            worker(TREE, ROOT, graph_file) as ours,
        ):
            for each in (base, ours):
                try:
                    each.answer()
                except WorkerError as reason:
                    raise ValueError(f"base: the {each.name} cannot be loaded: {reason}.") from None
            try:
                for case in CASES:
                    _measure(case, (base, ours), graph, shape, rounds, folder, report, progress)
                    progress.done()
            finally:
                progress.close()
                if report.rows:
                    _print(report, graph)
    if not report.rows and not report.failed:
        raise ValueError(f"base: nothing can be compared. {report.skipped[-1]}")


def find_commit(name: str) -> str:
    """The hash of a commit, by whatever git knows it.

    Raises:
        ValueError: there is none, or this is not a checkout.
    """
    try:
        top = _git("rev-parse", "--show-toplevel")
    except WorkerError:
        top = ""
    if not top or not Path(top).samefile(ROOT):
        raise ValueError(f"base: {ROOT} is no git checkout, so there is no other commit of it.")
    try:
        return _git("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")
    except WorkerError:
        raise ValueError(
            f"base: {ROOT} has no commit {name!r}. `git fetch` brings what only its remote has."
        ) from None


@contextlib.contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """A temporary worktree, alone in a temporary folder; both are gone at the end."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with tempfile.TemporaryDirectory(prefix="grand-fast-base-") as folder:
            tree = Path(folder) / "tree"
            try:
                _git("worktree", "add", "--detach", str(tree), commit)
                yield tree
            except WorkerError as reason:
                raise ValueError(f"base: git worktree add: {reason}") from None
            finally:
                with contextlib.suppress(WorkerError):  # it was never added
                    # twice: also one that is still locked, as while it is being added
                    _git("worktree", "remove", "--force", "--force", str(tree))
    finally:
        signal.signal(signal.SIGTERM, before)


def _git(*arguments: str) -> str:
    """What a git command prints; WorkerError with the last line of what it complains of."""
    try:
        result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        raise ValueError("base: needs git, which is not installed.") from None
    if result.returncode:
        raise WorkerError((result.stderr.strip().splitlines() or ["it said nothing."])[-1])
    return result.stdout.strip()


@contextlib.contextmanager
def worker(name: str, tree: Path, graph_file: Path) -> Iterator[Worker]:
    """A process whose `grand_fast` is that of `tree`; else the environment is ours."""
    paths = [str(tree), *filter(None, [os.environ.get("PYTHONPATH")])]
    threads = str(torch.get_num_threads())
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            # -P: or the worker's own folder would come before the tree
            [sys.executable, "-P", str(WORKER), str(tree), str(graph_file), threads],
            cwd=tree,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,  # Ctrl-C is for us alone, who end it
        ) as process,
    ):
        try:
            yield Worker(name, process, errors)
        finally:
            process.kill()


def _measure(
    case: Case,
    workers: tuple[Worker, Worker],
    graph: Graph,
    shape: Shape,
    rounds: int,
    folder: Path,
    report: Report,
    progress: Progress,
) -> None:
    """One case: its rows, or why there are none."""
    base, ours = workers
    files = {each.name: folder / f"{each.name}.npz" for each in workers}
    asked = {"op": case.op, "options": case.options} | asdict(shape)
    try:
        for each in workers:
            progress.say(f"{case}: {each.name}")
            each.ask(do="prepare", case=asked, path=str(files[each.name]))
        _compare(f"{case}: ", files[TREE], files[BASE])
    except WorkerError as reason:
        if each is base:
            report.skipped.append(f"{case}: the base cannot run it: {reason}.")
        else:
            report.failed.append(f"{case}: {reason}.")
        return
    except AssertionError as difference:
        report.failed.append(str(difference))
        return
    progress.say(f"{case}: time")
    seconds = _time(workers, rounds)
    for mode in MODES:
        ratios = [o / b for o, b in zip(seconds[TREE, mode], seconds[BASE, mode], strict=True)]
        p10, median, p90 = (float(p) for p in np.percentile(ratios, (10, 50, 90)))
        for each in workers:
            row: Row = {
                "op": case.op,
                "case": str(case),
                "shape": str(shape),
                "competitor": each.name,
                "mode": mode,
                "nodes": graph.num_nodes,
                "edges": graph.num_edges,
                **Timing(tuple(seconds[each.name, mode])).record(),
                "graph": report.header["graph"],
            }
            if each is ours:
                row |= {"over_base": median, "over_base_p10": p10, "over_base_p90": p90}
            report.rows.append(row)


def _compare(name: str, got: Path, want: Path) -> None:
    """Raise AssertionError if two files of outputs and gradients differ."""
    tolerance = TOLERANCE[torch.float32]
    with np.load(got) as ours, np.load(want) as theirs:
        for key in theirs.files:
            values = (torch.from_numpy(arrays[key]) for arrays in (ours, theirs))
            assert_close(f"{name}{key}", *values, tolerance=tolerance)
    got.unlink()
    want.unlink()


def _time(workers: tuple[Worker, Worker], rounds: int) -> dict[tuple[str, Mode], list[float]]:
    """Seconds of every round; who goes first changes from one to the next."""
    seconds: dict[tuple[str, Mode], list[float]]
    seconds = {(each.name, mode): [] for each in workers for mode in MODES}
    for r in range(-1, rounds):  # the first to warm up
        for mode in MODES:
            for each in workers if r % 2 == 0 else reversed(workers):
                taken = each.seconds(mode)
                if r >= 0:
                    seconds[each.name, mode].append(taken)
    return seconds


def _print(report: Report, graph: Graph) -> None:
    cells: dict[str, list[str]] = {}
    for row in report.rows:
        line = cells.setdefault(f"{row['case']}, {row['mode']}", [])
        line.append(milliseconds(row))
        if "over_base" in row:
            spread = f"{row['over_base_p10']:.3f}–{row['over_base_p90']:.3f}"
            line.append(f"{row['over_base']:.3f}× [{spread}]")
    head = ["", f"{BASE} ms", f"{TREE} ms", "tree over base"]
    lines = [[name, *line] for name, line in cells.items()]
    print_table(f"d/H/d_att = {report.rows[0]['shape']}, {graph}", head, lines)
