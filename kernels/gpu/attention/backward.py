"""Backward of the attention: by q, k, edge weights and the largest score, and by the values.

Two passes: over the rows whose edges are normalised, then over the other view. Both compute p again
from q, k and norm. They are named as where receivers normalise: the first goes over A and gives dq
and Delta, the second over Aᵀ and gives dk, what needs Delta, and dx. Where senders normalise, the
first goes over Aᵀ and gives dk, Delta and dx, the second over A and gives dq: q and k change
places, and so do df and x. Of a product dy is in the place of df, v in that of x, and dv of dx.
"""

from jaxtyping import Float
from torch import Tensor

from grand_fast.kernels.csr import Csr
from grand_fast.kernels.gpu.attention.backward_far_side import far_side
from grand_fast.kernels.gpu.attention.backward_normalized_side import normalized_side
from grand_fast.kernels.gpu.attention.scores import KernelWeighting
from grand_fast.kernels.gpu.attention.weight_gradient import Product
from grand_fast.kernels.gpu.diffusion import Field
from grand_fast.kernels.weighting import AttentionGradients, Upstream


def attention_bwd(
    q: Float[Tensor, "N H d_k"],
    k: Float[Tensor, "N H d_k"],
    upstream: Upstream,
    *,
    weighting: KernelWeighting,
    by_sender: bool,
    norm: Float[Tensor, "N 2 H"],
    csr: Csr,
    csr_t: Csr,
    field: Field | None = None,
    product: Product | None = None,
    needs_dqk: bool = True,
    needs_dedge_weight: bool,
) -> AttentionGradients:
    """Gradients by all but the values, those by q and k if needed; `field`, that of dx, is written.

    So is what `product` asks for. Where senders normalise q and k need theirs, as the pass that
    writes `field` or `dv` gives one of them.
    """
    first = second = product
    if product is not None:  # the first pass knows no Delta, and of v only that of senders' rows
        first = product._replace(dedge_key=None, dedge_value=None)
        if by_sender:
            second = product._replace(dv=None)
        else:
            first = first._replace(dv=None)
    if by_sender:  # as seen from the senders, whose rows are those of Aᵀ
        q, k, csr, csr_t, upstream = k, q, csr_t, csr, upstream.swapped()
    d_own = norm_delta = None
    if needs_dqk:
        d_own, norm_delta = normalized_side(
            q, k, upstream, norm=norm, weighting=weighting, csr=csr,
            field=field if by_sender else None, product=first,
        )  # fmt: skip
    d_far, dw, dtop = far_side(
        q, k, upstream, norm=norm, norm_delta=norm_delta, weighting=weighting, csr=csr_t,
        field=None if by_sender else field, product=second, needs_dedge_weight=needs_dedge_weight,
    )  # fmt: skip
    dq, dk = (d_far, d_own) if by_sender else (d_own, d_far)
    return AttentionGradients(dq=dq, dk=dk, dedge_weight=dw, dtop=dtop)
