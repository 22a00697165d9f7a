"""One run of somebody's program, and what it had computed at each step of its optimiser."""

import contextlib
import gc
import io
import random
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from grand_fast.compat import patch, stand_ins
from grand_fast.compat.script import as_program, run_program

# What is compared of a run, each a list of the run's
WHAT = {
    "loss": "loss, of a step",
    "norm": "norm of all gradients, of a step",
    "evaluations": "evaluations of the vector field, of a step",
    "gradient": "gradient by a parameter, at the first step",
}
CLOCKS = {"wall_s": time.perf_counter, "cpu_s": time.process_time}


@dataclass(frozen=True)
class Program:
    """`python script arguments…` in the script's folder, which is to make `epochs` epochs.

    Modules below `repository` are imported anew in each run.
    """

    repository: Path
    script: Path
    arguments: tuple[str, ...]
    epochs: int


@dataclass
class Run:
    """A run of a program, from the start or the step before to each step of its optimiser.

    values: in float64, by the keys of `WHAT`. A loss is the sum of what `backward` was called on;
        evaluations are calls of modules that have `nfe`, as vector fields do that count them; the
        gradient by a parameter is None where it has none.
    seconds: of each clock, the CPU's for all threads of the process.
    code, errors: its exit code, and what it wrote on standard error.
    report: of the patch.
    """

    values: dict[str, list[Any]] = field(default_factory=lambda: {key: [] for key in WHAT})
    seconds: dict[str, list[float]] = field(default_factory=lambda: {key: [] for key in CLOCKS})
    code: int = 0
    errors: str = ""
    report: str = ""


def run(program: Program, mode: Literal["stock", "patched", "reordered"]) -> Run:
    """Run a program once in this process, from the same seeds.

    Args:
        program: what.
        mode: `"stock"`: as it is, though with stand-ins for torch_sparse and torch_scatter where
            these cannot be imported; `"patched"`; `"reordered"`: as it is, but that
            `torch_sparse.spmm` sums the edges in another order, drawn once.
    """
    gc.collect()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    made, errors, script = Run(), io.StringIO(), str(program.script)
    with ExitStack() as stack:
        stack.enter_context(_own_modules(program.repository))
        stack.enter_context(contextlib.chdir(program.script.parent))
        stack.enter_context(as_program(script, program.arguments, is_module=False))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(errors))
        reasons = stack.enter_context(stand_ins())
        if mode == "reordered":
            _reorder(stack)
        applied = stack.enter_context(patch()) if mode == "patched" else None
        _Recorder(made, program.epochs + 1, stack)
        made.code = run_program(script, is_module=False)
        if applied is not None:
            for name, reason in reasons.items():
                applied.report.leave(name, f"{reason}; both have a stand-in")
            made.report = str(applied.report)
    made.errors = errors.getvalue()
    return made


class _Recorder:
    """Fills a run until `stack` ends, and ends the program at the last of so many steps.

    The steps are those of the optimiser that makes the first.
    """

    def __init__(self, made: Run, limit: int, stack: ExitStack) -> None:
        self._made, self._limit = made, limit
        self._optimizer: Optimizer | None = None
        backward = Tensor.backward

        def watched(loss: Tensor, *args: Any, **options: Any) -> None:
            self._loss += loss.detach().double().sum()
            backward(loss, *args, **options)

        Tensor.backward = watched  # type: ignore[method-assign]
        stack.callback(setattr, Tensor, "backward", backward)
        stack.callback(register_optimizer_step_pre_hook(self._before_step).remove)
        stack.callback(register_module_forward_pre_hook(self._before_forward).remove)
        self._begin()

    def _begin(self) -> None:
        self._loss, self._evaluations = torch.zeros((), dtype=torch.float64), 0
        self._start = {key: clock() for key, clock in CLOCKS.items()}

    def _before_forward(self, module: torch.nn.Module, inputs: object) -> None:
        self._evaluations += "nfe" in vars(module)

    def _before_step(self, optimizer: Optimizer, args: object, options: object) -> None:
        end = {key: clock() for key, clock in CLOCKS.items()}
        self._optimizer = self._optimizer or optimizer
        if optimizer is not self._optimizer:
            return
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms = [g.double().norm() for g in gradients if g is not None]
        values, seconds = self._made.values, self._made.seconds
        values["loss"].append(self._loss)
        values["norm"].append(torch.stack(norms).norm() if norms else None)
        values["evaluations"].append(torch.tensor(float(self._evaluations)))
        if not values["gradient"]:
            values["gradient"] = [None if g is None else g.double() for g in gradients]
        for key, now in end.items():
            seconds[key].append(now - self._start[key])
        if len(values["loss"]) == self._limit:
            raise SystemExit
        self._begin()


@contextmanager
def _own_modules(repository: Path) -> Iterator[None]:
    """Forget at the end what was imported from there, for a module may keep what a run has left."""
    before = set(sys.modules)
    try:
        yield
    finally:
        for name in set(sys.modules) - before:
            path = Path(getattr(sys.modules[name], "__file__", None) or "/").resolve()
            if path.is_relative_to(repository) and "site-packages" not in path.parts:
                del sys.modules[name]


def _reorder(stack: ExitStack) -> None:
    import torch_sparse  # which may be a stand-in

    theirs = torch_sparse.spmm

    def spmm(index: Tensor, value: Tensor, m: int, n: int, matrix: Tensor) -> Tensor:
        drawn = torch.randperm(len(value), generator=torch.Generator().manual_seed(0))
        order = drawn.to(value.device)
        product: Tensor = theirs(index[:, order], value[order], m, n, matrix)
        return product

    stack.callback(setattr, torch_sparse, "spmm", theirs)
    torch_sparse.spmm = spmm
