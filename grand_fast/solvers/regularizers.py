"""Regularisers of a solve: how much `f` does on its way, integrated beside the state."""

import math
from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor

from grand_fast.solvers.checks import UnsupportedOptionError, check_choice
from grand_fast.solvers.combination import check_field
from grand_fast.solvers.owned import owned
from grand_fast.solvers.solution import Status
from grand_fast.solvers.solve import Regularizer
from grand_fast.solvers.solver import AbstractSolver
from grand_fast.solvers.term import AbstractTerm
from grand_fast.solvers.time_loop import Result

REGULARIZERS = get_args(Regularizer)


class RegularizedTerm(AbstractTerm):
    """`f` and the rates of its penalties, in one flat state: `x`, then `[N]` values of each.

    The method integrates them all alike: a penalty is as accurate as the state is, and an adaptive
    step counts its error. In that form `f` is needed itself: a term's fused update is not used.

    Args:
        term, names: what is integrated, and which penalties.
        x0: a state, of which shape, dtype and device count.
        generator: of the probe, random signs like `x0`, the same for every evaluation.
    """

    def __init__(
        self,
        term: AbstractTerm,
        names: Sequence[str],
        x0: Tensor,
        generator: torch.Generator | None,
    ) -> None:
        self.term, self.names, self.shape = term, names, x0.shape
        self.sizes = (x0.numel(), *(x0.shape[0] for _ in names))
        self.needs_derivatives = any(name != "kinetic" for name in names)
        self.probe: Tensor | None = None
        if "jacobian" in names or "divergence" in names:
            signs = torch.randint(2, x0.shape, generator=generator, device=x0.device)
            self.probe = (2 * signs - 1).to(x0.dtype)

    def join(self, x: Tensor) -> Tensor:
        """The flat state of `x` and penalties of 0."""
        return torch.cat([x.flatten(), x.new_zeros(sum(self.sizes[1:]))])

    def split(self, flat: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The state and the penalties, `[N]` each, of a flat state."""
        x, *penalties = flat.split(self.sizes)
        return x.view(self.shape), dict(zip(self.names, penalties, strict=True))

    def tensors(self) -> tuple[Tensor, ...]:
        """Those that the inner term depends on."""
        return self.term.tensors()

    def vf(self, t: float, x: Tensor) -> Tensor:
        """`f` and the rates, flat; without a graph only where gradients are disabled."""
        state, _ = self.split(x)
        is_recorded = torch.is_grad_enabled()
        with torch.set_grad_enabled(is_recorded or self.needs_derivatives):
            if self.needs_derivatives and not (is_recorded and state.requires_grad):
                state = state.detach().requires_grad_()
            f = owned(check_field(self.term.vf(t, state), state))  # autograd saves it
            rates = self._rates(state, f, is_recorded)
        flat = torch.cat([f.flatten(), *rates])
        return flat if is_recorded else flat.detach()

    def _rates(self, x: Tensor, f: Tensor, is_recorded: bool) -> list[Tensor]:
        def pull(v: Tensor) -> Tensor:  # Jᵀ v
            if not f.requires_grad:
                return torch.zeros_like(x)
            (g,) = torch.autograd.grad(
                f, x, v, create_graph=is_recorded, retain_graph=True, materialize_grads=True
            )
            return g

        rates: dict[str, Tensor] = {}
        if "kinetic" in self.names:
            rates["kinetic"] = 0.5 * _channels(f, f).mean(1)
        if "directional" in self.names:
            g = pull(f if is_recorded else f.detach())
            rates["directional"] = 0.5 * _channels(g, g).mean(1)
        if self.probe is not None:
            g = pull(self.probe)
            if "jacobian" in self.names:
                rates["jacobian"] = _channels(g, g).sum(1)
            if "divergence" in self.names:
                rates["divergence"] = _channels(self.probe, g).sum(1)
        return [rates[name].to(x.dtype) for name in self.names]


def _channels(a: Tensor, b: Tensor) -> Tensor:
    """Products `[N, channels]`, in float32 or wider: squares of halves may not be halves."""
    wide = torch.promote_types(a.dtype, torch.float32)
    return (a.to(wide) * b.to(wide)).reshape(a.shape[0], math.prod(a.shape[1:]))


def regularized(
    term: AbstractTerm,
    x0: Tensor,
    solver: AbstractSolver,
    names: Sequence[Regularizer],
    generator: torch.Generator | None,
) -> RegularizedTerm:
    """The term that integrates the penalties `names` as well.

    Raises:
        TypeError, ValueError: not names of penalties, a state without nodes' axis.
        NotImplementedError: the solver wants a matrix, or derivatives are asked for in inference
            mode.
    """
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        got = repr(names) if isinstance(names, str) else type(names).__name__
        raise TypeError(
            f"integrate: `regularizers` must be a sequence of names, got {got}. "
            "For one, write regularizers=('kinetic',)."
        )
    for name in names:
        check_choice("regularizers", name, REGULARIZERS)
    if generator is not None and not isinstance(generator, torch.Generator):
        got = type(generator).__name__
        raise TypeError(f"integrate: `generator` must be a torch.Generator or None, got {got}.")
    if x0.dim() == 0:
        raise ValueError("integrate: `x0` must have an axis of nodes for `regularizers`, got [].")
    if solver.wants_matrix:
        raise UnsupportedOptionError(
            "integrate: `regularizers` must come with a method that takes any f, got one that "
            "takes a matrix. Use rk4 or dopri5."
        )
    wrapped = RegularizedTerm(term, tuple(dict.fromkeys(names)), x0, generator)
    if wrapped.needs_derivatives and torch.is_inference_mode_enabled():
        raise NotImplementedError(
            "integrate: `regularizers` other than kinetic must be computed outside inference "
            "mode, which allows no derivatives. Use torch.no_grad()."
        )
    return wrapped


def separated(result: Result, term: RegularizedTerm) -> tuple[Result, dict[str, Tensor]]:
    """The result in terms of `x` alone, and the penalties at its end."""
    failed = result.status is not Status.SUCCESS
    _, penalties = term.split(result.x if failed else result.found[-1])
    found = [term.split(flat)[0] for flat in result.found]
    return result._replace(found=found, x=term.split(result.x)[0]), penalties
