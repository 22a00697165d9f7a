"""`projected_attention_diffusion`, forward and backward, on the kernels of `attention_diffusion`.

Knowing the projections saves memory and passes: one product for q and k together, its backward
added to `dx` in place, q and k kept for backward only while memory is plentiful, what a score makes
of them computed again, and dk written over k.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from grand_fast.ops._autograd import Gradients
from grand_fast.ops._largest_score import add_top_gradients, find_top, reference_top
from grand_fast.ops._score_columns import prepared, score_gradients, side_by_side
from grand_fast.ops.attention_diffusion import _backward as attention_backward
from grand_fast.ops.attention_diffusion import _forward as attention_forward
from grand_fast.ops.backends import free_memory, projection
from grand_fast.ops.calls import Call, recompute_limit
from grand_fast.ops.checks import inner_contiguous
from grand_fast.ops.scores import SCORES, AbstractScore, ExpKernel, ScaledDot

OPERATOR = "attention_diffusion"  # whose launchers run it

# Keeping q and k for backward saves one of its three products. They are kept when small, or when
# they take less than this share of the free memory: a long solve keeps them for its first
# evaluations and stops before memory runs short.
_ALWAYS_KEPT = 16 << 20  # bytes
_SHARE_KEPT = 1 / 32


def forward(
    call: Call, x: Tensor, weight: Tensor, bias: Tensor, alpha: Tensor, edge_weight: Tensor | None,
    sigma: Tensor | None, lengthscale: Tensor | None, beta: Tensor | None, x0: Tensor | None,
    *others: Tensor,
) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
    on, is_absorbed = call.on(OPERATOR), _is_absorbed(x, weight, edge_weight, call)
    if is_absorbed:
        qk = x.new_empty(0, weight.shape[0])
        q, k = _absorbed(x, weight, bias)
    else:
        qk = (on.project or packed_projection(weight, bias, call.backend))(x)
        q, k = _split(qk, call.heads)
        if call.score != ScaledDot.name or x.element_size() == 2:  # pairs of halves may be split
            q, k = prepared(_score(call, sigma, lengthscale).about(k), q, k, call.backend)
    top, *of_rows = _top(call, q, k, edge_weight) if _has_top(call) else (None,)
    f, norm = on.kernels.attention_diffusion_fwd(
        x, q, k, weighting=None if is_absorbed else call.weighting, edge_weight=edge_weight,
        top=top, alpha=call.scaled(alpha), beta=beta, x0=x0, add=call.add(x, others), csr=on.csr,
        csr_t=on.csr_t,
    )  # fmt: skip
    if not call.saves:
        return f, ()
    # As many tensors are saved either way: torch.utils.checkpoint runs this twice and compares.
    if is_absorbed or not _is_kept(qk, x):
        qk = qk.new_empty(1).expand(x.shape[0], weight.shape[0])
    return f, (norm, qk) if top is None else (norm, qk, top, *of_rows)


def backward(
    call: Call, df: Tensor, needs: Any, inputs: Any, saved: Any, *, first: bool
) -> Gradients:
    x, weight, bias, alpha, edge_weight, *parameters = inputs
    needs_dx, needs_dweight, needs_dbias, needs_dalpha, needs_dedge_weight = needs[:5]
    needs_dqk = needs_dx or needs_dweight or needs_dbias or any(needs[5:])
    on, (norm, *kept) = call.on(OPERATOR), saved
    # dk may take the place of k, so that q and k that were kept serve once.
    if first and kept and kept[0].stride(1) != 0:  # 0: the placeholder
        qk = kept[0]
    else:
        qk = (on.project or packed_projection(weight, bias, call.backend))(x)
    qk = qk.data  # a saved tensor that changes is an error
    given = _split(qk, call.heads)
    score = _score(call, *parameters).about(given[1])
    q, k = made = prepared(score, *given, call.backend)
    top, *of_rows = kept[1:] or _top(call, q, k, edge_weight)
    if _is_absorbed(x, weight, edge_weight, call):
        # Its scores lack what the keys' bias adds to a row, and are rounded otherwise: the pass
        # that gives dq and dk divides by the sum it finds, and for that alone the shift will do.
        needs_dqk = True
        shift = norm[:, :1] + ((q @ bias.chunk(2)[1]) / math.sqrt(k.shape[2]))[:, None]
        norm = torch.cat([shift, norm[:, 1:]], 1)
    needs = (needs_dx, needs_dqk, needs_dqk, needs_dalpha, needs_dedge_weight, False)
    dx, dq, dk, dalpha, dedge_weight, dtop = attention_backward(
        call, df, needs, (x, q, k, alpha, edge_weight, top), (norm,), first=first, on=on,
        may_overwrite_k=top is None and call.score == ScaledDot.name,  # else it is needed after
    )  # fmt: skip
    if dtop is not None:
        (top_of_row,) = of_rows
        assert top_of_row is not None
        of_edges = (dq, dk, dedge_weight)
        add_top_gradients(call, dtop, (q, k, edge_weight), top_of_row, of_edges)
    dweight = dbias = dsigma = dlengthscale = None
    if dq is not None and dk is not None:
        of_made = (dq, dk)
        *dqk, dsigma, dlengthscale = score_gradients(score, given, made, of_made, call.backend)
        joined = side_by_side(*dqk)
        dqk = [inner_contiguous(dy.flatten(1)) for dy in dqk] if joined is None else [joined]
        if needs_dx and dx is not None:
            for dy, part in zip(dqk, weight.chunk(len(dqk)), strict=True):
                _add_input_gradient(dx, dy, part, call.backend)
        if needs_dweight or needs_dbias:
            shares = [_parameter_gradients(dy, x, call.backend) for dy in dqk]
            dweight, dbias = map(torch.cat, zip(*shares, strict=True))
    return dx, dweight, dbias, dalpha, dedge_weight, dsigma, dlengthscale


def reference(call: Call, x: Tensor, weight: Tensor, bias: Tensor, *further: Any) -> Tensor:
    """In differentiable operations of torch."""
    alpha, edge_weight, sigma, lengthscale, *added = further
    qk = functional.linear(x, weight, bias)
    q, k = _score(call, sigma, lengthscale).prepare(*_split(qk, call.heads))
    top = reference_top(call, q, k, edge_weight) if _has_top(call) else None
    call = call.by_reference()
    return attention_forward(call, x, q, k, alpha, edge_weight, top, *added)[0]


def fake(call: Call, x: Tensor, *further: Tensor | None) -> tuple[Tensor, ...]:
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape), x.new_empty((x.shape[0], 2, call.heads), dtype=wide)


def _score(call: Call, sigma: Tensor | None, lengthscale: Tensor | None) -> AbstractScore:
    if sigma is None or lengthscale is None:
        return SCORES[call.score]
    return ExpKernel(sigma, lengthscale)


def _has_top(call: Call) -> bool:
    return call.weighting is not None and call.weighting.normalizer == "squareplus"


def _top(call: Call, q: Tensor, k: Tensor, edge_weight: Tensor | None) -> Sequence[Tensor | None]:
    """The largest score and that of each row and head, where the normaliser counts from it."""
    if not _has_top(call):
        return (None,)
    top, (top_of_row,) = find_top(call, q, k, edge_weight)
    return top, top_of_row


def _is_absorbed(x: Tensor, weight: Tensor, edge_weight: Tensor | None, call: Call) -> bool:
    """Whether queries that hold the projection of the keys too save bytes and flops.

    With several heads they are H rows of d channels, and their product takes longer than half of
    the gather saves. In half types they would be rounded twice. Only a softmax over a row forgets
    what is constant there.
    """
    if call.backend != "gpu" or x.dtype != torch.float32 or call.heads > 1:
        return False
    if call.score != ScaledDot.name or edge_weight is not None or _has_top(call):
        return False
    d_att = weight.shape[0] // 2
    by_sender = call.weighting is not None and call.weighting.normalize == "sender"
    return not by_sender and x.shape[1] <= 2 * d_att


def _split(qk: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """q and k `[N, H, d_k]` as views."""
    q, k = qk.view(qk.shape[0], 2, heads, qk.shape[1] // (2 * heads)).unbind(1)
    return q, k


def _is_kept(qk: Tensor, x: Tensor) -> bool:
    size = qk.numel() * qk.element_size()
    limit = recompute_limit()
    if math.isfinite(limit):
        return size <= limit * x.numel() * x.element_size()
    if size <= _ALWAYS_KEPT:
        return True
    return size < _SHARE_KEPT * free_memory(qk.device)


def packed_projection(weight: Tensor, bias: Tensor, name: str) -> Callable[[Tensor], Tensor]:
    """`x [N, d]` → q and k, side by side, `[N, 2·d_att]`; the weights are packed once."""
    if name == "cpu":
        return projection().Projection(weight, bias)  # type: ignore[no-any-return]
    return lambda x: functional.linear(x, weight, bias)


def _add_input_gradient(dx: Tensor, dy: Tensor, weight: Tensor, name: str) -> None:
    """`dx += dy weight`, in place."""
    if name == "cpu":
        projection().add_input_gradient(dx, dy, weight)
    else:
        dx.addmm_(dy, weight)


def _parameter_gradients(dy: Tensor, x: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Gradients by weight and bias."""
    if name == "cpu":
        return projection().parameter_gradients(dy, x)  # type: ignore[no-any-return]
    return dy.t() @ x, dy.sum(0)


def _absorbed(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """q̃ = W_kᵀ (W_q x + b_q) and x in place of the keys, `[N, 1, d]`; equal up to a row's constant.

    The kernel divides by √d where √d_att is due.
    """
    (w_q, w_k), b_q = weight.chunk(2), bias.chunk(2)[0]
    scale = math.sqrt(w_k.shape[1] / w_k.shape[0])
    q = functional.linear(x, scale * (w_k.t() @ w_q), scale * (w_k.t() @ b_q))
    return q.unsqueeze(1), x.unsqueeze(1)
