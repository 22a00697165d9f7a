"""What an operator is given beside tensors: by each call, or once for the calls of a solve."""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch.autograd import forward_ad

from grand_fast.graph import Graph
from grand_fast.kernels.csr import Add, Csr
from grand_fast.kernels.weighting import Weighting
from grand_fast.ops.backends import column_dots, launchers, plan
from grand_fast.ops.checks import inner_contiguous

# Fields of a `Call` as plain arguments of a registered operator; those of a Weighting in its order.
PLAIN = {
    "weighting": "float scale, str function, float slope, str normalizer, str normalize",
    "heads": "int heads",
    "score": "str score",
    "mean_heads": "bool mean_heads",
    "x_scale": "float x_scale",
    "scales": "float[] scales",
}
_WEIGHTING_FIELDS = 5
_LARGEST = sys.float_info.max


class Resolved:
    """What a backend runs an operator with on a graph: looked up once.

    kernels: the module of its launchers.
    csr:     the view of `A`, with the backend's work list.
    project: `x → x Wᵀ + b` of weights that are packed; None where each call is given its own.
    """

    def __init__(
        self, op: str, backend: str, graph: Graph, project: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self._graph, self._plan = graph, plan(backend)
        self.kernels = launchers(op, backend)
        self.csr = graph.csr(self._plan)
        self.project = project

    @cached_property
    def csr_t(self) -> Csr:
        """The view of `Aᵀ`, made when a backward, or a forward by sender, first asks for it."""
        return self._graph.csr(self._plan, transposed=True)


class Call(NamedTuple):
    """What an operator is given beside tensors.

    scale, x_scale, scales: the result is `scale · f + x_scale · x + Σ scales · others`.
    resolved:            once for many calls; None: by each.
    saves:               whether what forward saves for backward is asked for.
    """

    graph: Graph
    backend: str
    weighting: Weighting | None = None
    heads: int = 1
    score: str = "scaled_dot"
    mean_heads: bool = False
    resolved: Resolved | None = None
    x_scale: float = 0.0
    scales: tuple[float, ...] = ()
    scale: float = 1.0
    saves: bool = True

    def on(self, op: str) -> Resolved:
        """The launchers of `op` and the views they take."""
        return self.resolved or Resolved(op, self.backend, self.graph)

    def scaled(self, alpha: Tensor) -> Tensor:
        """`alpha` as launchers take it."""
        return alpha if self.scale == 1.0 else self.scale * alpha

    def by_reference(self) -> "Call":
        """The same on the reference."""
        return self._replace(backend="reference", resolved=None)

    def add(self, x: Tensor, others: Sequence[Tensor]) -> Add:
        """The pairs that are added to f, those of `x` as one."""
        pairs = list(zip(self.scales, others, strict=True))
        return [(self.x_scale, x), *pairs] if self.x_scale else pairs

    def flat(self, options: Sequence[str]) -> list[Any]:
        """The graph's arrays, the backend and those of the fields, as plain arguments."""
        graph = self.graph
        arrays = [graph.rowptr, graph.col, graph.rowptr_t, graph.col_t, graph.perm, graph.perm_t]
        flat: list[Any] = [arrays, self.backend]
        for name in options:
            value = getattr(self, name)
            if isinstance(value, Weighting):
                flat += [value.scale, value.function, value.slope]
                flat += [value.normalizer, value.normalize]
            else:
                flat.append(list(value) if name == "scales" else value)
        return flat

    @staticmethod
    def from_flat(flat: Sequence[Any], options: Sequence[str]) -> "Call":
        """The call of which `flat` gave the arguments; its graph has no edge weights."""
        arrays, backend, *plain = flat
        fields: dict[str, Any] = {}
        for name in options:
            if name == "weighting":
                fields[name] = Weighting(*plain[:_WEIGHTING_FIELDS])
                plain = plain[_WEIGHTING_FIELDS:]
            else:
                fields[name] = tuple(plain[0]) if name == "scales" else plain[0]
                plain = plain[1:]
        return Call(Graph(*arrays), backend, **fields)


def source_gradients(
    df: Tensor, beta: Tensor | None, x0: Tensor | None, needs_dbeta: bool, needs_dx0: bool, *,
    by_kernel: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """`dbeta = Σ_i df_i · x0_i` `[d]` in float32 or wider, and `dx0 = beta · df`, as needed.

    By the CPU's kernel a table of the products is spared; it is not differentiable.
    """
    dbeta = dx0 = None
    if needs_dbeta and x0 is not None:
        if by_kernel:
            dbeta = column_dots()(df, x0)
        else:
            wide = torch.promote_types(df.dtype, torch.float32)
            dbeta = (df.to(wide) * x0.to(wide)).sum(0)
    if needs_dx0 and beta is not None:
        dx0 = (beta * df).to(df.dtype)
    return dbeta, dx0


def added_gradients(
    df: Tensor, scales: tuple[float, ...], needed: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of `Σ c y` by each y that needs one, from that by the sum."""
    scaled = zip(scales, needed, strict=True)
    return [(df if c == 1.0 else df * c) if wanted else None for c, wanted in scaled]


@contextmanager
def recompute(limit: float = 0.0) -> Iterator[None]:
    """A block in which operators compute again in backward what they could save, to save memory.

    Args:
        limit: of the bytes of the state; what takes no more is saved all the same.
    """
    token = _limit.set(limit)
    try:
        yield
    finally:
        _limit.reset(token)


def recompute_limit() -> float:
    """That of the block that is running; infinite outside of one."""
    return _limit.get()


_limit: ContextVar[float] = ContextVar("grand_fast_recompute", default=math.inf)


def apart_from_scale(alpha: float | Tensor) -> tuple[float | Tensor, float]:
    """`alpha`, and by what the scale of each call is multiplied: for a finite number by that alone.

    What is no number stays, for the check of the operator.
    """
    if isinstance(alpha, int | float) and not isinstance(alpha, bool) and abs(alpha) <= _LARGEST:
        return 1.0, float(alpha)
    return alpha, 1.0


class Planned:
    """`scale · f(x) + Σ c y` by an operator of which all but the states is known.

    Backend, launchers, work lists, score and packed weights were looked up when it was made. A call
    looks no further than whether its tensors are like the states of the solve.

    Args:
        operator, call, parameters: what to run, how, and its tensors but `x` and those of `add`.
        like: a state of the solve.
        factor: what `scale` is multiplied by, in the precision of Python: an alpha that is a float.
    """

    def __init__(
        self,
        operator: Any,
        call: Call,
        parameters: Sequence[Tensor | None],
        like: Tensor,
        factor: float = 1.0,
    ) -> None:
        self._like, self._factor = (like.shape, like.dtype, like.device), factor
        self._operator, self._parameters = operator, (*parameters, None, None)  # no beta, no x0
        self._is_reference = call.backend == "reference"
        self._head: Any = call[: Call._fields.index("x_scale")]

    def __call__(self, x: Tensor, *, scale: float = 1.0, add: Add = ()) -> Tensor | None:
        """Like `x`, in new memory; differentiable by `x`, each `y` and what it was made from.

        None where a tensor is not like the state it was made for, or in autocast or a transform of
        torch.func, which a method may use within its steps: an operator that checks sees to them.
        """
        # As `transforms_active`, of which every call would count
        if _are_functorch_transforms_active() or forward_ad._current_level >= 0:
            return None
        like = self._like
        if (x.shape, x.dtype, x.device) != like or torch.is_autocast_enabled(like[2].type):
            return None
        x_scale, scales, others = 0.0, [], []
        for c, y in add:
            if y is x:
                x_scale += c
                continue
            if (y.shape, y.dtype, y.device) != like:
                return None
            scales.append(c)
            others.append(_ready(y))
        saves, scale = torch.is_grad_enabled(), scale * self._factor
        call = Call(*self._head, x_scale, tuple(scales), scale, saves)  # type: ignore[call-arg]
        given = (call, _ready(x), *self._parameters, *others)
        result: Tensor
        if self._is_reference:
            result = self._operator.reference(*given)
        elif saves:
            result = self._operator.run(*given)
        else:
            result = self._operator.forward(*given)[0]
        return result


def _ready(t: Tensor) -> Tensor:
    is_fresh = t.is_contiguous() and t.storage_offset() == 0
    return t if is_fresh else inner_contiguous(t)
