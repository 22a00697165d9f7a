"""`patch`: other people's GRAND code on our kernels, without an edit, until it is removed."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Literal

import torch
from torch import nn

from grand_fast.compat import active, graphs, solver, spmm, steps
from grand_fast.compat.options import Options, Report
from grand_fast.compat.replacing import hook_classes, replace, unhook_classes
from grand_fast.solvers.torchdiffeq import package

_OPTIONS = ("spmm", "attention", "fields", "solver", "early_stop")
_OF_CLASSES = ("attention", "fields")


def patch(
    target: nn.Module | None = None,
    *,
    spmm: bool = True,
    attention: bool = True,
    fields: Literal["known"] | None = "known",
    solver: Literal["same", "exact"] | None = "same",
    early_stop: bool = True,
    verify: bool = True,
) -> Patch:
    """Run code written for torch_sparse and torchdiffeq on these kernels and solvers, from now on.

    What is not known to be the same, or does not agree when tried, runs as it was, and `report`
    says why. Patches may be nested: the last one that covers a call answers it. They are removed in
    the reverse order.

    Args:
        target: None for the whole process, best before the model is built; or a model, whose own
            forward alone is then changed.
        spmm: `torch_sparse.spmm` multiplies by our kernel, on a graph kept for the edge index.
        attention: layers like `SpGraphTransAttentionLayer` return weights that are computed when
            read; where they reach `spmm` with the state they are of, one pass computes both.
        fields: whole vector fields as one operator; `"known"`: those whose code is known, token by
            token: the released transformer and Laplacian. None: all are run by the two hooks above.
        solver: `"same"`: `torchdiffeq.odeint` and `odeint_adjoint` are ours, with the same steps;
            `"exact"`: and the latter's gradients go through every stage, also to what `func` was
            given of tensors that are no parameters of its own (attention that is computed once),
            which the released adjoint leaves untrained; None: they stay.
        early_stop: Runge-Kutta solvers that derive from torchdiffeq's, as those that stop early
            along the trajectory, sum their slopes in one pass, where no gradient is asked for.
        verify: a layer is replaced only if a copy of it with random weights agrees with its own
            forward, values and gradients; False: believe the layer's options.

    Returns:
        The patch: `remove()` puts everything back, as does leaving it as a context manager.

    Raises:
        TypeError, ValueError: an option is none of these. RuntimeError: the model is patched
            already. Nothing is changed then.
    """
    made = Patch(target, spmm, attention, fields, solver, early_stop, verify)
    made._apply()
    return made


class Patch(Options):
    """A patch at work, until `remove`.

    Attributes:
        target: the model, or None for the process and once it is removed.
        report: what it did so far, a `Report`.
    """

    _undo: ExitStack | None = None
    _whose = "the process"

    @property
    def is_active(self) -> bool:
        """Whether it is at work."""
        return self in active.stack

    def _apply(self) -> None:
        if self.target is not None and any(p.target is self.target for p in active.stack):
            raise RuntimeError("patch: this model is patched already. Remove that patch first.")
        with ExitStack() as undo:  # an error on the way takes back what was done
            for option in _OPTIONS:
                if getattr(self, option):
                    _install(option, self.report)
                    undo.callback(_release, option)
            if self.target is not None:
                self._whose = type(self.target).__name__
                _cover(self, self.target, undo)
            active.stack.append(self)
            self._undo = undo.pop_all()

    def remove(self) -> None:
        """Put everything back.

        Raises:
            RuntimeError: it is not at work, or one applied after it still is. Nothing is changed.
        """
        if not self.is_active:
            raise RuntimeError("patch: this one is not at work: it was removed already.")
        if active.stack[-1] is not self:
            raise RuntimeError("patch: one that was applied later is at work. Remove that first.")
        active.stack.pop()
        undo, self._undo = self._undo, None
        assert undo is not None
        undo.close()
        self.target = None  # the model may go while the report stays
        if not active.stack:
            graphs.forget()

    def __enter__(self) -> Patch:
        if not self.is_active:
            raise RuntimeError("patch: this one was removed. Make another.")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None and not self.is_active:
            self.remove()  # which says that it was
        if remove_through(self) and error is None:
            raise RuntimeError(
                "patch: one that was applied inside was at work when this one's block ended. Both "
                "are removed. Remove that first."
            )

    def __repr__(self) -> str:
        return f"<Patch of {self._whose}, {'at work' if self.is_active else 'removed'}>"


def remove_through(patch: Patch) -> int:
    """Remove a patch, if it is at work, and those applied after it; how many these were."""
    later = 0
    while patch.is_active:
        last = active.stack[-1]
        assert isinstance(last, Patch)
        last.remove()
        later += last is not patch
    return later


_users = dict.fromkeys(_OPTIONS, 0)  # patches that need the replacements in place
_replaced: dict[str, list[tuple[Callable[..., Any], Callable[..., Any]]]] = {}


def _install(option: str, report: Report) -> None:
    if _users[option] == 0:
        _replaced[option] = _replacements(option, report)
        replace(_replaced[option])
        if option in _OF_CLASSES:
            hook_classes(option)
        elif option == "early_stop" and (reason := steps.install()) is not None:
            report.leave(steps.NAME, reason)
    _users[option] += 1


def _release(option: str) -> None:
    _users[option] -= 1
    if _users[option] == 0:
        replace((new, old) for old, new in _replaced.pop(option))
        if option in _OF_CLASSES:
            unhook_classes(option)
        elif option == "early_stop":
            steps.uninstall()


def _replacements(option: str, report: Report) -> list[tuple[Any, Any]]:
    if option == "solver":
        return list(zip(package.solvers(), (solver.odeint, solver.odeint_adjoint), strict=True))
    if option == "spmm":
        theirs = _torch_sparse(report)
        if theirs is not None:
            spmm.Theirs.spmm = theirs
            return [(theirs, spmm.spmm)]
    return []


def _torch_sparse(report: Report) -> Callable[..., Any] | None:
    if "torch_sparse" not in sys.modules and importlib.util.find_spec("torch_sparse") is None:
        report.leave("torch_sparse", "it is not installed")
        return None
    try:
        found: Callable[..., Any] = importlib.import_module("torch_sparse").spmm
    except Exception as error:  # built for another torch, most often: an OSError
        reason = f"it cannot be imported: {type(error).__name__}: {error}"
        report.leave("torch_sparse", reason.splitlines()[0])
        return None
    if not _multiplies(found):
        report.leave("torch_sparse.spmm", "it is another function than that of torch_sparse")
        return None
    return found


def _multiplies(theirs: Callable[..., Any]) -> bool:
    """Whether a function is `spmm`, and not one of the user's own by its name."""
    index = torch.tensor([[0, 2, 2], [1, 0, 1]], device="cpu")
    value, matrix = torch.tensor([[2.0, 3.0, 5.0], [7.0, 11.0, 13.0]], dtype=torch.float64,
                                 device="cpu")  # fmt: skip
    expected = [[22.0], [0.0], [76.0]]
    named = {"index": index, "value": value, "m": 3, "n": 3, "matrix": matrix.unsqueeze(1)}
    try:
        found = theirs(*named.values()), theirs(**named)
        return all(one.tolist() == expected for one in found)
    except Exception:  # whatever it is, it is not that one
        return False


def _cover(patch: Patch, model: nn.Module, undo: ExitStack) -> None:
    """Let calls from within the forward of the model's own modules be known as such."""
    solvers = _replacements("solver", patch.report) if patch.solver else []
    for module in model.modules():
        if type(module).__module__.startswith("torch.") and module is not model:
            continue
        active.covered[module] = (*active.patches_of(module), patch)
        undo.callback(_uncover, module, patch)
        undo.callback(module.register_forward_pre_hook(active.enter).remove)
        undo.callback(module.register_forward_hook(active.leave, always_call=True).remove)
        for name, value in list(vars(module).items()):
            for theirs, ours in solvers:
                if value is theirs:
                    setattr(module, name, ours)
                    undo.callback(_put_back, module, name, ours, theirs)


def _uncover(module: nn.Module, patch: Patch) -> None:
    left = tuple(p for p in active.patches_of(module) if p is not patch)
    if left:
        active.covered[module] = left
    else:
        del active.covered[module]


def _put_back(module: nn.Module, name: str, ours: Any, theirs: Any) -> None:
    if vars(module).get(name) is ours:
        setattr(module, name, theirs)
