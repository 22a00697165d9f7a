"""From the dot product of an edge to its weight, and back: what each `Weighting` compiles to.

Units: kernels scale one of the two vectors by `dot_scale`. The scores of a softmax then come in
base 2, as 2ˢ is one instruction and eˢ five; those of squareplus as they are. exp(u) always gets u
in base 2.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment"
# (functions under @triton.jit take values that Python's types cannot name, and grow tuples)

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from grand_fast.kernels._csr import Csr
from grand_fast.kernels._triton_sums import rounded
from grand_fast.kernels._weighting import Weighting, scaled_dot

LOG2E = tl.constexpr(math.log2(math.e))


class KernelWeighting(NamedTuple):
    """A `Weighting` as an argument of kernels: None and `function` are known to the compiler.

    slope: of leaky_relu. top: a scalar, which says that the normaliser is squareplus.
    edge_weight: [E], in slots of `A`.
    """

    function: tl.constexpr
    slope: float | None
    top: Tensor | None
    edge_weight: Tensor | None


class Scoring(NamedTuple):
    """What launchers hand to kernels. dot_scale: factor of <q, k>; scale: that of its gradient."""

    weighting: KernelWeighting
    dot_scale: float
    scale: float

    def slot(self, csr: Csr) -> Tensor | None:
        """Where the slots of a view are in `A`, if kernels are to look there for weights."""
        return None if self.weighting.edge_weight is None else csr.slot


def scoring(
    weighting: Weighting | None, d_k: int, *, edge_weight: Tensor | None, top: Tensor | None
) -> Scoring:
    """Of the paper's weighting unless another is given; the direction is a matter of launches."""
    weighting = weighting or scaled_dot(d_k)
    if weighting.normalizer == "softmax":
        top = None
    kernels = KernelWeighting(
        function=tl.constexpr(weighting.function),
        slope=weighting.slope if weighting.function == "leaky_relu" else None,
        top=top,
        edge_weight=edge_weight,
    )
    is_natural = top is not None and weighting.function != "exp"
    dot_scale = weighting.scale * (1.0 if is_natural else LOG2E.value)
    return Scoring(kernels, dot_scale, weighting.scale)


@triton.jit
def load_top(weighting):
    """The score that squareplus counts from."""
    top = 0.0
    if weighting.top is not None:
        top = tl.load(weighting.top)
    return top


@triton.jit
def load_slots(slot_ptr, beg, offs, mask_e):
    """Slots in `A` of the slots `beg + offs` of a view; `slot_ptr` is None in that of `A`."""
    if slot_ptr is None:
        return beg + offs
    else:
        return tl.load(slot_ptr + beg + offs, mask=mask_e, other=0)


@triton.jit
def load_edge_weight(weighting, slot, mask_e):
    """Weights of [BLOCK_E, BLOCK_G] edges with an axis for heads, in a tuple; () without any."""
    w = ()
    if weighting.edge_weight is not None:
        at = weighting.edge_weight + slot[:, :, None].to(tl.int64)
        w = (tl.load(at, mask=mask_e[:, :, None], other=0.0).to(tl.float32),)
    return w


@triton.jit
def phi(u, weighting):
    """φ(u), in the units of scores."""
    if weighting.function == "exp":
        u = tl.exp2(u)
        if weighting.top is None:
            u *= LOG2E
    elif weighting.function == "leaky_relu":
        u = tl.where(u > 0.0, u, u * weighting.slope)
    return u


@triton.jit
def scores(u, w, weighting):
    """Scores of dot products, each N_H of [BLOCK_E, BLOCK_G, BLOCK_H]; w of `load_edge_weight`."""
    s = ()
    for g in tl.static_range(len(u)):
        s_g = phi(u[g], weighting)
        if len(w) > 0:
            s_g *= w[0]
        s = s + (s_g,)
    return s


@triton.jit
def squareplus(s, top):
    """p = 2 / (√(v² + 4) − v) of v = s − top, and ρ = 1 / √(v² + 4)."""
    v = s - top
    square = v * v + 4.0
    rho = tl.rsqrt(square)
    root = square * rho - v
    # 1 / root, which is positive; a division takes ten instructions more
    return 2.0 * tl.rsqrt(root * root), rho


@triton.jit
def weight(s, lse, weighting, top):
    """p(s) / Σ p of scores, with lse = log Σ p in base e; 0 where lse is +∞."""
    if weighting.top is None:
        return tl.exp2(s - lse * LOG2E)
    else:
        p, _ = squareplus(s, top)
        return p * tl.exp2(-lse * LOG2E)


@triton.jit
def sum_over_heads(a, weighting):
    """Σ of weights [BLOCK_E, BLOCK_G, BLOCK_H] over heads, alike in all lanes that have a copy."""
    if weighting.top is not None:
        a = rounded(a)
    return tl.sum(a, 2)


@triton.jit
def past_normalizer(gradient, s, weighting, top):
    """`gradient` times ρ."""
    if weighting.top is not None:
        _, rho = squareplus(s, top)
        gradient *= rho
    return gradient


@triton.jit
def past_function(ds, u, w, weighting):
    """The gradient by u, before it was scaled, from that by s."""
    if weighting.function == "exp":
        ds *= tl.exp2(u)
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
    if weighting.top is None:
        dw *= 1.0 / LOG2E
    return dw
