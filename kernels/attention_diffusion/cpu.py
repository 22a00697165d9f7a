"""attention_diffusion: f[i,:] = alpha · (mean_h Σ_{e in row i} a[e,h] · x[col[e],:] − x[i,:])
                                + beta · x0[i,:],   a = edge_attention(q, k)

Work:     one task per 4096 edges; a row is swept twice: its scores, as many edges at a time as
          fill a register with edges × heads, then its weighted sum of x. If weights are
          normalised over the edges of a sender, a pass on the CSR of Aᵀ first finds norm.
Bytes:    4(N+1) + 4E + 8NH + b(2Nd + 2N·d_att), b bytes per element, if each row of x and k is
          read once; 4(N+1) + 4E + 8NH + b(N(d + d_att) + E(d + d_att)) if none is reused.
          bE more with edge weights.
Backward: two passes that recompute the weights (`cpu/attention/backward.py`); nothing of size E.
          Saves x, q, k and norm.
Order:    as in `cpu/rows.py`: bitwise repeatable for any number of threads.
"""

from functools import lru_cache
from typing import Any

from jaxtyping import Float
from torch import Tensor

from grand_fast.kernels.cpu.attention.backward import attention_bwd
from grand_fast.kernels.cpu.attention.head_blocks import EdgeSpec
from grand_fast.kernels.cpu.attention.normalizer import (
    EdgeInputs,
    forward_rows,
    row_weights,
    run_forward,
)
from grand_fast.kernels.cpu.attention.scores import RowBuffer
from grand_fast.kernels.cpu.gathered_sums import (
    field_arguments,
    field_rows,
    finish_field,
    sum_field,
)
from grand_fast.kernels.cpu.memory import empty
from grand_fast.kernels.cpu.rows import Compiled, each_row, scratch_size
from grand_fast.kernels.csr import Add, Csr
from grand_fast.kernels.weighting import AttentionGradients, Upstream, Weighting, scaled_dot


@lru_cache(maxsize=256)
def _attention_diffusion_fwd_kernel(
    d: int,
    spec: EdgeSpec,
    *,
    has_source: bool,
    n_add: int,
    known: bool,
    pieces: bool,
) -> Compiled:
    """`known`: what normalises the weights is, and not found for whole rows on the way."""
    view = spec.view("attention_diffusion_fwd", "receiver")
    k, h = view.kernel, spec.h
    scratch = k.matrix("scratch").row(k.thread)
    own_rows = forward_rows(view, known=known)
    if not pieces:
        own_rows += field_rows(k, d, has_source=has_source, n_add=n_add)
    with each_row(k, pieces=pieces, own_rows=own_rows, own_edges=view.own_edges) as row:
        for group in view.groups:
            means = RowBuffer(scratch, group, row)
            further = scratch.at(k.number("buffer")) if group.first else scratch
            buffer = RowBuffer(further, group, row)
            mean = row_weights(view, group, row, buffer, known=known) * group.of_heads(1.0 / h)
            with k.loop(row.begin, row.end, group.edges) as e:
                a = group.over_heads(buffer.at(e).load() * mean)
                means.at(e).store(a + means.at(e).load() if group.first else a)
        sum_field(k, row, d, means.splat(), has_source=has_source, n_add=n_add, pieces=pieces)
    return Compiled(k)


def attention_diffusion_fwd(
    x: Float[Tensor, "N d"],
    q: Float[Tensor, "N H d_k"],
    k: Float[Tensor, "N H d_k"],
    *,
    weighting: Weighting | None = None,
    edge_weight: Float[Tensor, " E"] | None = None,
    top: Float[Tensor, ""] | None = None,
    alpha: Float[Tensor, " d"],
    beta: Float[Tensor, " d"] | None,
    x0: Float[Tensor, "N d"] | None,
    add: Add = (),
    csr: Csr,
    csr_t: Csr | None = None,
) -> tuple[Float[Tensor, "N d"], Float[Tensor, "N 2 H"]]:
    """The vector field `f`, and `norm` of the scores."""
    n, d = x.shape
    inputs = EdgeInputs(q, k, weighting or scaled_dot(q.shape[2]), edge_weight, top)
    spec, work = inputs.spec(csr), csr.work
    f = empty(n, d, dtype=x.dtype)
    buffer = scratch_size(work.longest)
    field = field_arguments(f, x, alpha=alpha, beta=beta, x0=x0, add=add)
    partial = empty(work.piece_begin.numel(), d, dtype=x.dtype)

    def kernel(*, known: bool, pieces: bool) -> Compiled:
        switches = {"has_source": False, "n_add": 0} if pieces else given
        return _attention_diffusion_fwd_kernel(d, spec, known=known, pieces=pieces, **switches)

    given: Any = {"has_source": x0 is not None, "n_add": len(add)}
    norm = run_forward(
        inputs, csr, csr_t, kernel, scratch=2 * buffer, buffer=buffer, partial=partial, **field
    )
    if work.hub_rows.numel():
        finish_field(partial, work, field, add)
    return f, norm


def attention_diffusion_bwd(
    df: Float[Tensor, "N d"],
    x: Float[Tensor, "N d"],
    q: Float[Tensor, "N H d_k"],
    *,
    k: Float[Tensor, "N H d_k"],
    weighting: Weighting | None = None,
    edge_weight: Float[Tensor, " E"] | None = None,
    top: Float[Tensor, ""] | None = None,
    norm: Float[Tensor, "N 2 H"],
    alpha: Float[Tensor, " d"],
    x_scale: float = 0.0,
    csr: Csr,
    csr_t: Csr,
    needs_dqk: bool,
    needs_dalpha: bool,
    needs_dedge_weight: bool = False,
    may_overwrite_k: bool = False,
) -> AttentionGradients:
    """`dx` with q and k held fixed, and the others that are needed.

    `may_overwrite_k`: `dk` may then be written over `k`.
    """
    needs = {"dqk": needs_dqk, "dalpha": needs_dalpha, "dedge_weight": needs_dedge_weight}
    grads = attention_bwd(
        EdgeInputs(q, k, weighting or scaled_dot(q.shape[2]), edge_weight, top),
        Upstream(df=df, x=x, alpha=alpha.to(x.dtype), x_scale=x_scale),
        norm=norm, csr=csr, csr_t=csr_t, needs=needs, may_overwrite_k=may_overwrite_k,
    )  # fmt: skip
    return AttentionGradients(**grads)
