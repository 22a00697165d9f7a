"""`stage_update`: the linear combination of a Runge–Kutta or Adams stage, in one pass."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from grand_fast.ops._input_types import widest_terms
from grand_fast.ops.backends import Backend, choose, is_batched, launchers, transforms_active
from grand_fast.ops.calls import added_gradients
from grand_fast.ops.checks import check_tensor, message

_OP = "stage_update"


def stage_update(terms: Sequence[tuple[float, Tensor]], *, backend: Backend = "auto") -> Tensor:
    """A linear combination of tensors, as every stage of a solver has one.

    `y = Σ_s c_s y_s`

    Args:
        terms: pairs `(c_s, y_s)`, at least one, of a finite float and a floating tensor; all
            tensors of one shape, dtype and device. `torch.autocast` widens them to one dtype.
        backend: `"auto"` goes by the device of the tensors.

    Returns:
        `y`, like each `y_s`: a new tensor, in float32 or wider until it is stored.

    Differentiable by each `y_s`, any number of times. Saves nothing.
    Reference: GRAND (Chamberlain et al. 2021), equations 33 to 37.
    """
    scales, tensors = check_terms(_OP, widest_terms(terms))
    name = choose(_OP, backend, tensors[0])
    if torch.compiler.is_compiling():
        return torch.ops.grand_fast.stage_update(tensors, scales, name)  # type: ignore[no-any-return]
    if name == "reference":
        return launchers(_OP, name).stage_update_fwd(tensors, scales)  # type: ignore[no-any-return]
    if transforms_active():
        return _StageUpdateFunction.apply(name, scales, *tensors)  # type: ignore[no-any-return]
    if not torch.is_grad_enabled():
        return _StageUpdateFunction.forward(name, scales, *tensors)
    return _EagerStageUpdateFunction.apply(name, scales, *tensors)  # type: ignore[no-any-return]


class _StageUpdateFunction(Function):
    """Σ c y; its transpose is `_SpreadFunction`, and the other way round."""

    @staticmethod
    def forward(name: str, scales: tuple[float, ...], *tensors: Tensor) -> Tensor:
        y: Tensor = launchers(_OP, name).stage_update_fwd([t.contiguous() for t in tensors], scales)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.name, ctx.scales = inputs[:2]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[2:]
        if is_batched(dy):
            return None, None, *added_gradients(dy, ctx.scales, needed)
        # A gradient that is dy itself is not copied: autograd knows how to share it.
        scaled = [c for c, n in zip(ctx.scales, needed, strict=True) if n and c != 1.0]
        parts = iter(_SpreadFunction.apply(ctx.name, tuple(scaled), dy) if scaled else ())
        grads = [
            None if not n else dy if c == 1.0 else next(parts)
            for c, n in zip(ctx.scales, needed, strict=True)
        ]
        return None, None, *grads

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        pairs = zip(ctx.scales, tangents[2:], strict=True)
        moving = [(c, t) for c, t in pairs if t is not None]
        scales, tensors = zip(*moving, strict=True)
        return _StageUpdateFunction.apply(ctx.name, scales, *tensors)  # type: ignore[no-any-return]

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, name: str, scales: Any, *tensors: Tensor
    ) -> tuple[Tensor, int]:
        batched = [_batched(t, d, info) for t, d in zip(tensors, in_dims[2:], strict=True)]
        return _StageUpdateFunction.apply(name, scales, *batched), 0


class _EagerStageUpdateFunction(_StageUpdateFunction):
    """The same outside torch.func, whose form of a Function takes 10 µs more a call."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, name: str, scales: tuple[float, ...], *tensors: Tensor
    ) -> Tensor:
        ctx.name, ctx.scales = name, scales
        return _StageUpdateFunction.forward(name, scales, *tensors)

    setup_context = Function.setup_context  # none: `forward` sets it


class _SpreadFunction(Function):
    """c_s y for each s."""

    @staticmethod
    def forward(name: str, scales: tuple[float, ...], y: Tensor) -> tuple[Tensor, ...]:
        return tuple(launchers(_OP, name).stage_update_bwd(y.contiguous(), scales))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.name, ctx.scales = inputs[:2]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, _StageUpdateFunction.apply(ctx.name, ctx.scales, *grads)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> tuple[Tensor, ...]:
        return _SpreadFunction.apply(ctx.name, ctx.scales, tangents[2])  # type: ignore[no-any-return]

    @staticmethod
    def vmap(info: Any, in_dims: Any, name: str, scales: Any, y: Tensor) -> tuple[Any, Any]:
        out = _SpreadFunction.apply(name, scales, _batched(y, in_dims[2], info))
        return out, (0,) * len(scales)


def _batched(t: Tensor, dim: int | None, info: Any) -> Tensor:
    return t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)


@torch.library.custom_op(
    "grand_fast::stage_update",
    mutates_args=(),
    schema="(Tensor[] tensors, float[] scales, str backend) -> Tensor",
)
def _registered(tensors: list[Tensor], scales: list[float], backend: str) -> Tensor:
    name = choose(_OP, backend, tensors[0])
    y: Tensor = launchers(_OP, name).stage_update_fwd([t.contiguous() for t in tensors], scales)
    return y


@_registered.register_fake
def _fake(tensors: list[Tensor], scales: list[float], backend: str) -> Tensor:
    return tensors[0].new_empty(tensors[0].shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.scales = inputs[1]


def _spread(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    # Products that a compiler merges with what is done to them next
    needed = ctx.needs_input_grad[0]
    return added_gradients(dy, ctx.scales, needed), None, None


_registered.register_autograd(_spread, setup_context=_save)


def check_terms(op: str, terms: Any) -> tuple[tuple[float, ...], list[Tensor]]:
    """Scales and tensors of the pairs `(float, Tensor)`, all tensors alike."""
    if not isinstance(terms, Sequence) or len(terms) == 0:
        got = type(terms).__name__ if not isinstance(terms, Sequence) else "none"
        raise ValueError(message(op, "terms", "must hold at least one pair (float, Tensor)", got))
    scales: list[float] = []
    tensors: list[Tensor] = []
    for s, pair in enumerate(terms):
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            got = type(pair).__name__
            raise TypeError(message(op, f"terms[{s}]", "must be a pair (float, Tensor)", got))
        scale, y = pair
        if isinstance(scale, bool) or not isinstance(scale, int | float):
            got = type(scale).__name__
            remedy = "Take .item() of a tensor." if isinstance(scale, Tensor) else ""
            raise TypeError(message(op, f"terms[{s}][0]", "must be a float", got, remedy))
        if not math.isfinite(scale):
            raise ValueError(message(op, f"terms[{s}][0]", "must be finite", str(scale)))
        first = tensors[0] if tensors else y
        sizes = tuple(first.shape) if isinstance(first, Tensor) else ()
        letters = "of the first" if tensors else ""
        like = tensors[0] if tensors else None
        check_tensor(op, f"terms[{s}][1]", y, letters=letters, sizes=sizes, like=like)
        scales.append(float(scale))
        tensors.append(y)
    return tuple(scales), tensors
