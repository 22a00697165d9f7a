"""edge_attention: a[e,h] = p(s[e,h]) / Σ p(s[e',h]) over the edges e' of e's receiver or sender,
s[e,h] = φ(scale · <q[i,h,:], k[col[e],h,:]>) · w[e], as a `Weighting` says

Work:     one task per 4096 edges; scores of as many edges at a time as fill a register with
          edges × heads. Over the edges of a sender: a pass on the CSR of Aᵀ first, for norm.
Bytes:    4(N+1) + 4E + 8NH + b(EH + 2N·d_att), b bytes per element, if each k row is read once;
          4(N+1) + 4E + 8NH + b(EH + (N + E)·d_att) if none is reused. EH is E for the mean; bE more
          with edge weights; squareplus reads q and k once more before, for the largest score.
Backward: two passes that recompute the weights (`cpu/attention/backward.py`). Saves q, k and norm.
Order:    as in `cpu/rows.py`: bitwise repeatable for any number of threads.
"""

from functools import lru_cache, partial

from jaxtyping import Float
from torch import Tensor

from grand_fast.kernels.cpu.attention.backward import attention_bwd
from grand_fast.kernels.cpu.attention.head_blocks import EdgeSpec
from grand_fast.kernels.cpu.attention.normalizer import (
    EdgeInputs,
    find_top,
    forward_rows,
    row_weights,
    run_forward,
)
from grand_fast.kernels.cpu.attention.scores import RowBuffer
from grand_fast.kernels.cpu.memory import empty
from grand_fast.kernels.cpu.rows import Compiled, each_row, scratch_size
from grand_fast.kernels.csr import Csr
from grand_fast.kernels.weighting import AttentionGradients, Upstream, Weighting, scaled_dot


@lru_cache(maxsize=256)
def _edge_attention_fwd_kernel(
    spec: EdgeSpec,
    *,
    mean_heads: bool,
    known: bool,
    pieces: bool,
) -> Compiled:
    """`known`: what normalises the weights is, and not found for whole rows on the way."""
    view = spec.view("edge_attention_fwd", "receiver")
    k, h = view.kernel, spec.h
    scratch = k.matrix("scratch").row(k.thread)
    own_rows = forward_rows(view, known=known)
    with each_row(k, pieces=pieces, own_rows=own_rows, own_edges=view.own_edges) as row:
        for group in view.groups:
            buffer = RowBuffer(scratch, group, row)
            normaliser = row_weights(view, group, row, buffer, known=known)
            with k.loop(row.begin, row.end, group.edges) as e:
                a = buffer.at(e).load() * normaliser
                n = (row.end - e).minimum(group.edges)
                if mean_heads:
                    mean = group.over_heads(a * group.of_heads(1.0 / h))
                    group.add_edges(k.vector("a").at(e + row.shift), mean, n)
                else:
                    group.store_slots(k.vector("a"), e + row.shift, n, h, a)
    return Compiled(k)


def edge_attention_top(
    q: Float[Tensor, "N H d_k"],
    k: Float[Tensor, "N H d_k"],
    *,
    weighting: Weighting,
    edge_weight: Float[Tensor, " E"] | None,
    csr: Csr,
) -> Float[Tensor, "N H"]:
    """The largest score of each receiver and head; −inf where there is no edge."""
    return find_top(EdgeInputs(q, k, weighting, edge_weight, None), csr)


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
) -> tuple[Float[Tensor, "E H"] | Float[Tensor, " E"], Float[Tensor, "N 2 H"]]:
    """Edge weights `a` in slot order (their mean over heads if `mean_heads`), and `norm`."""
    _, h, d_k = q.shape
    inputs = EdgeInputs(q, k, weighting or scaled_dot(d_k), edge_weight, top)
    e = csr.col.numel()
    a = empty(*((e,) if mean_heads else (e, h)), dtype=q.dtype)
    kernel = partial(_edge_attention_fwd_kernel, inputs.spec(csr), mean_heads=mean_heads)
    scratch = scratch_size(csr.work.longest)
    return a, run_forward(inputs, csr, csr_t, kernel, scratch=scratch, a=a)


def edge_attention_bwd(
    da: Float[Tensor, "E H"] | Float[Tensor, " E"],
    q: Float[Tensor, "N H d_k"],
    k: Float[Tensor, "N H d_k"],
    *,
    weighting: Weighting | None = None,
    edge_weight: Float[Tensor, " E"] | None = None,
    top: Float[Tensor, ""] | None = None,
    norm: Float[Tensor, "N 2 H"],
    csr: Csr,
    csr_t: Csr,
    needs_dedge_weight: bool = False,
) -> AttentionGradients:
    """From the gradient by the weights or by their mean over heads."""
    inputs = EdgeInputs(q, k, weighting or scaled_dot(q.shape[2]), edge_weight, top)
    needs = {"dqk": True, "dedge_weight": needs_dedge_weight}
    grads = attention_bwd(inputs, Upstream(da=da), norm=norm, csr=csr, csr_t=csr_t, needs=needs)
    return AttentionGradients(**grads)
