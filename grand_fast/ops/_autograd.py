"""What makes functions of kernels an operator of PyTorch: autograd, and a name that compilers know.

Called eagerly, an operator is one autograd Function, some microseconds. Compilers and exported
programs hold it as `torch.ops.grand_fast.<name>`, a function of tensors and plain values, graph
arrays included; the kernels, forward and backward, are the same.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from grand_fast.ops.backends import choose, is_batched, is_reference
from grand_fast.ops.calls import PLAIN, Call, added_gradients, source_gradients
from grand_fast.ops.checks import inner_contiguous
from grand_fast.ops.one_by_one import one_by_one

Gradients = Sequence[Tensor | None]


@dataclass(eq=False)
class Operator:
    """An operator on the tensors `inputs`, and on `beta, x0, *others` if it `has_source`.

    Args:
        name: of the operator; `torch.ops.grand_fast.<name>` and `<name>_backward` are registered.
        inputs: the names of its tensors, with a question mark where None may stand.
        options: the fields of `Call` it reads beside `graph` and `backend`.
        has_source: the result holds `beta · x0` and `Σ scales · others`, whose gradients need no
            kernel.
        saves: how many tensors a registered forward returns after the result, for backward.
        forward: `(call, *tensors)` → the result, and tensors to save beside the inputs.
        backward: `(call, grad, needs, inputs, saved, *, first)` → a gradient for each of the
            inputs, at least where `needs` asks for it. `first` is false once a backward has run.
        fake: `(call, *tensors)` → empty tensors like the result and what is saved.
        reference: `(call, *tensors)` → the result in differentiable operations of torch; by default
            `forward` on the backend of that name.

    All tensors arrive with contiguous rows (`inner_contiguous`).
    """

    name: str
    inputs: Sequence[str]
    options: Sequence[str]
    saves: int
    forward: Callable[..., tuple[Tensor, tuple[Tensor, ...]]]
    backward: Callable[..., Gradients]
    fake: Callable[..., tuple[Tensor, ...]]
    has_source: bool = False
    reference: Callable[..., Tensor] = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        self.count = len(self.inputs)
        if self.reference is None:
            self.reference = self._forward_of_reference
        self._register()

    def __call__(self, call: Call, *tensors: Tensor | None) -> Tensor:
        """The result, differentiable by each of the tensors, any number of times."""
        if torch.compiler.is_compiling():
            result = self._forward(*self._flat(call, tensors))
            return result if self.saves == 0 else result[0]  # type: ignore[no-any-return]
        if is_reference(self.name, call.backend):
            return self.reference(call, *tensors)
        return self.run(call, *tensors)

    def run(self, call: Call, *tensors: Tensor | None) -> Tensor:
        """The same by kernels: for callers who know that no compiler or transform is at work."""
        if not torch.is_grad_enabled():
            return self.forward(call, *tensors)[0]
        return _OperatorFunction.apply(self, call, *tensors)  # type: ignore[no-any-return]

    def _forward_of_reference(self, call: Call, *tensors: Tensor | None) -> Tensor:
        return self.forward(call.by_reference(), *tensors)[0]

    def differentiate(
        self, call: Call, grad: Tensor, needs: Sequence[bool], inputs: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """The gradients once more, by the reference: differentiable themselves, and slower."""
        of_wanted, wanted = self._reference_of(call, needs, inputs)
        # Views, because inputs may depend on one another: each gradient is by that input alone.
        own = [t.view_as(t) for t in wanted]
        grads = torch.autograd.grad(
            of_wanted(*own), own, grad, create_graph=True, materialize_grads=True
        )
        return _spread(grads, needs)

    def _reference_of(
        self, call: Call, needs: Sequence[bool], inputs: Sequence[Tensor | None]
    ) -> tuple[Callable[..., Tensor], list[Tensor]]:
        """The reference as a function of the inputs that need gradients, and these."""
        no_source = (None, None) * self.has_source
        wanted = [i for i, needed in enumerate(needs) if needed]

        def of_wanted(*tensors: Tensor) -> Tensor:
            given = list(inputs)
            for i, tensor in zip(wanted, tensors, strict=True):
                given[i] = tensor
            return self.reference(call._replace(scales=()), *given, *no_source)

        return of_wanted, [t for i in wanted if (t := inputs[i]) is not None]

    def _flat(self, call: Call, tensors: Sequence[Tensor | None]) -> list[Any]:
        """The arguments of the registered operator."""
        flat: list[Any] = list(tensors[: self.count])
        if self.has_source:
            flat += [*tensors[self.count : self.count + 2], list(tensors[self.count + 2 :])]
        return flat + call.flat(self.options)

    def _tensors(self, flat: Sequence[Any]) -> tuple[list[Tensor | None], Sequence[Any]]:
        """The tensors among the registered operator's arguments, and the rest."""
        end = self.count + 3 * self.has_source
        inputs = list(flat[: end - 1]) + list(flat[end - 1]) if self.has_source else flat[:end]
        return list(inputs), flat[end:]

    def _run_forward(self, *flat: Any) -> Tensor | tuple[Tensor, ...]:
        tensors, rest = self._tensors(flat)
        result, saved = self.forward(self._ready(rest, tensors), *map(_contiguous, tensors))
        return result if self.saves == 0 else (result, *saved[: self.saves])

    def _run_backward(self, grad: Tensor, *flat: Any) -> list[Tensor]:
        inputs, (saved, *rest, needs) = flat[: self.count], flat[self.count :]
        given = [_contiguous(t) for t in inputs]
        call = self._ready(rest, inputs)
        grad = inner_contiguous(grad)
        if call.backend == "reference":
            # A registered operator runs where autograd records nothing; vjp does all the same.
            of_wanted, wanted = self._reference_of(call, needs, given)
            pull_back: Any = torch.func.vjp(of_wanted, *wanted)[1]
            found: Gradients = _spread(pull_back(grad), needs)
        else:
            found = self.backward(call, grad, needs, given, saved, first=True)
        return [
            torch.zeros_like(t) if of_input is None else of_input.to(t.dtype).contiguous()
            for of_input, t, needed in zip(found, inputs, needs, strict=True)
            if needed
        ]

    def _ready(self, rest: Sequence[Any], tensors: Sequence[Tensor | None]) -> Call:
        """The backend is chosen where the program runs, not where it was compiled."""
        call = Call.from_flat(rest, self.options)
        first = next(t for t in tensors if t is not None)
        return call._replace(backend=choose(self.name, call.backend, first))

    def _register(self) -> None:
        tensors = [f"Tensor{'?' * i.endswith('?')} {i.removesuffix('?')}" for i in self.inputs]
        source = ["Tensor? beta", "Tensor? x0", "Tensor[] others"] * self.has_source
        rest = ["Tensor[] graph", "str backend", *(PLAIN[name] for name in self.options)]
        results = ", ".join(["Tensor"] * (1 + self.saves))
        forward = torch.library.custom_op(
            f"grand_fast::{self.name}",
            self._run_forward,
            mutates_args=(),
            schema=f"({', '.join([*tensors, *source, *rest])}) -> ({results})",
        )
        given = ["Tensor grad", *tensors, "Tensor[] saved", *rest, "bool[] needs"]
        backward = torch.library.custom_op(
            f"grand_fast::{self.name}_backward",
            self._run_backward,
            mutates_args=(),
            schema=f"({', '.join(given)}) -> Tensor[]",
        )

        @forward.register_fake
        def fake_forward(*flat: Any) -> Tensor | tuple[Tensor, ...]:
            given, rest = self._tensors(flat)
            results = self.fake(Call.from_flat(rest, self.options), *given)
            return results[0] if self.saves == 0 else results

        @backward.register_fake
        def fake_backward(grad: Tensor, *flat: Any) -> list[Tensor]:
            pairs = zip(flat[: self.count], flat[-1], strict=True)
            return [t.new_empty(t.shape) for t, needed in pairs if needed]

        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            given, rest = self._tensors(inputs)
            _save(ctx, self, given, output[1:] if self.saves else (), ctx.needs_input_grad)
            ctx.rest = rest

        def differentiate(ctx: Any, grad: Tensor, *ignored: Any) -> tuple[Any, ...]:
            def run(needs: Sequence[bool], given: Any, saved: Any) -> Gradients:
                flat = [*given, list(saved), *ctx.rest, list(needs)]
                return _spread(self._backward(grad, *flat), needs)

            needs: Any = self._tensors(ctx.needs_input_grad)[0]
            found: list[Any] = _gradients(
                self, ctx.saved_tensors, grad, needs, run, scales=self._scales(ctx.rest)
            )
            if self.has_source:
                found = [*found[: self.count + 2], found[self.count + 2 :]]
            # None for a value, a list of None for a list of tensors, which an empty list may be
            nothing = [[None] * len(r) if _is_tensors(r) else None for r in ctx.rest]
            return (*found, *nothing)

        forward.register_autograd(differentiate, setup_context=setup_context)
        self._forward = getattr(torch.ops.grand_fast, self.name).default
        self._backward = getattr(torch.ops.grand_fast, f"{self.name}_backward").default

    def _scales(self, rest: Sequence[Any]) -> tuple[float, ...]:
        return tuple(rest[-1]) if self.has_source else ()  # the last of the options


