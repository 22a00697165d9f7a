"""attention_diffusion: f[i,:] = alpha · (Σ_{e in row i} w[e] · x[col[e],:] − x[i,:])
                                + beta · x0[i,:],
    w[e] = mean_h exp(s[e,h] − lse[i,h]), s[e,h] = <q[i,h,:], k[col[e],h,:]> / √d_k
    or whatever else a `Weighting` says (`_triton_weighting.py`).

Work:     one program per piece of at most 256 edges of a row; BLOCK_E · BLOCK_G rows of k and x a
          turn. In one sweep by online softmax where an accumulator for each head fits in the
          registers. Else in two: lse, then w and the sum; with lse known one accumulator serves
          all heads, so H does not cost registers. A hub's lse needs all its pieces: they are swept
          first by a kernel of their own. Where k is x itself, as one head, a row is gathered once
          for both: the projection of the keys is then absorbed into q.
Bytes:    4(N+1) + 4E + b·2N(d + d_att) + 4NH, b bytes per element, if each row is read once;
          4(N+1) + 4E + b(2Nd + Nd_att + E(d + d_att)) + 4NH if no row is reused between receivers
          (a second sweep finds a row's k in cache), counting x[i] among the latter's rows of x;
          b·Nd more with a source; the list of pieces adds 12N.
Backward: per head ds = p (t − Delta[i]) / H, t = <alpha · df[i], x[col[e]]>,
          Delta[i] = Σ_{e in row i} p · t. A row pass over the CSR of A gives dq and Delta; a column
          pass over that of Aᵀ gives dk and dx = alpha · (Σ w · df − df); it gathers lse and Delta,
          laid side by side. Both compute p again from q, k and lse: nothing of size E is saved.
          The head mean hides Delta: <df, f> would not give it.
          dalpha[d] = Σ_j x_j · (Aᵀ df − df)_j, by a pass over N that also scales dx; the bracket is
          stored in float32 in between.
Senders:  where they normalise, a sweep over the CSR of Aᵀ writes lse of every sender, and an edge
          gathers it beside k and x (4H·E more at most). The passes of the backward change places:
          that over Aᵀ gives dk, Delta and dx, that over A dq.
Weights:  an edge's is read at its slot of A in every sweep (4E each, and the slots 4E over Aᵀ); its
          gradient is written by the pass that gathers Delta.
Order:    one writer per output element; edges summed in CSR order, pieces of a hub in theirs:
          bitwise repeatable.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from grand_fast.kernels._csr import Add, Csr
from grand_fast.kernels._triton import launcher
from grand_fast.kernels._triton_diffusion import finish_field_gradient
from grand_fast.kernels._triton_lse import write_lse
from grand_fast.kernels._triton_weighting import scoring
from grand_fast.kernels._weighting import AttentionGradients, Weighting
from grand_fast.kernels.attention_diffusion._triton_column_pass import bwd_dk
from grand_fast.kernels.attention_diffusion._triton_forward import write_field
from grand_fast.kernels.attention_diffusion._triton_row_pass import bwd_dq


@launcher
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
) -> tuple[Float[Tensor, "N d"], Float[Tensor, "N H"]]:
    """The vector field `f`, and `lse` of the scores."""
    by_sender = weighting is not None and weighting.normalize == "sender"
    of = scoring(weighting, q.shape[2], edge_weight=edge_weight, top=top)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=x.device)
    if by_sender:
        assert csr_t is not None
        write_lse(lse, k, q, scoring=of, csr=csr_t, whole_rows=True)
    else:
        write_lse(lse, q, k, scoring=of, csr=csr, whole_rows=False)
    f = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    write_field(
        f, lse, x, q=q, k=k, scoring=of, by_sender=by_sender, alpha=alpha, beta=beta, x0=x0,
        add=add, csr=csr,
    )  # fmt: skip
    return f, lse


@launcher
def attention_diffusion_bwd(
    df: Float[Tensor, "N d"],
    x: Float[Tensor, "N d"],
    q: Float[Tensor, "N H d_k"],
    *,
    k: Float[Tensor, "N H d_k"],
    weighting: Weighting | None = None,
    edge_weight: Float[Tensor, " E"] | None = None,
    top: Float[Tensor, ""] | None = None,
    lse: Float[Tensor, "N H"],
    alpha: Float[Tensor, " d"],
    df_scale: float = 0.0,
    csr: Csr,
    csr_t: Csr,
    needs_dqk: bool,
    needs_dalpha: bool,
    needs_dedge_weight: bool = False,
    may_overwrite_k: bool = False,
) -> AttentionGradients:
    """Gradients by `x` (with q and k held fixed), `q`, `k` and `alpha`, those that are needed.

    `may_overwrite_k` is not made use of here: `dk` has memory of its own.
    """
    by_sender = weighting is not None and weighting.normalize == "sender"
    of = scoring(weighting, q.shape[2], edge_weight=edge_weight, top=top)
    dx = torch.empty(x.shape, dtype=torch.float32 if needs_dalpha else x.dtype, device=x.device)
    add: Add = [] if needs_dalpha or not df_scale else [(df_scale, df)]
    of_x: dict[str, Any] = {"dx": dx, "add": add, "is_scaled": not needs_dalpha}
    grads = AttentionGradients()
    if not by_sender:
        lse_delta = None
        if needs_dqk:
            own, lse_delta = bwd_dq(df, x, q, k=k, lse=lse, scoring=of, alpha=alpha, csr=csr)
            grads = grads._replace(dq=own)
        other, dw, dtop = bwd_dk(
            df, x, q, k=k, lse=lse, lse_delta=lse_delta, scoring=of, alpha=alpha, csr=csr_t, **of_x,
            needs_dedge_weight=needs_dedge_weight,
        )  # fmt: skip
        grads = grads._replace(dk=other, dedge_weight=dw, dtop=dtop)
    elif needs_dqk:
        # As seen from the senders: their rows are those of Aᵀ, and have sums and Delta.
        own, lse_delta = bwd_dq(x, df, k, k=q, lse=lse, scoring=of, alpha=alpha, csr=csr_t, **of_x)
        other, dw, dtop = bwd_dk(
            x, df, k, k=q, lse=lse, lse_delta=lse_delta, scoring=of, alpha=alpha, csr=csr,
            needs_dedge_weight=needs_dedge_weight,
        )  # fmt: skip
        grads = grads._replace(dq=other, dk=own, dedge_weight=dw, dtop=dtop)
    else:
        # dx = alpha (Aᵀ df − df), and the weights of a row of Aᵀ sum to 1: the field of df there.
        unscaled = torch.ones_like(alpha) if needs_dalpha else alpha
        write_field(
            dx, lse.clone(), df, q=k, k=q, scoring=of, by_sender=False, alpha=unscaled, beta=None,
            x0=None, add=add, csr=csr_t,
        )  # fmt: skip
    dalpha = None
    if needs_dalpha:
        residual, dx = dx, torch.empty(x.shape, dtype=x.dtype, device=x.device)
        dalpha = finish_field_gradient(dx, residual, x, df=df, alpha=alpha, df_scale=df_scale)
    return grads._replace(dx=dx, dalpha=dalpha)
