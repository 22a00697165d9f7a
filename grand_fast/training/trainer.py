"""One epoch of training after another, and the state between two of them."""

import inspect
import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.optim import Optimizer

from grand_fast.data.datasets import NodeData, Split, accuracy
from grand_fast.graph import Graph
from grand_fast.nn import GRAND
from grand_fast.solvers import SolveError
from grand_fast.training.checkpoint import (
    load_state,
    random_state,
    save_state,
    set_random_state,
    writing,
)
from grand_fast.training.environment import peak_memory_bytes
from grand_fast.training.history import Epoch, history_of, history_tensor
from grand_fast.training.option_types import BadOptionError

CRITERIA = ("accuracy", "loss")  # of validation, by which the best epoch is chosen


@dataclass(eq=False)
class Fit:
    """What a training run reached.

    Attributes:
        history: one `Epoch` each, also for epochs before a stop.
        best_epoch: index of the highest validation accuracy (of equals, the lowest loss), or of the
            lowest loss; −1 when no epoch ended.
        guess, weights: the classes `[N]` that the best epoch gives, and its weights; on the CPU.
        test_accuracy: of `guess`; the labels of the test set are read once, for it, at the end.
        stopped: None, `"interrupted"`, or why the training could not go on.
    """

    history: list[Epoch] = field(default_factory=list)
    best_epoch: int = -1
    guess: Tensor | None = None
    weights: dict[str, Tensor] = field(default_factory=dict)
    test_accuracy: float = 0.0
    stopped: str | None = None

    @property
    def best(self) -> Epoch:
        """The epoch whose weights are kept."""
        return self.history[self.best_epoch]

    @property
    def seconds_per_epoch(self) -> float:
        """Median, so that an epoch which compiles kernels does not count."""
        return statistics.median(epoch.seconds for epoch in self.history)


