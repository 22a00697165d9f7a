"""Training: the loop over epochs, and checkpoints of its best weights."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from grand_fast.data import NodeData, Split, accuracy
from grand_fast.graph import Graph
from grand_fast.nn import GRAND
from grand_fast.solvers import SolveError

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamax": torch.optim.Adamax,
    "rmsprop": torch.optim.RMSprop,
}
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class Epoch:
    """One pass: training loss, validation loss and accuracy, evaluations of f in the forward and in
    the backward pass of training, and seconds for training and evaluation together.
    """

    loss: float
    val_loss: float
    val_accuracy: float
    nfe: int
    nfe_backward: int
    seconds: float


@dataclass(eq=False)
class Fit:
    """What a training run reached.

    Attributes:
        history: one `Epoch` each, also for epochs before a stop.
        best_epoch: index of the highest validation accuracy (of equals, the lowest loss); −1 when
            no epoch ended.
        test_accuracy, weights: those of the best epoch; `weights` lies on the CPU.
        stopped: None, `"interrupted"`, or why the training could not go on.
    """

    history: list[Epoch] = field(default_factory=list)
    best_epoch: int = -1
    test_accuracy: float = 0.0
    weights: dict[str, Tensor] = field(default_factory=dict)
    stopped: str | None = None

    @property
    def best(self) -> Epoch:
        """The epoch whose weights are kept."""
        return self.history[self.best_epoch]

    @property
    def seconds_per_epoch(self) -> float:
        """Median, so that an epoch which compiles kernels does not count."""
        return statistics.median(epoch.seconds for epoch in self.history)


def fit(
    model: GRAND,
    data: NodeData,
    graph: Graph,
    split: Split,
    *,
    epochs: int,
    lr: float,
    weight_decay: float = 0.0,
    optimizer: str = "adam",
    label: str = "",
) -> Fit:
    """Train on cross entropy and keep the weights of the best validation epoch in memory.

    Args:
        model: trained in place; on return it holds the best weights.
        data, graph: on the device of `model`; the graph with the self-loops it is to have.
        split: node ids; those of the test set are read for `test_accuracy` alone.
        epochs: full-graph gradient steps.
        lr, weight_decay, optimizer: `optimizer` is one of `OPTIMIZERS`.
        label: of the progress bar, which shows on terminals only.

    Returns:
        The best epoch and the history. An interrupt (Ctrl-C) or a failed solve does not raise:
        `Fit.stopped` tells, and the best weights so far are there.
    """
    from tqdm import trange

    result = Fit()
    steps = OPTIMIZERS[optimizer](model.parameters(), lr=lr, weight_decay=weight_decay)
    try:
        with trange(epochs, desc=f"{label} (compiling)", unit="epoch", disable=None) as bar:
            for index in bar:
                result.stopped = _epoch(model, data, graph, split, steps, result)
                if result.stopped is not None:
                    result.stopped = f"{label}, epoch {index}: {result.stopped}"
                    break
                last = result.history[-1]
                bar.set_description(label, refresh=False)
                bar.set_postfix(
                    loss=f"{last.loss:.3f}",
                    val=f"{last.val_accuracy:.3f}",
                    best=f"{result.best.val_accuracy:.3f}",
                    nfe=last.nfe,
                    s=f"{last.seconds:.2f}",
                )
    except KeyboardInterrupt:
        result.stopped = "interrupted"
    if result.weights:
        model.load_state_dict(result.weights)
    model.eval()
    return result


def _epoch(
    model: GRAND,
    data: NodeData,
    graph: Graph,
    split: Split,
    steps: torch.optim.Optimizer,
    result: Fit,
) -> str | None:
    """One gradient step and one evaluation, noted in `result`; or why it failed."""
    start = time.perf_counter()
    model.train()
    steps.zero_grad()
    loss = functional.cross_entropy(model(data.x, graph)[split.train], data.y[split.train])
    if problem := _problem(model, loss):
        return problem
    try:
        torch.autograd.backward(loss)
    except SolveError as error:  # of the continuous adjoint
        return str(error)
    assert model.stats is not None and model.nfe_backward is not None
    nfe, nfe_backward = model.stats.nfe, model.nfe_backward
    steps.step()

    model.eval()
    with torch.no_grad():
        logits = model(data.x, graph)
        val_loss = functional.cross_entropy(logits[split.val], data.y[split.val])
    if problem := _problem(model, val_loss):
        return problem
    guess = logits.argmax(dim=1)
    val_accuracy = accuracy(guess, data.y, split.val)
    seconds = time.perf_counter() - start
    epoch = Epoch(loss.item(), val_loss.item(), val_accuracy, nfe, nfe_backward, seconds)
    if not result.weights or _rank(epoch) > _rank(result.best):
        weights = {name: w.detach().cpu().clone() for name, w in model.state_dict().items()}
        result.test_accuracy = accuracy(guess, data.y, split.test)
        # Last, so that an interrupt leaves weights and index of one epoch
        result.weights, result.best_epoch = weights, len(result.history)
    result.history.append(epoch)
    return None


def _rank(epoch: Epoch) -> tuple[float, float]:
    return epoch.val_accuracy, -epoch.val_loss


def _problem(model: GRAND, loss: Tensor) -> str | None:
    if failure := model.failure:
        return failure
    if not bool(torch.isfinite(loss)):
        return f"the loss is {loss.item()}: try a smaller learning rate"
    return None


def save_checkpoint(folder: Path | str, weights: dict[str, Tensor], config: dict[str, Any]) -> Path:
    """Write weights (safetensors) and configuration (JSON) into `folder`, whole or not at all.

    Args:
        folder: made if missing; an earlier checkpoint in it is replaced.
        weights: `model.state_dict()`.
        config: `config["model"]` holds the arguments of `GRAND`; anything else is for readers.

    Returns:
        The path of the weights.
    """
    from safetensors.torch import save

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (
        (CONFIG_FILE, json.dumps(config, indent=2).encode()),
        (WEIGHTS_FILE, save(weights)),
    ):
        # A rename is atomic: an interrupt leaves the old file or the new one
        part = folder / f"{name}.part"
        part.write_bytes(content)
        os.replace(part, folder / name)
    return folder / WEIGHTS_FILE


def load_checkpoint(folder: Path | str) -> GRAND:
    """The model saved in `folder`, on the CPU and in evaluation mode.

    Raises:
        FileNotFoundError: the folder holds no checkpoint. ValueError: its files do not fit.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"load_checkpoint: `folder` must hold {name}, got {folder} without it. "
                f"`grand-fast train --out {folder}` writes one."
            )
    try:
        model = GRAND(**json.loads((folder / CONFIG_FILE).read_text())["model"])
        model.load_state_dict(load_file(folder / WEIGHTS_FILE))
    except Exception as error:  # each of three file formats has errors of its own
        raise ValueError(f"load_checkpoint: {folder} does not hold a model: {error}") from error
    return model.eval()
