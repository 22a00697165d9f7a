"""Layers before and after the diffusion, and checks of what they are given.

A linear layer of sparse features reads the nonzeros alone: dropout, product and weight gradient.
"""

from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional
from torch.utils.weak import WeakTensorKeyDictionary

from grand_fast.graph import fingerprint
from grand_fast.nn._given import check_state
from grand_fast.nn._layers import is_plain
from grand_fast.ops import stage_update
from grand_fast.ops.backends import is_batched, outside_transforms, result_like, transforms_active
from grand_fast.ops.one_by_one import one_by_one

_INT32_MAX = 2**31 - 1


class _Csr(NamedTuple):
    """Where the values of a matrix lie, and which is in each slot (None: that of its number)."""

    rowptr: Tensor
    col: Tensor
    slot: Tensor | None


def sparse_linear(x: Tensor, layer: nn.Module, *, dropout: float, training: bool) -> Tensor:
    """`layer(dropout(x))`, `[N, d]`, of features `x [N, F]` in CSR, for a linear layer.

    One that is not plain, as `is_plain` has it, is called with the dense form of x.

    Zeros stay zeros, so dropout of the stored values is that of all. The gradient by the weight is
    the product with `xᵀ`, whose CSR is found once and kept while `x` lives unchanged; sums have one
    order, that of the CSR, so two runs agree bit for bit. Differentiable, twice, by the parameters.

    Raises:
        TypeError, ValueError: not such features. NotImplementedError: their gradient is asked for.
    """
    _check(x)
    if not is_plain(layer):
        dense: Tensor = layer(functional.dropout(x.to_dense(), dropout, training))
        return dense
    _check_fit(x, layer)
    if transforms_active():
        with outside_transforms():  # which torch's views of a sparse tensor do not know
            values, csr = _values(x), csr_pair(x)
    else:
        values, csr = _values(x), csr_pair(x)
    values = functional.dropout(values, dropout, training)
    y: Tensor = _Product.apply(layer.weight.t(), values, *csr)  # type: ignore[no-untyped-call]
    if layer.bias is None:
        return y
    return y + layer.bias if transforms_active() else y.add_(layer.bias)


def _values(x: Tensor) -> Tensor:
    return x.values().detach()  # torch.compile cannot take a view of a sparse tensor


def csr_pair(x: Tensor) -> tuple[_Csr, _Csr]:
    """The CSR of `x` and of `xᵀ`, kept with `x`."""
    if x.is_inference():  # it has no version counter: a change would go unseen
        return _csr_pair(x)
    ids = x.crow_indices(), x.col_indices()
    held = *(t.numel() for t in ids), int(fingerprint(*ids))  # as `cached_graph` knows its edges
    known: tuple[tuple[int, ...], tuple[_Csr, _Csr]] | None
    known = _known.get(x)  # type: ignore[no-untyped-call]
    if known is None or known[0] != held:
        known = _known[x] = (held, _csr_pair(x))
    return known[1]


_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


class _Product(Function):
    """`X b` for a constant `X`; its gradient by `b` is the same with `Xᵀ`."""

    @staticmethod
    def forward(b: Tensor, values: Tensor, own: _Csr, transposed: _Csr) -> Tensor:
        # Rows of b, weighted and summed over the slots of each row of X: a bag of embeddings
        return functional.embedding_bag(
            own.col,
            b.contiguous(),
            own.rowptr,
            mode="sum",
            per_sample_weights=values if own.slot is None else values.index_select(0, own.slot),
            include_last_offset=True,
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, values, ctx.own, ctx.transposed = inputs
        ctx.save_for_backward(values)
        ctx.save_for_forward(values)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, None, None]:
        (values,) = ctx.saved_tensors

        def gradient(dy: Tensor) -> tuple[Tensor | None]:
            return (_Product.apply(dy, values, ctx.transposed, ctx.own),)  # type: ignore[no-untyped-call]

        (db,) = one_by_one(gradient, dy) if is_batched(dy) else gradient(dy)
        return db, None, None, None

    @staticmethod
    def jvp(ctx: Any, b: Tensor, *_: Any) -> Tensor:
        (values,) = ctx.saved_tensors
        return _Product.apply(b, values, ctx.own, ctx.transposed)  # type: ignore[no-untyped-call,no-any-return]

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, b: Tensor, values: Tensor, own: _Csr, transposed: _Csr
    ) -> tuple[Tensor, int]:
        mapped = zip((b, values), in_dims[:2], strict=True)
        rows = [[t] * info.batch_size if d is None else t.unbind(d) for t, d in mapped]
        found = [
            _Product.apply(*row, own, transposed)  # type: ignore[no-untyped-call]
            for row in zip(*rows, strict=True)
        ]
        return torch.stack(found), 0


