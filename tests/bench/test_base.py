"""The working tree against another commit: ratios, what is refused, and what is left behind."""

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest

from bench.__main__ import main
from bench.core.problem import Shape
from bench.core.report import Report
from bench.ops import base, base_trees, base_worker
from grand_fast.testing import random_graph

ROOT = Path(__file__).parents[2]
Fails = Callable[..., str]
CASES = (base.Case("csr_diffusion"), base.Case("edge_attention"))
SMALL = ["--nodes", "200", "--channels", "8", "--heads", "1", "--attention-channels", "1",
         "--rounds", "2", "--threads", "1"]  # fmt: skip
# Appended to the operators of the base
OTHER = """
del edge_attention
_right = csr_diffusion


def csr_diffusion(*arguments, **options):
    return 1.01 * _right(*arguments, **options)
"""


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost", *arguments]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if result.returncode:
        raise OSError(result.stderr)
    return result.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone, with the tag `other` on a commit of which one operator differs and one is gone."""
    folder = tmp_path_factory.mktemp("clone") / "checkout"
    try:
        _git(ROOT, "clone", "--quiet", str(ROOT), str(folder))
    except OSError as error:
        pytest.skip(f"cannot clone {ROOT}: {error}")
    ops = folder / "grand_fast" / "ops" / "__init__.py"
    ops.write_text(ops.read_text() + OTHER)
    _git(folder, "commit", "--quiet", "--all", "--message", "Other operators")
    _git(folder, "tag", "other")
    _git(folder, "reset", "--quiet", "--hard", "HEAD~1")
    return folder


@pytest.fixture
def clone(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> Path:
    """The clone as the working tree, one case, and a folder of their own for temporary files."""
    monkeypatch.setattr(base, "ROOT", checkout)
    monkeypatch.setattr(base_trees, "ROOT", checkout)
    monkeypatch.setattr(base, "CASES", CASES[:1])
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    return checkout


def _nothing_left(clone: Path, tmp_path: Path) -> bool:
    worktrees = _git(clone, "worktree", "list").splitlines()
    return len(worktrees) == 1 and not any(tmp_path.rglob("grand-fast-base-*"))


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Fails:
    """The one line on standard error of a run that must end with 2."""

    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as stop:
            main(["ops", *SMALL, *arguments])
        assert stop.value.code == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if " steps, " not in line]
        assert len(lines) == 1
        return lines[0]

    return run


def test_ratio_of_a_dirty_tree(
    clone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = clone / "grand_fast" / "_version.py"
    text = changed.read_text()
    changed.write_text(text + "\n# not committed\n")
    try:
        code = main(["ops", *SMALL, "--base", "HEAD", "--json", str(tmp_path / "base.json")])
    finally:
        changed.write_text(text)
    out = capsys.readouterr().out
    assert code == 0, out
    values = json.loads((tmp_path / "base.json").read_text())
    commit = _git(clone, "describe", "--always").strip()
    assert values["header"]["base_commit"] == commit and f"over base {commit}" in out
    assert [(row["competitor"], row["mode"]) for row in values["rows"]] == [
        (name, mode) for mode in ("forward", "forward+backward") for name in (base.BASE, base.TREE)
    ]
    for row in values["rows"]:
        assert row["median_s"] > 0 and row["rounds"] == 2 and row["op"] == "csr_diffusion"
        assert ("over_base" in row) == (row["competitor"] == base.TREE)
        if "over_base" in row:
            assert 0 < row["over_base_p10"] <= row["over_base"] <= row["over_base_p90"]
            assert f"{row['over_base']:.3f}× [" in out
    assert _nothing_left(clone, tmp_path)


def test_a_base_with_other_results_gets_no_number(
    clone: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nor does one that lacks the operator."""
    monkeypatch.setattr(base, "CASES", CASES)
    path = tmp_path / "base.json"
    assert main(["ops", *SMALL, "--base", "other", "--json", str(path)]) == 1
    out = capsys.readouterr().out
    assert "NOT TIMED, disagrees with the base: csr_diffusion: " in out and "×" not in out
    assert "Skipped: edge_attention: the base cannot run it: AttributeError" in out
    values = json.loads(path.read_text())
    assert len(values["failed"]) == len(values["skipped"]) == 1 and not values["rows"]
    assert _nothing_left(clone, tmp_path)


