"""Backward of the edge attention: by q, k, edge weights and the largest score, and by the values.

With t[e,h] the gradient by the weight a[e,h] and Δ[g,h] = Σ_{e in group g} a[e,h] t[e,h]:
ds[e,h] = a[e,h] · ρ[e,h] · (t[e,h] − Δ[g,h]),  du[e,h] = scale · w[e] · φ'[e,h] · ds[e,h],
dq[i,h] = Σ_e du[e,h] k[col[e],h], dk likewise,  dw[e] = Σ_h φ[e,h] ds[e,h],  dtop = −Σ ds.

Group pass: on the view whose rows are the groups over which weights are normalised, so A unless
            that is over the edges of a sender; gives Δ, and the gradient of the rows' own vectors.
Other pass: on the other view; gathers Δ and what normalises; gives that of the others' vectors.
Both compute a again. The one on A gives dw, the one on Aᵀ dx of a diffusion.
t comes from `da`, or in a diffusion from the state: t[e,h] = <alpha · df[i], x[col[e]]> / H.

A product has values v for each head, and edges may add to keys and values:
t[e,h] = <dy[i,h], v[col[e],h] + edge_value[e,h]>, of a mean over heads <dy[i], …> / H, and
dv[j,h] = Σ_e a[e,h] dy[i,h] is found in place of dx. Keys are k[col[e]] + edge_key[e] above. The
pass on A gives dedge_key[e,h] = du[e,h] q[i,h] and dedge_value[e,h] = a[e,h] dy[i,h].
"""

from collections.abc import Mapping

from torch import Tensor

from grand_fast.kernels.cpu.attention.backward_far_side import other_pass
from grand_fast.kernels.cpu.attention.backward_normalized_side import group_pass
from grand_fast.kernels.cpu.attention.backward_results import Results, StateGradient
from grand_fast.kernels.cpu.attention.normalizer import EdgeInputs
from grand_fast.kernels.cpu.memory import empty
from grand_fast.kernels.csr import Csr
from grand_fast.kernels.weighting import Upstream


def attention_bwd(
    inputs: EdgeInputs,
    upstream: Upstream,
    *,
    norm: Tensor,
    csr: Csr,
    csr_t: Csr,
    needs: Mapping[str, bool],
    may_overwrite_k: bool = False,
) -> dict[str, Tensor]:
    """Gradients by name: `dx` of a diffusion, and those of which `needs` says that they are needed.

    `dqk`, which all by edges come with; `dalpha`, `dv`; `dedge_weight`, `dedge_key`, `dedge_value`.
    """
    q, k = inputs.q, inputs.k
    tables = {"dedge_weight": inputs.edge_weight, "dedge_key": inputs.edge_key}
    tables["dedge_value"] = upstream.edge_value
    of_edges = {name: _like(t) for name, t in tables.items() if t is not None and needs.get(name)}

    def by_senders(**own: Tensor) -> Results:
        state = None
        if upstream.source == "state":
            state = StateGradient(upstream, csr_t.work, needs_dalpha=needs.get("dalpha", False))
        if upstream.x is not None and needs.get("dv"):
            own["dv"] = _like(upstream.x)
        return Results(own, {}, state)

    if not needs["dqk"] and not of_edges:
        return other_pass(inputs, upstream, by_senders(), norm=norm, delta=None, csr=csr_t)
    of_receivers = inputs.weighting.normalize == "receiver"
    # The last pass must gather no keys if their rows are to be overwritten one by one.
    if may_overwrite_k and of_receivers:
        dq, dk = empty(*q.shape, dtype=q.dtype), k
    else:  # side by side: one product then takes both back through the projections
        dq, dk = empty(q.shape[0], 2, *q.shape[1:], dtype=q.dtype).unbind(1)
    own, far = (csr, Results({"dq": dq}, of_edges)), (csr_t, by_senders(dk=dk))
    if not of_receivers:
        own, far = far, own
    grads = group_pass(inputs, upstream, own[1], norm=norm, csr=own[0])
    found = other_pass(inputs, upstream, far[1], norm=grads.norm, delta=grads.delta, csr=far[0])
    return grads.found | found | ({} if grads.dtop is None else {"dtop": grads.dtop})


def _like(t: Tensor) -> Tensor:
    return empty(*t.shape, dtype=t.dtype)
