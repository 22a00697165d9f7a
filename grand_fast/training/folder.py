"""The folder of a run: what it is, which seeds are finished, and where a stopped one goes on."""

import io
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import astuple
from itertools import count
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from grand_fast.solvers.solve import SAME_GRADIENTS
from grand_fast.training.checkpoint import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    saved_config,
    write_whole,
    writing,
)
from grand_fast.training.history import METRICS_FILE, TENSORBOARD_FOLDER, Epoch
from grand_fast.training.option_types import BadOptionError
from grand_fast.training.trainer import Fit

CURVES_FILE = "curves.png"
LOCK_FILE = ".lock"
RUN_FILE = "run.json"
SEEDS_FOLDER = "seeds"
_SHOWN_DIFFERENCES = 3

Configuration = Mapping[str, Any]  # what decides the results, as JSON


class NotWritableError(RuntimeError):
    """A place for results cannot be written."""


class RunFolder:
    """A folder that holds one run, or none yet.

    Args:
        path: of the folder; made by `begin`.
        configuration: what decides the results of the run but for the number of its seeds.
        restart: `begin` drops what is there.

    Raises:
        BadOptionError: there is another run. Nothing of it is touched.
    """

    def __init__(self, path: Path, configuration: Configuration, *, restart: bool = False) -> None:
        self.path, self.configuration, self._restart = path, configuration, restart
        self.has_begun = not restart and _holds_run(path)
        # The system drops it with the process, however that ends
        self._lock = FileLock(path / LOCK_FILE, blocking=False)
        self._refuse_another()

    def begin(self) -> None:
        """Make the folder and say in it what the run is, unless that stands there."""
        if self.has_begun:
            return
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        self.lock()
        self._refuse_another()  # which may have come since
        with writing(self.path):
            if self._restart:
                self._clear()
            (self.path / SEEDS_FOLDER).mkdir(exist_ok=True)
        write_whole(self.path / RUN_FILE, _json(self.configuration))
        self.has_begun = True

    def lock(self) -> None:
        """Keep other processes out, if there is a folder, until `close` or this process's end.

        Raises:
            BadOptionError: another process is at work there.
        """
        if self._lock.is_locked or not self.path.is_dir():
            return
        with writing(self.path / LOCK_FILE):
            try:
                self._lock.acquire()
            except Timeout:
                raise BadOptionError(
                    f"{{--out}} must be a folder where no other process trains, got {self.path}. "
                    f"Wait for it, or choose another."
                ) from None

    def close(self) -> None:
        """Let other processes in; does nothing where none was kept out."""
        self._lock.release()

    def state(self, seed: int) -> Path:
        """The file from which an unfinished seed goes on."""
        return self.path / SEEDS_FOLDER / f"{seed}.safetensors"

    def finish(self, seed: int, run: Fit, label_spreading: float | None) -> None:
        """Keep the figures of a seed, whose state is no longer needed."""
        content = {
            "test_accuracy": run.test_accuracy,
            "best_epoch": run.best_epoch,
            "label_spreading": label_spreading,
            "epochs": [astuple(epoch) for epoch in run.history],
        }
        write_whole(self._figures(seed), _json(content))
        self.state(seed).unlink(missing_ok=True)

    def finished(self, seed: int) -> tuple[Fit, float | None] | None:
        """The figures of a finished seed, without weights, and label spreading's; else None."""
        path = self._figures(seed)
        if not self.has_begun or not path.is_file():
            return None
        try:
            content = json.loads(path.read_text())
            run = Fit(
                history=[Epoch(*values) for values in content["epochs"]],
                best_epoch=content["best_epoch"],
                test_accuracy=content["test_accuracy"],
            )
            spread: float | None = content["label_spreading"]
        except (ValueError, KeyError, TypeError) as error:
            raise BadOptionError(
                f"{{--out}} must be a folder with whole files, got {path}, which is damaged: "
                f"{error}. Delete that file, and its seed is trained again."
            ) from error
        self.state(seed).unlink(missing_ok=True)  # of a run killed between the two
        return run, spread

    def all_finished(self) -> dict[int, tuple[Fit, float | None]]:
        """What `finished` gives of each finished seed, in their order."""
        names = [path.stem for path in (self.path / SEEDS_FOLDER).glob("*.json")]
        seeds = sorted(int(name) for name in names if name.isdecimal())
        found = {seed: self.finished(seed) for seed in seeds}
        return {seed: run for seed, run in found.items() if run is not None}

    def forget(self, seed: int) -> None:
        """A finished seed is to be trained again."""
        self._figures(seed).unlink(missing_ok=True)

    def seed_of_weights(self) -> int | None:
        """The seed whose weights lie here, finished or not; None where there are none."""
        config = saved_config(self.path) if self.has_begun else None
        seed = (config or {}).get("seed")
        return seed if isinstance(seed, int) else None

    def _figures(self, seed: int) -> Path:
        return self.path / SEEDS_FOLDER / f"{seed}.json"

    def _refuse_another(self) -> None:
        if not self._restart and (difference := _difference(self.path, self.configuration)):
            raise BadOptionError(
                f"{{--out}} must be a folder without another run, got {self.path}: {difference}. "
                f"Choose another, or {{--restart}}, which deletes that run."
            )

    def _clear(self) -> None:
        for name in (SEEDS_FOLDER, TENSORBOARD_FOLDER):
            shutil.rmtree(self.path / name, ignore_errors=True)
        for name in (METRICS_FILE, CURVES_FILE, WEIGHTS_FILE, CONFIG_FILE, RUN_FILE):
            (self.path / name).unlink(missing_ok=True)


