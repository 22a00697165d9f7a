"""The trees of `python -m bench ops --base`: a commit checked out, and a process for each tree."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch

from bench.core.harness import PAUSE_S
from bench.core.problem import Mode

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("base_worker.py")


def find_commit(name: str) -> str:
    """The hash of a commit, by whatever git knows it.

    Raises:
        ValueError: there is none, or this is not a checkout.
    """
    try:
        top = git("rev-parse", "--show-toplevel")
    except ValueError:
        top = ""
    if not top or not Path(top).samefile(ROOT):
        raise ValueError(f"base: {ROOT} is not a git checkout, so there is no commit to compare.")
    try:
        return git("rev-parse", "--verify", f"{name}^{{commit}}")
    except ValueError:
        raise ValueError(
            f"base: {ROOT} has no commit {name!r}; `git fetch` brings what only its remote has."
        ) from None


@contextlib.contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """A temporary worktree, alone in a temporary folder; both go at the end, however it comes."""
    # `timeout` sends it, and Python would end without doing what is below
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with tempfile.TemporaryDirectory(prefix="grand-fast-base-") as folder:
            tree = Path(folder) / "tree"
            try:
                git("worktree", "add", "--detach", str(tree), commit)
                yield tree
            finally:
                with contextlib.suppress(ValueError):  # it could not be added
                    # --force twice: also while it is locked, as it is until all is checked out
                    git("worktree", "remove", "--force", "--force", str(tree))
    finally:
        signal.signal(signal.SIGTERM, before)


def git(*arguments: str) -> str:
    """What a git command prints; ValueError with the last line of its complaint."""
    try:
        result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        raise OSError("base: needs git, which is not installed.") from None
    if result.returncode:
        raise ValueError(f"base: git {arguments[0]}: {_last_line(result.stderr)}")
    return result.stdout.strip()


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it said nothing."])[-1]


class WorkerError(Exception):
    """A tree cannot do what was asked of it: its name, and why."""


class Worker:
    """The process of one tree."""

    def __init__(self, name: str, process: subprocess.Popen[str], errors: IO[str]) -> None:
        self.name, self._process, self._errors = name, process, errors

    def answer(self) -> dict[str, Any]:
        """The next line that it writes.

        Raises:
            WorkerError: it says that it cannot. ChildProcessError: it has ended.
        """
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._errors.seek(0)
            last = _last_line(self._errors.read())
            raise ChildProcessError(f"base: the process of the {self.name} ended ({code}): {last}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(self.name, answer["error"])
        return answer

    def ask(self, **request: object) -> dict[str, Any]:
        """The answer to one request; raises as `answer` does."""
        with contextlib.suppress(BrokenPipeError):  # it has ended: `answer` says so
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return self.answer()

    def seconds(self, mode: Mode) -> float:
        """Of one call."""
        return float(self.ask(do="run", mode=mode, pause=PAUSE_S)["seconds"])


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
            with contextlib.suppress(BrokenPipeError):  # what it did not read
                process.stdin.close()
