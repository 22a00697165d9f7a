"""From the dot product of an edge to its weight, and back: what each `Weighting` compiles to.

Units: kernels scale neither q nor k. A score s lacks the factor `unit`, which the exponent of a
softmax gets with log₂ e, as 2ˢ is one instruction and eˢ five: p = 2^(s · unit · log₂ e − shift),
its shift in base 2 too. v of squareplus is s · unit − top.

Large scores: either is one fused multiply-add, written as such, so that no compiler rounds the
product here and not there. Two sweeps with the same tiles of q and k (`head_sizes`) sum each dot
product in the same order, whichever of the two they gather: their p are alike bit for bit, at any
size of the scores, and so it does not matter that the shift is rounded. These are the sweep that
finds `norm` and that which uses it, and the two passes of a backward. Forward and backward differ
in their tiles, so their scores by roundings: the row pass sums its own p. Where only the forward's
sum is at hand, scores of 10⁵ leave 1 % of a weight open, and `weight` sees to it that none exceeds
the sum. From 10⁹ on p may leave the range of float32.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment"
# (functions under @triton.jit take values that Python's types cannot name, and grow tuples)

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from grand_fast.kernels.csr import Csr
from grand_fast.kernels.gpu.pieces import View, view_of
from grand_fast.kernels.gpu.sums import head_dot, rounded
from grand_fast.kernels.weighting import Weighting, scaled_dot

LOG2E = tl.constexpr(math.log2(math.e))


class KernelWeighting(NamedTuple):
    """A `Weighting` as an argument of kernels: None and `function` are known to the compiler.

    scale: of the dot product. slope: of leaky_relu. top: a scalar, which says that the normaliser
    is squareplus. edge_weight: [E], in slots of `A`. edge_key: [E, H, d_k], there too.
    """

    function: tl.constexpr
    scale: float
    slope: float | None
    top: Tensor | None
    edge_weight: Tensor | None
    edge_key: Tensor | None = None

    def view(self, csr: Csr) -> View:
        """With slots in `A` if kernels are to look there for weights or keys."""
        return view_of(csr, needs_slot=self.needs_slot)

    @property
    def needs_slot(self) -> bool:
        """Whether there are tables of edges."""
        return self.edge_weight is not None or self.edge_key is not None


def kernel_weighting(
    weighting: Weighting | None, d_k: int, *, edge_weight: Tensor | None, top: Tensor | None,
    edge_key: Tensor | None = None,
) -> KernelWeighting:  # fmt: skip
    """Of the paper's weighting unless another is given; the direction is a matter of launches."""
    weighting = weighting or scaled_dot(d_k)
    assert weighting.scale > 0  # the largest score is that of the largest `s · unit`
    return KernelWeighting(
        function=tl.constexpr(weighting.function),
        scale=weighting.scale,
        slope=weighting.slope if weighting.function == "leaky_relu" else None,
        top=top if weighting.normalizer == "squareplus" else None,
        edge_weight=edge_weight,
        edge_key=edge_key,
    )


@triton.jit
def load_top(weighting):
    """The score that squareplus counts from."""
    top = 0.0
    if weighting.top is not None:
        top = tl.load(weighting.top)
    return top


@triton.jit
def load_edge_weight(weighting, slot, mask_e):
    """Weights of [BLOCK_E, BLOCK_G] edges with an axis for heads, in a tuple; () without any."""
    w = ()
    if weighting.edge_weight is not None:
        at = weighting.edge_weight + slot[:, :, None].to(tl.int64)
        w = (tl.load(at, mask=mask_e[:, :, None], other=0.0).to(tl.float32),)
    return w


@triton.jit
def unit(weighting):
    """What φ lacks, and with it scores."""
    if weighting.function == "exp":
        return 1.0
    else:
        return weighting.scale


@triton.jit
def phi(u, weighting):
    """φ of dot products, up to `unit`."""
    if weighting.function == "exp":
        u = tl.exp2(u * (weighting.scale * LOG2E))
    elif weighting.function == "leaky_relu":
        u = tl.where(u > 0.0, u, u * weighting.slope)
    return u


@triton.jit
def scores(u, w, weighting):
    """Scores of dot products up to `unit`, N_H of [BLOCK_E, BLOCK_G, BLOCK_H].

    w: of `load_edge_weight`.
    """
    s = ()
    for g in tl.static_range(len(u)):
        s_g = phi(u[g], weighting)
        if len(w) > 0:
            s_g *= w[0]
        s = s + (s_g,)
    return s


@triton.jit
def edge_scores(k, q, slot, mask_e, weighting, sizes: tl.constexpr):
    """Weights w of a turn's edges, dot products u of their rows k with the row q, and scores."""
    w = load_edge_weight(weighting, slot, mask_e)
    u = head_dot(k, q, sizes)
    return w, u, scores(u, w, weighting)


@triton.jit
def squareplus(s, weighting, top):
    """p = 2 / (√(v² + 4) − v) of v = s · unit − top, and ρ = 1 / √(v² + 4)."""
    v = tl.fma(s, unit(weighting), -top)
    square = v * v + 4.0
    rho = tl.rsqrt(square)
    root = square * rho - v
    # 1 / root, which is positive; a division takes ten instructions more
    return 2.0 * tl.rsqrt(root * root), rho


@triton.jit
def in_base_2(shift, weighting):
    """The shift of a softmax, of scores of `Weighting`."""
    if weighting.top is None:
        shift = rounded(shift * LOG2E)
    return shift


@triton.jit
def unnormalised(s, shift, weighting, top):
    """p of scores; shift in base 2, which squareplus does not need."""
    if weighting.top is None:
        return tl.exp2(tl.fma(s, unit(weighting) * LOG2E, -shift))
    else:
        p, _ = squareplus(s, weighting, top)
        return p


@triton.jit
def weight(s, shift, inverse, weighting, top):
    """p / Σ p of scores, at most 1; 0 where shift is +∞ and `inverse` 0.

    Lanes that have copies of it may sum it: a product could be fused into the sum of one of them.
    """
    a = unnormalised(s, shift, weighting, top) * inverse
    return tl.minimum(a, 1.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def weights(s, shift, inverse, weighting, top):
    """`weight` of every group of heads."""
    a = ()
    for g in tl.static_range(len(s)):
        a = a + (weight(s[g], shift[g], inverse[g], weighting, top),)
    return a


@triton.jit
def past_normalizer(gradient, s, weighting, top):
    """`gradient` times ρ."""
    if weighting.top is not None:
        _, rho = squareplus(s, weighting, top)
        gradient *= rho
    return gradient


@triton.jit
def past_function(ds, u, w, weighting):
    """The gradient by u, divided by its scale, from that by s."""
    if weighting.function == "exp":
        ds *= phi(u, weighting)
    elif weighting.function == "leaky_relu":
        ds = tl.where(u > 0.0, ds, ds * weighting.slope)
    if len(w) > 0:
        ds *= w[0]
    return ds


@triton.jit
def edge_weight_gradient(ds, u, weighting):
    """Σ over heads of φ ds, [BLOCK_E, BLOCK_G]."""
    dw = tl.sum(rounded(phi(u[0], weighting) * ds[0]), 2)
    for g in tl.static_range(1, len(u)):
        dw += tl.sum(rounded(phi(u[g], weighting) * ds[g]), 2)
    return dw * unit(weighting)
