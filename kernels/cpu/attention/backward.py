"""Backward of the edge attention: by q, k, edge weights and the largest score, and by the values.

With t[e,h] the gradient by the weight a[e,h] and Δ[g,h] = Σ_{e in group g} a[e,h] t[e,h]:
ds[e,h] = a[e,h] · ρ[e,h] · (t[e,h] − Δ[g,h]),  du[e,h] = scale · w[e] · φ'[e,h] · ds[e,h],
dq[i,h] = Σ_e du[e,h] k[col[e],h], dk likewise,  dw[e] = Σ_h φ[e,h] ds[e,h],  dtop = −Σ ds.

Group pass: on the view whose rows are the groups over which weights are normalised, so A unless
            that is over the edges of a sender; gives Δ, and the gradient of the rows' own vectors.
Other pass: on the other view; gathers Δ and what normalises; gives that of the others' vectors.
Both compute a again. The one on A gives dw, the one on Aᵀ dx of a diffusion.
t comes from `da`, or in a diffusion from the state: t[e,h] = <alpha · df[i], x[col[e]]> / H.
"""

from torch import Tensor

from grand_fast.kernels.cpu.attention.backward_far_side import other_pass
from grand_fast.kernels.cpu.attention.backward_normalized_side import group_pass
from grand_fast.kernels.cpu.attention.head_blocks import EdgeInputs
from grand_fast.kernels.cpu.memory import empty
from grand_fast.kernels.csr import Csr
from grand_fast.kernels.weighting import AttentionGradients, Upstream


def attention_bwd(
    inputs: EdgeInputs,
    upstream: Upstream,
    *,
    norm: Tensor,
    csr: Csr,
    csr_t: Csr,
    needs_dqk: bool,
    needs_dedge_weight: bool,
    needs_dalpha: bool = False,
    may_overwrite_k: bool = False,
) -> AttentionGradients:
    """All gradients; without `needs_dqk` only `dx` and `dalpha`."""
    q, k = inputs.q, inputs.k
    if not needs_dqk:
        dx, dalpha = other_pass(
            inputs, upstream, norm=norm, delta=None, csr=csr_t, d_own=None, dedge_weight=None,
            needs_dalpha=needs_dalpha,
        )  # fmt: skip
        return AttentionGradients(dx=dx, dalpha=dalpha)
    of_receivers = inputs.weighting.normalize == "receiver"
    # The last pass must gather no keys if their rows are to be overwritten one by one.
    if may_overwrite_k and of_receivers:
        dq, dk = empty(*q.shape, dtype=q.dtype), k
    else:  # side by side: one product then takes both back through the projections
        dq, dk = empty(q.shape[0], 2, *q.shape[1:], dtype=q.dtype).unbind(1)
    dw = None
    if needs_dedge_weight:
        assert inputs.edge_weight is not None
        dw = empty(inputs.edge_weight.numel(), dtype=inputs.edge_weight.dtype)
    own, far = (csr, dq), (csr_t, dk)  # each with what is written there
    if not of_receivers:
        own, far = far, own
    grads = group_pass(
        inputs, upstream, norm=norm, csr=own[0], d_own=own[1],
        dedge_weight=dw if of_receivers else None, needs_dalpha=needs_dalpha,
    )  # fmt: skip
    dx, dalpha = other_pass(
        inputs, upstream, norm=grads.norm, delta=grads.delta, csr=far[0], d_own=far[1],
        dedge_weight=None if of_receivers else dw, needs_dalpha=needs_dalpha,
    )  # fmt: skip
    if not of_receivers:
        dx, dalpha = grads.dx, grads.dalpha
    return AttentionGradients(dx, dq, dk, dalpha, dw, grads.dtop)