class _OperatorFunction(Function):
    @staticmethod
    def forward(ctx: Any, op: Operator, call: Call, *tensors: Tensor | None) -> Tensor:
        result, saved = op.forward(call, *tensors)
        _save(ctx, op, tensors, saved, ctx.needs_input_grad[2:])
        ctx.call, ctx.first = call, True
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        op, call = ctx.op, ctx.call

        needs, tensors = ctx.needs_input_grad[2:], ctx.saved_tensors

        def gradients_by(grad: Tensor) -> Gradients:
            grad, by_kernel = inner_contiguous(grad), not torch.is_grad_enabled()

            def run(needs: Sequence[bool], inputs: Any, saved: Any) -> Gradients:
                if not by_kernel:
                    return op.differentiate(call, grad, needs, inputs)  # type: ignore[no-any-return]
                first, ctx.first = ctx.first, False
                return op.backward(call, grad, needs, inputs, saved, first=first)  # type: ignore[no-any-return]

            of_cpu = by_kernel and call.backend == "cpu"
            return _gradients(op, tensors, grad, needs, run, scales=call.scales, by_kernel=of_cpu)

        with torch.autocast(grad.device.type, enabled=False):
            if is_batched(grad) and not torch.is_grad_enabled():
                return None, None, *one_by_one(gradients_by, grad)
            return None, None, *gradients_by(grad)


