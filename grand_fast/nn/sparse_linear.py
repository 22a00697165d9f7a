"""A linear layer of sparse features: dropout, product and weight gradient of the nonzeros alone."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.weak import WeakTensorKeyDictionary

from grand_fast.graph import fingerprint
from grand_fast.nn._given import check_state
from grand_fast.nn._linear import is_plain
from grand_fast.ops.backends import is_batched, outside_transforms, transforms_active
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


class _Product(torch.autograd.Function):
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
