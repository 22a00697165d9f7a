"""The jit helpers that multiply and sum tiles of gathered rows (`gpu/tiles.py`)."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment"
# (functions under @triton.jit take values that Python's types cannot name, and grow tuples)

import triton
import triton.language as tl


@triton.jit
def zeros(N: tl.constexpr, columns: tl.constexpr, sizes: tl.constexpr):
    """N sums [BLOCK_G, columns] before the first edge."""
    sums = ()
    for _ in tl.static_range(N):
        sums = sums + (tl.zeros([sizes.BLOCK_G, columns], tl.float32),)
    return sums


@triton.jit
def join_lanes(sums):
    """Each sum over all groups of lanes, [columns]."""
    total = ()
    for c in tl.static_range(len(sums)):
        total = total + (tl.sum(sums[c], 0),)
    return total


@triton.jit
def row_dot(a, b):
    """Sum of the products of two rows."""
    t = tl.sum(a[0] * b[0], 0)
    for c in tl.static_range(1, len(a)):
        t += tl.sum(a[c] * b[c], 0)
    return t


@triton.jit
def scaled(x, factor):
    """A row times a number."""
    y = ()
    for c in tl.static_range(len(x)):
        y = y + (x[c] * factor,)
    return y


@triton.jit
def mean_over_heads(y, sizes: tl.constexpr):
    """The mean of the heads of a row in N_A chunks, in N_D of [BLOCK_D]."""
    mean = ()
    for c in tl.static_range(sizes.N_D):
        total = y[c]
        for g in tl.static_range(1, sizes.N_H):
            total += y[g * sizes.N_D + c]
        total = tl.sum(tl.reshape(total, [sizes.BLOCK_H, sizes.BLOCK_D]), 0)
        mean = mean + (total / sizes.H,)
    return mean


@triton.jit
def by_head(a, BLOCK_H: tl.constexpr):
    """[BLOCK_E, BLOCK_G, BLOCK_H · columns] → [BLOCK_E, BLOCK_G, BLOCK_H, columns]."""
    return tl.reshape(a, [a.shape[0], a.shape[1], BLOCK_H, a.shape[2] // BLOCK_H])


@triton.jit
def rounded(product):
    """A product, rounded before it meets the products of other lanes.

    A lane that fused its product into their sum would round otherwise than those, and copies of the
    sum would differ.
    """
    return product + tl.program_id(1).to(tl.float32)  # 0, which the compiler cannot know


@triton.jit
def rounded_product(a, b, VEC: tl.constexpr):
    """a b, rounded; with several columns a lane sums its own products first, and need not."""
    product = a * b
    if VEC == 1:
        product = rounded(product)
    return product


@triton.jit
def head_dot(a, b, sizes: tl.constexpr):
    """Sums over the columns of each head, N_H groups [BLOCK_E, BLOCK_G, BLOCK_H]."""
    chunks: tl.constexpr = sizes.N_A // sizes.N_H  # of a group
    s = ()
    for g in tl.static_range(sizes.N_H):
        product = rounded_product(a[g * chunks], b[g * chunks], sizes.VEC_A)
        for c in tl.static_range(1, chunks):
            product += a[g * chunks + c] * b[g * chunks + c]
        s = s + (tl.sum(by_head(product, sizes.BLOCK_H), 3),)
    return s


@triton.jit
def times_heads(sums, factors):
    """Chunks [BLOCK_G, columns] times the factors of their heads, groups of [BLOCK_G, BLOCK_H]."""
    chunks: tl.constexpr = len(sums) // len(factors)
    heads: tl.constexpr = factors[0].shape[1]
    new = ()
    for c in tl.static_range(len(sums)):
        x = tl.reshape(sums[c], [sums[c].shape[0], heads, sums[c].shape[1] // heads])
        x *= factors[c // chunks][:, :, None]
        new = new + (tl.reshape(x, sums[c].shape),)
    return new


@triton.jit
def add_products(total, products):
    """total [BLOCK_G, columns] + Σ over edges of products [BLOCK_E, BLOCK_G, columns], in order.

    One fused multiply-add each: a sum of them that is then added takes one addition more. A lane
    has all edges of its columns, so the compiler knows which one is the first.
    """
    if products.shape[0] == 1:  # Triton 3.7 fails to compile that choice for AMD
        total += tl.sum(products, 0)
    else:
        is_first = tl.arange(0, products.shape[0])[:, None, None] == 0
        total = tl.sum(tl.where(is_first, total[None, :, :] + products, products), 0)
    return total


@triton.jit
def add_weighted(sums, p, x):
    """Σ over the edges of p x, added to the sums [BLOCK_G, columns] of each chunk.

    p: groups of heads [BLOCK_E, BLOCK_G, heads], each for its share of the chunks.
    """
    new = ()
    chunks: tl.constexpr = len(x) // len(p)
    for c in tl.static_range(len(x)):
        px = p[c // chunks][:, :, :, None] * by_head(x[c], p[0].shape[2])
        new = new + (add_products(sums[c], tl.reshape(px, x[c].shape)),)
    return new


@triton.jit
def edge_dot(a, b, BLOCK_H: tl.constexpr, VEC_D: tl.constexpr):
    """Sum over all columns, [BLOCK_E, BLOCK_G], through the shape of scores: it meets them."""
    product = rounded_product(a[0], b[0], VEC_D)
    for c in tl.static_range(1, len(a)):
        product += a[c] * b[c]
    return tl.sum(tl.sum(by_head(product, BLOCK_H), 3), 2)


@triton.jit
def join(part_ptr, first, last, offs, mask, stride: tl.constexpr):
    """Σ of the partial sums of pieces `first ≤ piece < last`, in order; shaped like `offs`."""
    offs_p = tl.arange(0, 8)[:, None, None]  # pieces in flight
    total = tl.zeros(offs.shape, tl.float32)
    for p in range(first, last, 8):
        at = part_ptr + (p + offs_p) * stride + offs
        total += tl.sum(tl.load(at, mask=(p + offs_p < last) & mask, other=0.0), 0)
    return total