def _save(
    ctx: Any,
    op: Operator,
    tensors: Sequence[Tensor | None],
    saved: Sequence[Tensor],
    needs: Sequence[bool],
) -> None:
    source: tuple[Tensor | None, ...] = ()
    if op.has_source:
        beta, x0 = tensors[op.count : op.count + 2]
        source = (beta, x0 if needs[op.count] else None)
    ctx.save_for_backward(*tensors[: op.count], *source, *saved)
    ctx.op = op


def _gradients(
    op: Operator,
    tensors: Sequence[Any],
    grad: Tensor,
    needs: Sequence[bool],
    run: Callable[[Sequence[bool], Any, Any], Gradients],
    *,
    scales: tuple[float, ...],
    by_kernel: bool = False,
) -> list[Tensor | None]:
    """By the inputs with `run`, and by `beta`, `x0` and the others, of what was saved."""
    inputs, tensors = tensors[: op.count], tensors[op.count :]
    beta, x0 = tensors[:2] if op.has_source else (None, None)
    found: list[Tensor | None] = [None] * op.count
    if any(needs[: op.count]):
        found = list(run(needs[: op.count], inputs, tensors[2 * op.has_source :]))
    if op.has_source:
        needs_source = needs[op.count : op.count + 2]
        found += source_gradients(grad, beta, x0, *needs_source, by_kernel=by_kernel)
        found += added_gradients(grad, scales, needs[op.count + 2 :])
    return found


def _spread(grads: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """Where one is needed, the next of `grads`."""
    found = iter(grads)
    return [next(found) if needed else None for needed in needs]


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else inner_contiguous(t)


def _is_tensors(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(t, Tensor) for t in value)
