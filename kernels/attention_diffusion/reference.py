"""attention_diffusion: f[i,:] = alpha · (mean_h Σ_{e in row i} a[e,h] · x[col[e],:] − x[i,:])
                                + beta · x0[i,:],   a = edge_attention(q, k)

The paper's equations 2 and 10. Plain PyTorch: `edge_attention`, then `csr_diffusion`.
"""

from jaxtyping import Float
from torch import Tensor

from grand_fast.kernels.csr import Add, Cost, Csr
from grand_fast.kernels.csr_diffusion.reference import csr_diffusion_fwd
from grand_fast.kernels.edge_attention.reference import edge_attention_fwd
from grand_fast.kernels.weighting import Weighting


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
    """The vector field `f`, and `norm`; further arguments as in `edge_attention_fwd`."""
    a_mean, norm = edge_attention_fwd(
        q,
        k,
        weighting=weighting,
        edge_weight=edge_weight,
        top=top,
        mean_heads=True,
        csr=csr,
    )
    return csr_diffusion_fwd(x, a_mean, alpha=alpha, beta=beta, x0=x0, add=add, csr=csr), norm


def cost(
    *, n: int, e: int, d: int, h: int, d_k: int, element_bytes: int, index_bytes: int = 4
) -> Cost:
    """Bytes and flops of one forward call without a source; q and k already projected."""
    index = index_bytes * (n + 1 + e)
    written = element_bytes * n * d + 8 * n * h
    d_att = h * d_k
    return Cost(
        bytes_min=index + written + element_bytes * n * (d + 2 * d_att),
        bytes_max=index + written + element_bytes * (n * (d + d_att) + e * (d + d_att)),
        flops=e * (2 * d_att + 4 * h + 2 * d) + 2 * n * d,
    )
