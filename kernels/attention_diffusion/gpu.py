"""attention_diffusion: f[i,:] = alpha · (Σ_{e in row i} w[e] · x[col[e],:] − x[i,:])
                                + beta · x0[i,:],
    w[e] = mean_h softmax over row i of s[e,h] = <q[i,h,:], k[col[e],h,:]> / √d_k
    or whatever else a `Weighting` says (`gpu/attention/weighting.py`).

Work:     one program per piece of at most 256 edges of a row; BLOCK_E · BLOCK_G rows of k and x a
          turn. In one sweep by online softmax where an accumulator for each head fits in the
          registers. Else in two: norm, then w and the sum; with norm known one accumulator serves
          all heads, so H does not cost registers. A hub's norm needs all its pieces: they are swept
          first by a kernel of their own. Where k is x itself, as one head, a row is gathered once
          for both: the projection of the keys is then absorbed into q.
Bytes:    4(N+1) + 4E + b·2N(d + d_att) + 8NH, b bytes per element, if each row is read once;
          4(N+1) + 4E + b(2Nd + Nd_att + E(d + d_att)) + 8NH if no row is reused between receivers
          (a second sweep finds a row's k in cache), counting x[i] among the latter's rows of x;
          b·Nd more with a source; the list of pieces adds 12N.
Backward: per head ds = p (t − Delta[i]) / H, t = <alpha · df[i], x[col[e]]>,
          Delta[i] = Σ_{e in row i} p · t. A row pass over the CSR of A gives dq and Delta; a column
          pass over that of Aᵀ gives dk and dx = alpha · (Σ w · df − df); it gathers norm and Delta,
          laid side by side (12H an edge). Both compute p again from q, k and norm, of which the row
          pass takes the shift alone and hands on its own sum: nothing of size E is saved.
          The head mean hides Delta: <df, f> would not give it.
          dalpha[d] = Σ_j x_j · (Aᵀ df − df)_j, by a pass over N that also scales dx; the bracket is
          stored in float32 in between.
Senders:  where they normalise, a sweep over the CSR of Aᵀ writes norm of every sender, and an edge
          gathers it beside k and x (8H·E more at most). The passes of the backward change places:
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

from grand_fast.kernels.csr import Add, Csr
from grand_fast.kernels.gpu.attention.diffusion_column_pass import bwd_dk
from grand_fast.kernels.gpu.attention.diffusion_forward import key_sizes, write_field
from grand_fast.kernels.gpu.attention.diffusion_row_pass import bwd_dq
from grand_fast.kernels.gpu.attention.normalizer import write_norm
from grand_fast.kernels.gpu.attention.weighting import kernel_weighting
from grand_fast.kernels.gpu.diffusion import finish_field_gradient
from grand_fast.kernels.gpu.pieces import launcher
from grand_fast.kernels.weighting import AttentionGradients, Weighting


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
) -> tuple[Float[Tensor, "N d"], Float[Tensor, "N 2 H"]]:
    """The vector field `f`, and `norm` of the scores."""
    by_sender = weighting is not None and weighting.normalize == "sender"
    n, h, d_k = q.shape
    of = kernel_weighting(weighting, d_k, edge_weight=edge_weight, top=top)
    norm = torch.empty((n, 2, h), dtype=torch.float32, device=x.device)
    sizes = key_sizes(x.shape[1], h, d_k, x.dtype)
    if by_sender:
        assert csr_t is not None
        write_norm(norm, k, q, weighting=of, csr=csr_t, whole_rows=True, sizes=sizes)
    else:
        write_norm(norm, q, k, weighting=of, csr=csr, whole_rows=False, sizes=sizes)
    f = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    write_field(
        f, norm, x, q=q, k=k, weighting=of, by_sender=by_sender, alpha=alpha, beta=beta, x0=x0,
        add=add, csr=csr,
    )  # fmt: skip
    return f, norm


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
    norm: Float[Tensor, "N 2 H"],
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
    of = kernel_weighting(weighting, q.shape[2], edge_weight=edge_weight, top=top)
    dx = torch.empty(x.shape, dtype=torch.float32 if needs_dalpha else x.dtype, device=x.device)
    add: Add = [] if needs_dalpha or not df_scale else [(df_scale, df)]
    of_x: dict[str, Any] = {"dx": dx, "add": add, "is_scaled": not needs_dalpha}
    grads = AttentionGradients()
    if not by_sender:
        norm_delta = None
        if needs_dqk:
            own, norm_delta = bwd_dq(df, x, q, k=k, norm=norm, weighting=of, alpha=alpha, csr=csr)
            grads = grads._replace(dq=own)
        other, dw, dtop = bwd_dk(
            df, x, q, k=k, norm=norm, norm_delta=norm_delta, weighting=of, alpha=alpha, csr=csr_t,
            **of_x, needs_dedge_weight=needs_dedge_weight,
        )  # fmt: skip
        grads = grads._replace(dk=other, dedge_weight=dw, dtop=dtop)
    elif needs_dqk:
        # As seen from the senders: their rows are those of Aᵀ, and have sums and Delta.
        own, norm_delta = bwd_dq(
            x, df, k, k=q, norm=norm, weighting=of, alpha=alpha, csr=csr_t, **of_x
        )
        other, dw, dtop = bwd_dk(
            x, df, k, k=q, norm=norm, norm_delta=norm_delta, weighting=of, alpha=alpha, csr=csr,
            needs_dedge_weight=needs_dedge_weight,
        )  # fmt: skip
        grads = grads._replace(dq=other, dk=own, dedge_weight=dw, dtop=dtop)
    else:
        # dx = alpha (Aᵀ df − df), and the weights of a row of Aᵀ sum to 1: the field of df there.
        unscaled = torch.ones_like(alpha) if needs_dalpha else alpha
        write_field(
            dx, norm.clone(), df, q=k, k=q, weighting=of, by_sender=False, alpha=unscaled,
            beta=None, x0=None, add=add, csr=csr_t,
        )  # fmt: skip
    dalpha = None
    if needs_dalpha:
        residual, dx = dx, torch.empty(x.shape, dtype=x.dtype, device=x.device)
        dalpha = finish_field_gradient(dx, residual, x, df=df, alpha=alpha, df_scale=df_scale)
    return grads._replace(dx=dx, dalpha=dalpha)
