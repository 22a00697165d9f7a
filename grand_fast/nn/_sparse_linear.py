"""A linear layer of sparse features: dropout, product and weight gradient of the nonzeros alone."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.weak import WeakTensorKeyDictionary

from grand_fast.graph import fingerprint

_INT32_MAX = 2**31 - 1


class _Csr(NamedTuple):
    """Where the values of a matrix lie, and which is in each slot (None: that of its number)."""

    rowptr: Tensor
    col: Tensor
    slot: Tensor | None


def sparse_linear(x: Tensor, layer: nn.Linear, *, dropout: float, training: bool) -> Tensor:
    """`dropout(x) Wᵀ + b`, `[N, d]`, of features `x [N, F]` in CSR.

    Zeros stay zeros, so dropout of the stored values is that of all. The gradient by the weight is
    the product with `xᵀ`, whose CSR is found once and kept while `x` lives unchanged; sums have one
    order, that of the CSR, so two runs agree bit for bit. Differentiable, twice, by the parameters.

    Raises:
        TypeError, ValueError: not such features. NotImplementedError: their gradient is asked for.
    """
    _check(x, layer)
    # Detached: torch.compile cannot take a view of a sparse tensor
    values = functional.dropout(x.values().detach(), dropout, training)
    y: Tensor = _Product.apply(  # type: ignore[no-untyped-call]
        layer.weight.t(), values, *csr_pair(x)
    )
    return y if layer.bias is None else y.add_(layer.bias)


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

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        (values,) = ctx.saved_tensors
        db = _Product.apply(  # type: ignore[no-untyped-call]
            dy, values, ctx.transposed, ctx.own
        )
        return db, None, None, None


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


def _check(x: Tensor, layer: nn.Module) -> None:
    if x.layout is not torch.sparse_csr:
        raise TypeError(
            f"GRAND: `x` must be dense or torch.sparse_csr, got {x.layout}. Convert it with "
            f"x.to_sparse_csr()."
        )
    if not isinstance(layer, nn.Linear):
        raise TypeError(
            f"GRAND: `x` must be dense with an encoder that is not nn.Linear, got "
            f"torch.sparse_csr with {type(layer).__name__}. Pass x.to_dense()."
        )
    if x.dim() != 2 or x.shape[1] != layer.in_features:
        raise ValueError(
            f"GRAND: `x` must have shape [N, in_channels] = [N, {layer.in_features}], got "
            f"{list(x.shape)}."
        )
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
    if x.requires_grad:
        raise NotImplementedError(
            "GRAND: `x` must not require a gradient where it is sparse, got requires_grad=True. "
            "Pass x.detach(), or x.to_dense() for the gradient by x."
        )
