"""The sum that normalises, and the largest score it is counted from, found in one sweep.

Or for squareplus the sum alone. Each group of lanes has sums of its own, joined at the end.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment"
# (functions under @triton.jit take values that Python's types cannot name, and grow tuples)

import triton
import triton.language as tl

from grand_fast.kernels.gpu.attention.scores import LOG2E, unit, unnormalised


@triton.jit
def online(m, l, s, mask_e, weighting, top):  # noqa: E741
    """One turn of the online sum of one group of heads.

    m, l [BLOCK_G, BLOCK_H], s [BLOCK_E, BLOCK_G, BLOCK_H]. Returns the new m and l, what old sums
    are multiplied by, and p. In a softmax m is the shift in base 2, the largest score;
    squareplus counts from `top` instead, and m stays 0.
    """
    if weighting.top is None:
        s = tl.where(mask_e[:, :, None], s, float("-inf"))
        largest = tl.maximum(m, tl.max(s, 0) * (unit(weighting) * LOG2E))
        fade = tl.exp2(m - largest)
        p = unnormalised(s, largest, weighting, top)
        return largest, l * fade + tl.sum(p, 0), fade, p
    else:
        p = tl.where(mask_e[:, :, None], unnormalised(s, m, weighting, top), 0.0)
        return m, l + tl.sum(p, 0), m, p


@triton.jit
def no_scores(weighting, sizes: tl.constexpr):
    """m and l before the first edge."""
    # Finite, so that a group without edges gives exp(m − m) = 1 and not NaN.
    least: tl.constexpr = -1e38 if weighting.top is None else 0.0
    m = ()
    l = ()  # noqa: E741
    for _ in tl.static_range(sizes.N_H):
        m = m + (tl.full([sizes.BLOCK_G, sizes.BLOCK_H], least, tl.float32),)
        l = l + (tl.zeros([sizes.BLOCK_G, sizes.BLOCK_H], tl.float32),)  # noqa: E741
    return m, l


@triton.jit
def join_groups(m, l):  # noqa: E741
    """m and l of one group of heads over all groups of lanes, each [BLOCK_H], and their shares."""
    largest = tl.max(m, 0)
    fade = tl.exp2(m - largest[None, :])
    return largest, tl.sum(l * fade, 0), fade


@triton.jit
def online_heads(m, l, s, mask_e, weighting, top):  # noqa: E741
    """`online` of every group of heads: m, l, the factors of old sums, and p."""
    new_m = ()
    new_l = ()
    fades = ()
    p = ()
    for g in tl.static_range(len(s)):
        m_g, l_g, fade_g, p_g = online(m[g], l[g], s[g], mask_e, weighting, top)
        new_m = new_m + (m_g,)
        new_l = new_l + (l_g,)
        fades = fades + (fade_g,)
        p = p + (p_g,)
    return new_m, new_l, fades, p


@triton.jit
def join_heads(m, l):  # noqa: E741
    """`join_groups` of every group of heads: m, l, and the shares."""
    largest = ()
    total = ()
    shares = ()
    for g in tl.static_range(len(m)):
        m_g, l_g, share = join_groups(m[g], l[g])
        largest = largest + (m_g,)
        total = total + (l_g,)
        shares = shares + (share,)
    return largest, total, shares
