"""edge_attention: a[e,h] = exp(s[e,h] − lse[i,h]), s[e,h] = <q[i,h,:], k[col[e],h,:]> / √d_k

Work:     one task per 4096 edges; scores of as many edges at a time as fill a register with
          edges × heads.
Bytes:    4(N+1) + 4E + 4NH + b(EH + 2N·d_att), b bytes per element, if each k row is read once;
          4(N+1) + 4E + 4NH + b(EH + (N + E)·d_att) if none is reused. EH is E for the mean.
Backward: two passes that recompute the weights (`_attention_backward.py`). Saves q, k and lse.
Order:    one writer per output element, edges summed in CSR order, the longest rows piece by
          piece: bitwise repeatable for any number of threads.
"""

from functools import lru_cache
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from grand_fast.kernels._column_pass import column_pass
from grand_fast.kernels._cpu import Compiled, Row, each_row
from grand_fast.kernels._csr import Csr
from grand_fast.kernels._edge_scores import (
    HeadGroup,
    RowBuffer,
    buffer_size,
    combine_lse,
    head_groups,
    softmax,
)
from grand_fast.kernels._memory import empty
from grand_fast.kernels._row_pass import row_pass
from grand_fast.kernels._simd import Int, Kernel, Vec
from grand_fast.kernels._weighting import AttentionGradients, Weighting, only_default


@lru_cache(maxsize=256)
def _edge_attention_fwd_kernel(
    h: int,
    d_k: int,
    dtype: torch.dtype,
    index: torch.dtype,
    *,
    mean_heads: bool,
    step: Literal["whole", "lse", "weights"],
) -> Compiled:
    """`whole` rows; or for pieces of long rows first `lse`, then, lse known, their `weights`."""
    k = Kernel(f"edge_attention_fwd_{step}", dtype, index)
    q, key, col, lse = k.matrix("q"), k.matrix("k"), k.indices("col"), k.matrix("lse")
    scratch = k.matrix("scratch").row(k.thread)
    with each_row(k, pieces=step != "whole", own_rows=[(q, h * d_k), (lse, h)]) as row:
        for group in head_groups(k, h, d_k):
            buffer = RowBuffer(scratch, group, row)
            normaliser = softmax(
                group, row, q, key, col, lse, buffer, [(key, h * d_k)], known=step == "weights"
            )
            if step == "lse":
                continue
            with k.loop(row.begin, row.end, group.edges) as e:
                p = buffer.at(e).load() * normaliser
                if mean_heads:
                    _store_mean(group, row, e, group.over_heads(p * group.of_heads(1.0 / h)))
                else:
                    _store_heads(group, row, e, p, h)
    return Compiled(k)


def _store_mean(group: HeadGroup, row: Row, e: Int, w: Vec) -> None:
    """The block's weights, one lane an edge, added to those of earlier groups → `a [E]`."""
    k = group.kernel
    n = (row.end - e).minimum(group.edges)
    place = k.vector("a").at(e + row.shift)
    w = w.shuffle([z * group.width % k.lanes for z in range(k.lanes)])
    place.store_first(w + place.load_first(n) if group.first else w, n)


def _store_heads(group: HeadGroup, row: Row, e: Int, p: Vec, h: int) -> None:
    """The block's weights, without the lanes that only fill up the width → `a [E, H]`."""
    k = group.kernel
    n = (row.end - e).minimum(group.edges)
    used = [z * group.width + i for z in range(group.edges) for i in range(group.count)]
    packed = p.shuffle(used + [0] * (k.lanes - len(used)))
    k.vector("a").at((e + row.shift) * h + group.first).store_first(packed, n * group.count)


def edge_attention_fwd(
    q: Float[Tensor, "N H d_k"],
    k: Float[Tensor, "N H d_k"],
    *,
    weighting: Weighting | None = None,
    edge_weight: Float[Tensor, " E"] | None = None,
    top: Float[Tensor, ""] | None = None,
    mean_heads: bool,
    csr: Csr,
    csr_t: Csr | None = None,
) -> tuple[Float[Tensor, "E H"] | Float[Tensor, " E"], Float[Tensor, "N H"]]:
    """Edge weights `a` in slot order (their mean over heads if `mean_heads`), and `lse`."""
    only_default(weighting, q.shape[2], edge_weight)
    n, h, d_k = q.shape
    e, work = csr.col.numel(), csr.work
    a = empty(*((e,) if mean_heads else (e, h)), dtype=q.dtype)
    lse = empty(n, h, dtype=q.dtype)
    shape = (h, d_k, q.dtype, csr.col.dtype)
    buffer = buffer_size(work.longest)
    arguments: dict[str, Any] = {"q": q, "k": k, "a": a}
    arguments |= {"col": csr.col, "rowptr": csr.rowptr, "last_edge": e - 1}
    _edge_attention_fwd_kernel(*shape, mean_heads=mean_heads, step="whole")(
        work, pieces=False, scratch=buffer, lse=lse, **arguments
    )
    if work.hub_rows.numel():
        partial_lse = empty(work.piece_begin.numel(), h, dtype=q.dtype)
        kernel = _edge_attention_fwd_kernel(*shape, mean_heads=mean_heads, step="lse")
        kernel(work, pieces=True, scratch=buffer, lse=partial_lse, **arguments)
        lse[work.hub_rows] = combine_lse(partial_lse, work)
        kernel = _edge_attention_fwd_kernel(*shape, mean_heads=mean_heads, step="weights")
        kernel(work, pieces=True, scratch=buffer, lse=lse, **arguments)
    return a, lse


def edge_attention_bwd(
    da: Float[Tensor, "E H"] | Float[Tensor, " E"],
    q: Float[Tensor, "N H d_k"],
    k: Float[Tensor, "N H d_k"],
    *,
    weighting: Weighting | None = None,
    edge_weight: Float[Tensor, " E"] | None = None,
    top: Float[Tensor, ""] | None = None,
    lse: Float[Tensor, "N H"],
    csr: Csr,
    csr_t: Csr,
    needs_dedge_weight: bool = False,
) -> AttentionGradients:
    """`dq` and `dk`, from the gradient by the weights or by their mean over heads."""
    dq, dk = (empty(*q.shape, dtype=q.dtype) for _ in range(2))
    lse, delta = row_pass(q, k, lse=lse, csr=csr, da=da, dq=dq)
    column_pass(q, k, lse=lse, delta=delta, csr_t=csr_t, da=da, dk=dk)
    return AttentionGradients(dq=dq, dk=dk)
