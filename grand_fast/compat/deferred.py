"""A tensor that is computed when somebody reads it, and its place in autograd until then.

Whoever uses one in PyTorch gets its values: Python calls through `__torch_function__`, as of what
was computed in the mode of autograd that held when it was made; C++ (TorchScript, the inputs of an
autograd function) through `__torch_dispatch__`, with the gradient of the node that made it.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Size, Tensor
from torch.autograd import Function
from torch.utils._pytree import tree_map_only

# What is known without the values
_KNOWN = {
    getattr(Tensor, name).__get__
    for name in ("device", "dtype", "grad_fn", "is_cpu", "is_cuda", "is_leaf", "is_meta",
                 "is_sparse", "layout", "ndim", "requires_grad", "shape")
} | {Tensor.dim, Tensor.is_complex, Tensor.is_floating_point, Tensor.is_inference, Tensor.numel,
     Tensor.size, Tensor.__len__}  # fmt: skip
# Of these, what can change once there are values
_OF_AUTOGRAD = {getattr(Tensor, name).__get__ for name in ("grad_fn", "is_leaf", "requires_grad")}

_APPLY = Function.apply.__func__.__code__  # type: ignore[attr-defined]
_CHANGED = (
    "grand_fast.compat: a result of an attention layer was changed in place, and an autograd "
    "function, or TorchScript, would not see by what. Read it first: a = a.clone()."
)


class AbstractRecipe(ABC):
    """How the values of a deferred tensor are found.

    inputs: the tensors that it is differentiable by.
    base: the deferred tensor that the values are a view of.
    """

    inputs: tuple[Tensor | None, ...] = ()
    base: Deferred | None = None

    def __init__(self) -> None:
        self.grad, self.inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    @abstractmethod
    def compute(self, *inputs: Tensor | None) -> Tensor:
        """The values, from `inputs` or others like them."""

    def value(self) -> Tensor:
        """The values, with the graph that they would have been computed with at once."""
        with self.mode():
            return self.compute(*self.inputs)

    @contextmanager
    def mode(self) -> Iterator[None]:
        """As autograd and autocast were when this was made."""
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(self.inference))
            stack.enter_context(torch.set_grad_enabled(self.grad))
            for kind in ("cpu", "cuda"):  # there was none: the layer would have been left
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            yield

    def shortcut(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Tensor | None:
        """What `func` returns of the deferred tensor, `args[0]`, where no values are needed."""
        return None


class Deferred(Tensor):
    """A tensor without values as yet."""

    recipe: AbstractRecipe
    written: Tensor | None  # with its graph
    first: tuple[Any, bool] | None  # the node of `written` when it was new, and if it had a graph
    plain: Tensor | None  # without

    @staticmethod
    def __new__(cls, recipe: AbstractRecipe, shape: Size | Sequence[int], like: Tensor) -> Deferred:
        """Of the dtype and on the device of `like`."""
        made: Deferred = Tensor._make_wrapper_subclass(
            cls, shape, dtype=like.dtype, device=like.device
        )
        made.recipe, made.written, made.plain = recipe, None, None
        made.first = None
        return made

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """The result of `func`, of the values if need be."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in _KNOWN and not (func in _OF_AUTOGRAD and _is_written(args[0])):
                return func(*args, **kwargs)
            if args and isinstance(args[0], Deferred) and args[0].written is None:
                answer = args[0].recipe.shortcut(func, args, kwargs)
                if answer is not None:
                    return answer
        args, kwargs = (tree_map_only(Deferred, _values, part) for part in (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """The same below autograd, which has its node by then."""
        if func._schema.is_mutable:
            raise RuntimeError(
                f"grand_fast.compat: {func} writes to a result that is not there yet."
            )
        args, kwargs = (tree_map_only(Deferred, _plain, part) for part in (args, kwargs or {}))
        return func(*args, **kwargs)


def write(tensor: Deferred) -> Tensor:
    """Its values, computed once; from now on they are what it stands for, changed in place too."""
    if tensor.written is None:
        tensor.written = tensor.recipe.value()
        if tensor.written.shape != known_shape(tensor):
            got = list(tensor.written.shape)
            raise RuntimeError(
                f"grand_fast.compat: a result was expected of shape {list(known_shape(tensor))}, "
                f"got {got}. Take the layer out: patch(attention=False)."
            )
        tensor.first = tensor.written.grad_fn, tensor.written.requires_grad
    return tensor.written


def known_shape(tensor: Tensor) -> Size:
    """The shape, not by way of the values."""
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.shape


def _is_written(tensor: Any) -> bool:
    return isinstance(tensor, Deferred) and tensor.written is not None


def _has_moved(tensor: Deferred) -> bool:
    """Whether its node in autograd, which C++ knows, is no longer that of its values."""
    base = tensor.recipe.base
    if base is not None and _has_moved(base):
        return True
    written, first = tensor.written, tensor.first
    return written is not None and (
        first is None or first[0] is not written.grad_fn or first[1] != written.requires_grad
    )


def _values(tensor: Deferred) -> Tensor:
    found = write(tensor)
    if _has_moved(tensor):
        frame = sys._getframe()
        while frame.f_back is not None:
            frame = frame.f_back
            if frame.f_code is _APPLY:
                raise RuntimeError(_CHANGED)
    return found


def _plain(tensor: Deferred) -> Tensor:
    # Here nothing can be recorded: what is computed must not become `written`
    if _has_moved(tensor):
        raise RuntimeError(_CHANGED)
    if tensor.written is not None:
        return tensor.written.detach()
    if tensor.plain is None:
        tensor.plain = tensor.recipe.compute(*tensor.recipe.inputs).detach()
    return tensor.plain


def defer(recipe: AbstractRecipe, shape: Size | Sequence[int], like: Tensor) -> Deferred:
    """A deferred tensor with its node in autograd."""
    made: Deferred = _Defer.apply(  # type: ignore[no-untyped-call]
        recipe, shape, like, *recipe.inputs
    )
    return made


class _Defer(Function):
    """Nothing forward; backward through what the recipe computes."""

    @staticmethod
    def forward(
        ctx: Any, recipe: AbstractRecipe, shape: Any, like: Tensor, *inputs: Tensor | None
    ) -> Deferred:
        ctx.recipe = recipe
        ctx.save_for_backward(*inputs)
        return Deferred(recipe, shape, like)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        create_graph = torch.is_grad_enabled()
        inputs = ctx.saved_tensors
        with torch.enable_grad():
            value = ctx.recipe.compute(*inputs)
        needs = ctx.needs_input_grad[3:]
        wanted = [t for t, needed in zip(inputs, needs, strict=True) if needed]
        found = iter(
            torch.autograd.grad(value, wanted, grad, create_graph=create_graph, allow_unused=True)
        )
        return None, None, None, *(next(found) if needed else None for needed in needs)