def test_a_base_that_lacks_every_operator(
    clone: Path, monkeypatch: pytest.MonkeyPatch, fails: Fails
) -> None:
    def skip(case: base.Case, *arguments: object) -> None:
        report = next(a for a in arguments if isinstance(a, Report))
        report.skipped.append(f"{case}: gone.")

    monkeypatch.setattr(base, "worker", lambda *_: contextlib.nullcontext(Mock()))
    monkeypatch.setattr(base, "_measure", skip)
    line = fails("--base", "HEAD")
    assert "nothing can be compared. csr_diffusion: gone" in line


def test_an_unknown_commit(clone: Path, fails: Fails) -> None:
    assert "has no commit 'nonsense'" in fails("--base", "nonsense")


def test_no_checkout(
    clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: Fails
) -> None:
    monkeypatch.setattr(base_trees, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert "is not a git checkout" in fails("--base", "HEAD")


@pytest.mark.parametrize("option", [["--all"], ["--out", "plots"]], ids=lambda option: option[0])
def test_options_that_mean_nothing(
    option: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: Fails
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "neither --all nor --out" in fails("--base", "HEAD", *option)


@pytest.mark.parametrize("interrupt", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_the_worktree_goes_when_interrupted(
    interrupt: signal.Signals, clone: Path, tmp_path: Path
) -> None:
    with (
        pytest.raises((KeyboardInterrupt, SystemExit)),
        base_trees.checked_out("HEAD") as tree,
    ):
        assert (tree / "grand_fast" / "kernels" / "__init__.py").is_file()
        assert not _nothing_left(clone, tmp_path)
        os.kill(os.getpid(), interrupt)
        signal.sigtimedwait([], 10)  # until it arrives
    assert _nothing_left(clone, tmp_path)


def test_the_package_must_be_the_trees(tmp_path: Path) -> None:
    """An installed one may be imported in its place."""
    here = ROOT / "grand_fast"
    with pytest.raises(ImportError, match=f"grand_fast comes from {here}, not from {tmp_path}"):
        base_worker._load(tmp_path, "graph.npz")


def test_a_worker_that_ends_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "worker.py"
    script.write_text("import sys\nprint('{}', flush=True)\nsys.exit('out of luck')\n")
    monkeypatch.setattr(base_trees, "WORKER", script)
    with (
        pytest.raises(ChildProcessError, match=r"process of the base ended \(1\): out of luck"),
        base_trees.worker("base", tmp_path, tmp_path / "graph.npz") as worker,
    ):
        worker.answer()
        worker._process.wait()
        worker.ask(do="run", mode="forward", pause=0)


class Spy:
    """A worker that takes some seconds, and writes down when it is asked."""

    def __init__(self, name: str, seconds: float, order: list[tuple[str, str]]) -> None:
        self.name, self._seconds, self._order = name, seconds, order

    def ask(self, **request: object) -> None:
        pass

    def seconds(self, mode: str) -> float:
        self._order.append((self.name, mode))
        return self._seconds


def test_who_goes_first_changes_from_round_to_round() -> None:
    order: list[tuple[str, str]] = []
    seconds = base._time((Spy("base", 1, order), Spy("tree", 1, order)), 2)
    warm_up, counted = order[:4], order[4:]
    assert sorted(warm_up) == sorted(counted[:4])
    forward = [name for name, mode in counted if mode == "forward"]
    assert forward == ["base", "tree", "tree", "base"]
    assert all(len(values) == 2 for values in seconds.values())


def test_the_ratio_is_the_trees_time_over_the_bases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "_compare", lambda *_: None)
    workers = Spy(base.BASE, 2.0, []), Spy(base.TREE, 3.0, [])
    report = Report("ops", {"graph": "random"})
    base._measure(CASES[0], workers, random_graph("path"), Shape(8, 1, 1), 3, tmp_path, report)
    assert [row.get("over_base") for row in report.rows] == [None, 1.5] * 2