def usual_folder(name: str, configuration: Configuration) -> Path:
    """`runs/<name>`, or `runs/<name>-2` and so on where others hold another run."""
    candidates: Iterator[Path] = (
        Path("runs") / (name if number == 1 else f"{name}-{number}") for number in count(1)
    )
    return next(path for path in candidates if _difference(path, configuration) is None)


def check_writable(folder: Path, option: str) -> None:
    """Fail early if `folder` cannot be written to, or be made.

    Raises:
        NotWritableError: names the option and the path.
    """
    existing = folder.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        if not existing.is_dir():
            raise NotADirectoryError(f"{existing} is not a folder")
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise NotWritableError(
            f"{option} must be a place that can be written, got {folder}: {reason}. Choose another."
        ) from error


def _holds_run(path: Path) -> bool:
    return (path / RUN_FILE).is_file()


def _difference(path: Path, configuration: Configuration) -> str | None:
    """What tells the run in a folder from this one; None if it is the same, or there is none."""
    if not _holds_run(path):
        return f"it holds {WEIGHTS_FILE}" if (path / WEIGHTS_FILE).is_file() else None
    try:
        there = json.loads((path / RUN_FILE).read_text())
    except (OSError, ValueError) as error:
        return f"its {RUN_FILE} cannot be read ({error})"
    here = json.loads(_json(configuration))
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    if {there.get("adjoint"), here.get("adjoint")} <= SAME_GRADIENTS:
        names = [name for name in names if name != "adjoint"]
    if not names:
        return None
    shown = [f"{name} {there.get(name)} there, {here.get(name)} here"
             for name in names[:_SHOWN_DIFFERENCES]]  # fmt: skip
    more = len(names) - len(shown)
    return "; ".join(shown) + (f"; and {more} more" if more else "")


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()


def draw_training_curves(run: Fit, path: Path, *, title: str) -> None:
    """Write a PNG of losses and validation accuracy over epochs, the best epoch marked."""
    # The figure alone, without pyplot: needs no display and leaves a user's backend as it is
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    epochs = range(len(run.history))
    losses.plot(epochs, [epoch.loss for epoch in run.history], label="training")
    losses.plot(epochs, [epoch.val_loss for epoch in run.history], label="validation")
    losses.set(xlabel="epoch", ylabel="cross entropy")
    losses.legend()
    accuracies.plot(epochs, [epoch.val_accuracy for epoch in run.history], color="C1")
    accuracies.plot(
        run.best_epoch,
        run.best.val_accuracy,
        "o",
        color="C3",
        label=f"kept: epoch {run.best_epoch}, test accuracy {run.test_accuracy:.3f}",
    )
    accuracies.set(xlabel="epoch", ylabel="validation accuracy")
    accuracies.legend(loc="lower right")
    figure.suptitle(title)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    write_whole(path, picture.getvalue())