def _csr_pair(x: Tensor) -> tuple[_Csr, _Csr]:
    rowptr, col = x.crow_indices(), x.col_indices()
    n, f = x.shape
    index = torch.int32 if max(n, f, col.numel()) <= _INT32_MAX else torch.int64
    slot = torch.sort(col, stable=True).indices
    rows = torch.repeat_interleave(torch.arange(n, device=x.device), rowptr.diff())
    rowptr_t = torch.zeros(f + 1, dtype=index, device=x.device)
    rowptr_t[1:] = torch.bincount(col, minlength=f).cumsum(0)
    own = _Csr(rowptr.to(index), col.to(index), None)
    return own, _Csr(rowptr_t, rows[slot].to(index), slot.to(index))


def _check(x: Tensor) -> None:
    if x.layout is not torch.sparse_csr:
        raise TypeError(
            f"GRAND: `x` must be dense or torch.sparse_csr, got {x.layout}. Convert it with "
            f"x.to_sparse_csr()."
        )
    if x.requires_grad:
        raise NotImplementedError(
            "GRAND: `x` must not require a gradient where it is sparse, got requires_grad=True. "
            "Pass x.detach(), or x.to_dense() for the gradient by x."
        )


def _check_fit(x: Tensor, layer: nn.Linear) -> None:
    check_state("GRAND", x, "[N, in_channels]", layer.in_features)
    weight = layer.weight
    if x.dtype != weight.dtype:
        raise TypeError(
            f"GRAND: `x` must be {weight.dtype}, like the weights, got {x.dtype}. Convert it with "
            f".to({weight.dtype})."
        )
    if x.device != weight.device:
        raise ValueError(
            f"GRAND: `x` must be on {weight.device}, like the weights, got {x.device}. Move it "
            f"once, with .to('{weight.device}')."
        )


def relu_dropout(x: Tensor, p: float, *, training: bool) -> Tensor:
    """`dropout(relu(x))` that keeps its result alone for backward, a third of what the two keep.

    On the CPU it lies where the kernels' results do: what torch allocates for it and for the draws
    would stay with the process, unused, once backward begins. As its two parts, draws included:
    where the result is 0, so is the gradient.
    """
    if not training or not 0.0 < p < 1.0 or torch.compiler.is_compiling() or transforms_active():
        return functional.dropout(torch.relu(x), p, training)
    y: Tensor = _ReluDropoutFunction.apply(x, p)  # type: ignore[no-untyped-call]
    return y


class _ReluDropoutFunction(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        if x.is_cpu and x.is_contiguous():  # in another order it would draw other numbers
            y = torch.clamp_min(x, 0.0, out=result_like(x))
            y.mul_(result_like(x).bernoulli_(1.0 - p).div_(1.0 - p))
        else:
            y = functional.dropout(torch.relu(x), p, training=True, inplace=True)
        ctx.save_for_backward(y)
        ctx.p = p
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        if is_batched(dy):
            return (dy / (1.0 - ctx.p)).masked_fill(y <= 0.0, 0.0), None
        return stage_update([(1.0 / (1.0 - ctx.p), dy)]).masked_fill_(y <= 0.0, 0.0), None


class MLP(nn.Module):
    """Two residual layers, `x ← dropout(x + W relu(x) + b)`, after a dropout."""

    def __init__(self, channels: int, *, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(channels, channels) for _ in range(2)])
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """`[N, channels]` from the same."""
        x = functional.dropout(x, self.dropout, self.training)
        for layer in self.layers:
            x = functional.dropout(x + layer(torch.relu(x)), self.dropout, self.training)
        return x


def check_sizes(module: str, *, low: int = 0, **sizes: int) -> None:
    """Each is an int of at least `low`."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, Integral):  # of NumPy as well
            raise TypeError(f"{module}: `{name}` must be an int, got {type(size).__name__}.")
        if size < low:
            raise ValueError(f"{module}: `{name}` must be at least {low}, got {size}.")


def check_no_decoder(module: str, hidden: int, out: int, fc_out: bool) -> None:
    """Without a decoder the state holds the logits."""
    if hidden != out:
        raise ValueError(
            f"{module}: `hidden_channels` must be out_channels={out} with decoder=False, got "
            f"{hidden}: the state holds the logits. Did you mean encoder_channels={hidden} or "
            f"decoder=True?"
        )
    if fc_out:
        raise ValueError(
            f"{module}: `fc_out` must be False with decoder=False, got True: it is a layer before "
            f"the decoder."
        )


def check_labels(module: str, labels: Tensor | None, x: Tensor, channels: int) -> None:
    """There are labels `[N, channels]` just where the model has channels for them."""
    if labels is None:
        if channels:
            raise ValueError(
                f"{module}: `labels` must be given with label_channels={channels}, got None. Pass "
                f"one-hot rows, zeros where a label is unknown."
            )
        return
    if channels == 0:
        raise ValueError(
            f"{module}: `labels` must be None without label_channels, got a tensor. Build the "
            f"model with label_channels=number of classes."
        )
    if tuple(labels.shape) != (x.shape[0], channels):
        remedy = " Did you mean torch.nn.functional.one_hot(labels)?" if labels.dim() == 1 else ""
        raise ValueError(
            f"{module}: `labels` must have shape [N, label_channels] = [{x.shape[0]}, {channels}], "
            f"got {list(labels.shape)}.{remedy}"
        )
