"""attention_product: y[i,h,:] = Σ_{e in row i} a[e,h] · (v[col[e],h,:] + edge_value[e,h,:])

with the weights a of edge_attention, of keys k[col[e],h,:] + edge_key[e,h,:]; or the mean over
heads of y.

Work:     one task per 4096 edges; a row is swept twice: its scores, as many edges at a time as
          fill a register with edges × heads, then its weighted sums of v, 256 numbers (float32) a
          sweep. If weights are normalised over the edges of a sender, a pass on the CSR of Aᵀ
          first finds norm.
Bytes:    4(N+1) + 4E + 8NH + b(2NHd + 2NHd_k), b bytes per element, if each row of v and k is read
          once; 4(N+1) + 4E + 8NH + b(NH(d + d_k) + EH(d + d_k)) if none is reused. Of a mean Nd are
          written for NHd; tables of edges are read once, bE more with edge weights.
Backward: two passes that recompute the weights (`cpu/attention/backward.py`); nothing of size E
          but the gradients of tables of edges. Saves v, q, k and norm.
Order:    one writer per output element, edges summed in CSR order, the longest rows piece by
          piece: bitwise repeatable for any number of threads.
"""

from dataclasses import replace
from functools import lru_cache, partial

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
from grand_fast.kernels.cpu.attention.weighted_sum import head_terms, sums_of
from grand_fast.kernels.cpu.gathered_sums import Term, ahead, block_of, prefetch_rows
from grand_fast.kernels.cpu.language import Int, chunks
from grand_fast.kernels.cpu.memory import empty
from grand_fast.kernels.cpu.rows import Compiled, each_row, scratch_size, sum_pieces
from grand_fast.kernels.csr import Csr
from grand_fast.kernels.weighting import ProductGradients, Upstream, Weighting, scaled_dot


@lru_cache(maxsize=256)
def _attention_product_fwd_kernel(
    d: int, spec: EdgeSpec, *, valued: bool, mean_heads: bool, known: bool, pieces: bool
) -> Compiled:
    """`known`: what normalises the weights is, and not found for whole rows on the way.

    The sums of heads are stored, those of pieces to `partial`; or first kept, for their mean.
    """
    view = spec.view("attention_product_fwd", "receiver")
    k, h = view.kernel, spec.h
    v, scratch = k.matrix("v"), k.matrix("scratch").row(k.thread)
    edge_value = k.matrix("edge_value") if valued else None
    keeps = mean_heads and not pieces
    own_rows = forward_rows(view, known=known)
    if not pieces:
        own_rows += [(k.matrix("y"), d if mean_heads else h * d)]

    def prefetch(terms: list[Term], e: Int) -> None:
        prefetch_rows(k.indices("col"), ahead(k, e), [block_of(v, [t.chunk for t in terms])])

    with each_row(k, pieces=pieces, own_rows=own_rows, own_edges=view.own_edges) as row:
        kept = scratch.at(k.number("buffer"))
        for group in view.groups:
            buffer = RowBuffer(scratch, group, row)
            normaliser = row_weights(view, group, row, buffer, known=known)
            # Infinite in a row without edges, whose sums are 0
            normaliser = normaliser.first((row.end - row.begin) * k.lanes, k.splat(0.0))
            values = replace(group, d_k=d)
            terms = head_terms(values, v, buffer.at, added=edge_value)
            for total, c in sums_of(k, row, terms, prefetch=prefetch):
                total = total if known else total * values.spread(normaliser, c)
                place = kept if keeps else k.matrix("partial" if pieces else "y").row(row.out)
                place.at(c.start).store(total, c.lanes)
        for c in chunks(d, k.lanes) if keeps else []:
            total = k.splat(0.0)
            for head in range(h):
                total = total + kept.at(head * d + c.start).load(c.lanes)
            k.matrix("y").row(row.out).at(c.start).store(total * k.splat(1.0 / h), c.lanes)
    return Compiled(k)


def attention_product_fwd(
    v: Float[Tensor, "N H d"],
    q: Float[Tensor, "N H d_k"],
    k: Float[Tensor, "N H d_k"],
    *,
    weighting: Weighting | None = None,
    edge_key: Float[Tensor, "E H d_k"] | None = None,
    edge_value: Float[Tensor, "E H d"] | None = None,
    edge_weight: Float[Tensor, " E"] | None = None,
    top: Float[Tensor, ""] | None = None,
    mean_heads: bool,
    csr: Csr,
    csr_t: Csr | None = None,
) -> tuple[Float[Tensor, "N H d"] | Float[Tensor, "N d"], Float[Tensor, "N 2 H"]]:
    """The weighted sums `y` of each head (their mean if `mean_heads`), and `norm` of the scores."""
    n, h, d = v.shape
    weighting = weighting or scaled_dot(q.shape[2])
    inputs, work = EdgeInputs(q, k, weighting, edge_weight, top, edge_key), csr.work
    y = empty(*((n, d) if mean_heads else (n, h, d)), dtype=v.dtype)
    of_pieces = empty(work.piece_begin.numel(), h, d, dtype=v.dtype)
    kernel = partial(
        _attention_product_fwd_kernel, d, inputs.spec(csr), valued=edge_value is not None,
        mean_heads=mean_heads,
    )  # fmt: skip
    buffer = scratch_size(work.longest)
    tables = {} if edge_value is None else {"edge_value": edge_value}
    norm = run_forward(
        inputs, csr, csr_t, kernel, scratch=buffer + h * d, buffer=buffer, v=v, y=y,
        partial=of_pieces, **tables,
    )  # fmt: skip
    if work.hub_rows.numel():
        sums = sum_pieces(of_pieces, work)
        y[work.hub_rows] = sums.mean(1) if mean_heads else sums
    return y, norm


def attention_product_bwd(
    dy: Float[Tensor, "N H d"] | Float[Tensor, "N d"],
    v: Float[Tensor, "N H d"],
    q: Float[Tensor, "N H d_k"],
    *,
    k: Float[Tensor, "N H d_k"],
    weighting: Weighting | None = None,
    edge_key: Float[Tensor, "E H d_k"] | None = None,
    edge_value: Float[Tensor, "E H d"] | None = None,
    edge_weight: Float[Tensor, " E"] | None = None,
    top: Float[Tensor, ""] | None = None,
    norm: Float[Tensor, "N 2 H"],
    csr: Csr,
    csr_t: Csr,
    needs_dv: bool,
    needs_dqk: bool,
    needs_dedge_key: bool = False,
    needs_dedge_value: bool = False,
    needs_dedge_weight: bool = False,
) -> ProductGradients:
    """Those that are needed, from the gradient by the sums of heads or by their mean."""
    needs = {"dv": needs_dv, "dqk": needs_dqk, "dedge_weight": needs_dedge_weight}
    needs |= {"dedge_key": needs_dedge_key, "dedge_value": needs_dedge_value}
    grads = attention_bwd(
        EdgeInputs(q, k, weighting or scaled_dot(q.shape[2]), edge_weight, top, edge_key),
        Upstream(df=dy, x=v, edge_value=edge_value),
        norm=norm, csr=csr, csr_t=csr_t, needs=needs,
    )  # fmt: skip
    return ProductGradients(**grads)
