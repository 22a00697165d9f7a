"""attention_product: y[i,h,:] = Σ_{e in row i} a[e,h] · (v[col[e],h,:] + edge_value[e,h,:])

with the weights a of edge_attention, of keys k[col[e],h,:] + edge_key[e,h,:]; the mean over heads
of y where that is asked for.
Plain PyTorch, differentiable by autograd, correct in any float type (sums in float32 or wider).
"""

from jaxtyping import Float
from torch import Tensor

from grand_fast.kernels.csr import Cost, Csr, edge_rows
from grand_fast.kernels.edge_attention.reference import edge_scores, normalised
from grand_fast.kernels.weighting import Weighting, scaled_dot


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
    """The weighted sums `y` of each head (their mean if `mean_heads`), and `norm` of the scores.

    Tables of edges are in slot order. `top` comes with the normaliser squareplus, without
    `edge_key`; `csr_t` is not needed here.
    """
    n, _, d_k = q.shape
    weighting = weighting or scaled_dot(d_k)
    row, col = edge_rows(csr), csr.col.long()
    s = edge_scores(
        q, k, weighting=weighting, edge_key=edge_key, edge_weight=edge_weight, receiver=row,
        sender=col,
    )  # fmt: skip
    group = row if weighting.normalize == "receiver" else col
    a, norm = normalised(s, group, n, weighting=weighting, top=top)
    messages = v.to(s.dtype)[col]  # [E, H, d]
    if edge_value is not None:
        messages = messages + edge_value.to(s.dtype)
    y = messages.new_zeros(n, *messages.shape[1:]).index_add(0, row, a[:, :, None] * messages)
    return (y.mean(1) if mean_heads else y).to(v.dtype), norm


def cost(
    *, n: int, e: int, h: int, d: int, d_k: int, element_bytes: int, mean_heads: bool,
    edge_columns: int = 0, index_bytes: int = 4,
) -> Cost:  # fmt: skip
    """Bytes and flops of one forward call; `edge_columns`: numbers an edge has in its tables."""
    index = index_bytes * (n + 1 + e)
    written = element_bytes * n * d * (1 if mean_heads else h) + 8 * n * h
    once = index + written + element_bytes * (n * h * d_k + e * edge_columns)
    gathered = element_bytes * h * (d + d_k)
    return Cost(
        bytes_min=once + n * gathered,
        bytes_max=once + e * gathered,
        flops=e * (h * (2 * d_k + 2 * d + 3) + 2 * edge_columns),
    )