@dataclass(frozen=True)
class Trainer:
    """What an epoch needs, all on one device; see `fit` for each."""

    model: GRAND
    data: NodeData
    graph: Graph
    split: Split
    optimizer: Optimizer
    early_stop: float
    penalties: Mapping[str, float]
    entropy: float
    entropy_warmup: int
    use_labels: bool
    select: str

    def epoch(self, result: Fit) -> str | None:
        """One gradient step and one evaluation, noted in `result`; or why it failed."""
        start = time.perf_counter()
        try:
            loss = self._step(len(result.history))
            assert self.model.stats is not None and self.model.nfe_backward is not None
            nfe, nfe_backward = self.model.stats.nfe, self.model.nfe_backward
            guess, at, val_loss, val_accuracy = self._evaluate()
        except SolveError as error:
            return str(error)
        seconds = time.perf_counter() - start
        memory = peak_memory_bytes(self.data.x.device)
        epoch = Epoch(loss, val_loss, val_accuracy, nfe, nfe_backward, seconds, memory, at)
        is_better = result.guess is None or self._rank(epoch) > self._rank(result.best)
        result.history.append(epoch)  # first: an interrupt leaves weights and index of one epoch
        if is_better:
            state = self.model.state_dict()
            weights = {name: w.detach().to("cpu", copy=True) for name, w in state.items()}
            best = (guess.cpu(), weights, len(result.history) - 1)
            result.guess, result.weights, result.best_epoch = best
        return None

    def _step(self, epoch: int) -> float:
        """The loss before one step of the optimiser; some ask for it more than once."""
        self.model.train()
        value = float("nan")

        def loss_and_gradients() -> float:
            nonlocal value
            self.optimizer.zero_grad()
            loss = self._loss(epoch)
            torch.autograd.backward(loss)
            value = loss.item()
            return value

        self.optimizer.step(loss_and_gradients)
        return value

    def _loss(self, epoch: int) -> Tensor:
        targets, known = self.split.train, None
        if self.use_labels:
            order = targets[torch.randperm(targets.numel()).to(targets.device)]
            half = targets.numel() // 2
            known, targets = self._known(order[:half]), order[half:]
        logits = self.model(self.data.x, self.graph, known)
        loss = functional.cross_entropy(logits[targets], self.data.y[targets])
        for name, weight in self.penalties.items():
            loss = loss + weight * self.model.penalties[name].mean()
        if self.entropy > 0:
            weight = self.entropy * min(1.0, (epoch + 1) / (self.entropy_warmup + 1))
            log_p = functional.log_softmax(logits, dim=1)
            loss = loss - weight * (log_p.exp() * log_p).sum(dim=1).mean()
        self._check(loss)
        return loss

    @torch.no_grad()
    def _evaluate(self) -> tuple[Tensor, float, float, float]:
        """Classes `[N]`, their diffusion time, and their loss and accuracy in validation."""
        self.model.eval()
        known = self._known(self.split.train) if self.use_labels else None
        if self.early_stop == 1:
            states = [(float(self.model.solve.T), self.model(self.data.x, self.graph, known))]
        else:
            end = self.early_stop * self.model.solve.T
            states = self.model.trajectory(self.data.x, self.graph, end, known)
        found = []
        for at, logits in states:
            val_loss = functional.cross_entropy(logits[self.split.val], self.data.y[self.split.val])
            self._check(val_loss)
            guess = logits.argmax(dim=1)
            share = accuracy(guess, self.data.y, self.split.val)
            found.append((guess, at, val_loss.item(), share))
        return max(found, key=lambda at: rank(self.select, at[3], at[2]))

    def _rank(self, epoch: Epoch) -> tuple[float, float]:
        return rank(self.select, epoch.val_accuracy, epoch.val_loss)

    def _known(self, ids: Tensor) -> Tensor:
        """The labels of some nodes as input `[N, classes]`: one-hot rows, and zeros elsewhere."""
        shape = (self.data.num_nodes, self.data.num_classes)
        known = torch.zeros(shape, dtype=self.data.x.dtype, device=ids.device)
        known[ids, self.data.y[ids]] = 1.0
        return known

    def _check(self, loss: Tensor) -> None:
        if failure := self.model.failure:
            raise SolveError(failure)
        if not bool(torch.isfinite(loss)):
            raise SolveError(f"the loss is {loss.item()}: try a smaller learning rate")

    def save(self, path: Path, result: Fit) -> None:
        """Write all that decides how the training goes on."""
        content = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": random_state(self.data.x.device),
            "history": history_tensor(result.history),
            "best_epoch": result.best_epoch,
            "guess": result.guess,
            "weights": result.weights,
        }
        with writing(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
        save_state(path, content)

    def resume(self, path: Path) -> Fit:
        """Put the model, its optimiser and the random numbers where they were."""
        try:
            content = load_state(path)
            self.model.load_state_dict(content["model"])
            self.optimizer.load_state_dict(content["optimizer"])
            set_random_state(content["random"], self.data.x.device)
            return Fit(
                history_of(content["history"]),
                content["best_epoch"],
                content["guess"],
                content["weights"],
            )
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise BadOptionError(
                f"fit: `state` must be that of this model and these options, got {path}: {error}. "
                f"Delete it, or train with {{--restart}}."
            ) from error


def rank(select: str, accuracy: float, loss: float) -> tuple[float, float]:
    """The larger, the better in validation, by one of `CRITERIA`."""
    return (accuracy, -loss) if select == "accuracy" else (-loss, accuracy)


# SparseAdam takes sparse gradients only, and ours are dense
_OTHERS = (Optimizer, torch.optim.SparseAdam)
OPTIMIZERS: dict[str, type[Optimizer]] = {
    name.lower(): kind
    for name, kind in sorted(vars(torch.optim).items(), key=lambda item: item[0].lower())
    if isinstance(kind, type) and issubclass(kind, Optimizer) and kind not in _OTHERS
}


def make_optimizer(
    name: str, parameters: Iterable[Tensor], *, lr: float, weight_decay: float = 0.0
) -> Optimizer:
    """An optimiser with its own defaults but for these two.

    Args:
        name: of a class in `torch.optim`, in any case.
        parameters: what it changes.
        lr, weight_decay: as that class understands them.

    Raises:
        BadOptionError: unknown name, a weight decay where there is none to set, or parameters that
            it does not take.
    """
    kind = OPTIMIZERS.get(name.lower())
    if kind is None:
        raise BadOptionError(
            f"fit: `optimizer` must be one of {', '.join(OPTIMIZERS)}, got {name!r}."
        )
    options: dict[str, Any] = {"lr": lr}
    if "weight_decay" in inspect.signature(kind).parameters:
        options["weight_decay"] = weight_decay
    elif weight_decay:
        raise BadOptionError(
            f"fit: `weight_decay` must be 0 with {kind.__name__}, which has none, got "
            f"{weight_decay:g}."
        )
    try:
        return kind(parameters, **options)
    except ValueError as error:
        raise BadOptionError(
            f"fit: `optimizer` must take this model and these options, got {kind.__name__}: {error}"
        ) from error
