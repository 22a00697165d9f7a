"""What is measured of each epoch, as a CSV file and, where it is installed, for TensorBoard."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import torch
from torch import Tensor

from grand_fast.training.checkpoint import write_whole, writing

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

METRICS_FILE = "metrics.csv"
TENSORBOARD_FOLDER = "tensorboard"


@dataclass(frozen=True)
class Epoch:
    """One gradient step and one evaluation.

    loss:   of training, penalties included.
    val_loss, val_accuracy: of validation, at `time`.
    nfe, nfe_backward: evaluations of f in the forward and in the backward pass of training.
    seconds: of training and evaluation together.
    peak_memory_bytes: most bytes held at once since the process began, by tensors on a GPU, else
        by the process.
    time:   diffusion time of the evaluation: T, or the best one with early stopping.
    """

    loss: float
    val_loss: float
    val_accuracy: float
    nfe: int
    nfe_backward: int
    seconds: float
    peak_memory_bytes: int
    time: float


COLUMNS = ("seed", "epoch", *(field.name for field in fields(Epoch)))


def history_tensor(history: Sequence[Epoch]) -> Tensor:
    """`[epochs, fields]` in float64, which holds every value exactly."""
    rows = [astuple(epoch) for epoch in history]
    return torch.tensor(rows, dtype=torch.float64).view(len(rows), len(fields(Epoch)))


def history_of(table: Tensor) -> list[Epoch]:
    """What `history_tensor` was made of."""
    kinds: list[type] = [float if field.type == "float" else int for field in fields(Epoch)]
    return [
        Epoch(*(kind(value) for kind, value in zip(kinds, row, strict=True)))
        for row in table.tolist()
    ]


class Metrics:
    """Writes the epochs of a run's seeds into a folder, from the first one on.

    Args:
        folder: of the run; `metrics.csv` there gets one row an epoch.
        done: seed and history of those trained before; other rows of an earlier file are dropped.
    """

    def __init__(self, folder: Path, done: Iterable[tuple[int, Sequence[Epoch]]] = ()) -> None:
        self._folder, self._done = folder, done
        self._file: TextIO | None = None
        self._board: SummaryWriter | None = None
        self._seed: int | None = None

    def begin(self) -> None:
        """Write the rows of what was done before, unless that is done."""
        if self._file is not None:
            return
        lines = [",".join(COLUMNS) + "\n"]
        for seed, history in self._done:
            lines += [_row(seed, index, epoch) for index, epoch in enumerate(history)]
        path = self._folder / METRICS_FILE
        write_whole(path, "".join(lines).encode())
        # A line at a time, for those who watch
        self._file = open(path, "a", buffering=1)  # noqa: SIM115  # closed by `close`

    def add(self, seed: int, index: int, epoch: Epoch) -> None:
        """Write one epoch; those of a seed come one after another."""
        self.begin()
        assert self._file is not None
        with writing(self._folder / METRICS_FILE):
            self._file.write(_row(seed, index, epoch))
        with writing(self._folder / TENSORBOARD_FOLDER):
            if seed != self._seed:
                self._begin_board(seed, index)
            if self._board is not None:
                for field in fields(Epoch):
                    self._board.add_scalar(field.name, getattr(epoch, field.name), index)

    def close(self) -> None:
        """Write what is left and close the files; nothing more will come."""
        if self._file is not None:
            with writing(self._folder / METRICS_FILE):
                self._file.close()
        if self._board is not None:
            self._board.close()

    def _begin_board(self, seed: int, index: int) -> None:
        self._seed = seed
        if importlib.util.find_spec("tensorboard") is None:
            return
        from torch.utils.tensorboard import SummaryWriter

        if self._board is not None:
            self._board.close()
        # What a killed run wrote from this epoch on is hidden
        folder = self._folder / TENSORBOARD_FOLDER / f"seed-{seed}"
        self._board = SummaryWriter(str(folder), purge_step=index)


def _row(seed: int, index: int, epoch: Epoch) -> str:
    return ",".join(str(value) for value in (seed, index, *astuple(epoch))) + "\n"
