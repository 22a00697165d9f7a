"""Tiles of gathered rows: their sizes, and the jit helpers that load and sum them.

A row of a table is read by LANES lanes, VEC columns each at a time, in as many chunks as it takes;
the lanes that are left over read other rows, the groups. A chunk of a gathered table is a tile
`[BLOCK_E, BLOCK_G, columns]`, and a kernel holds a tuple of them. Edges stay in registers that way:
a sum over them needs no shuffle, and the groups are added up once, at the end. Both tables of a
kernel have the same lanes, so that weights meet values without a trip through shared memory.

Below, `most` is how many columns a lane may read at once: at most `load_columns`.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment"
# (functions under @triton.jit take values that Python's types cannot name, and grow tuples)

import torch
import triton
import triton.language as tl

_WARP_COLUMNS = 512  # a wider row is shared by more warps, at the price of a barrier a turn


def row_warps(width: int) -> int:
    """Warps that share a row of `width` columns."""
    return min(8, max(1, int(triton.next_power_of_2(width)) // _WARP_COLUMNS))


def vector(width: int, most: int) -> int:
    """Columns that one load of a lane takes: rows of `width` columns begin at multiples of it."""
    return min(most, width & -width)


def load_columns(dtype: torch.dtype) -> int:
    """Columns that a lane can read at once, in 128 bits."""
    return 16 // dtype.itemsize


def value_lanes(d: int, most: int) -> int:
    """Lanes that read a row of `d` columns at once, each as much as it can in one load."""
    return min(32 * row_warps(d), max(1, int(triton.next_power_of_2(d)) // vector(d, most)))


def head_lanes(h: int, d_k: int, most: int) -> int:
    """Lanes that read a row of q or k at once, each as much as it can in one load."""
    width = int(triton.next_power_of_2(h)) * int(triton.next_power_of_2(d_k))
    return min(32 * row_warps(width), max(1, width // vector(d_k, most)))


def head_sizes(h: int, d_k: int, lanes: int, most: int) -> dict[str, int]:
    """Compile-time sizes of q or k: N_A chunks of BLOCK_A columns, N_H times BLOCK_H heads.

    A head has BLOCK_K columns; heads and columns come padded. It spans several chunks, or a chunk
    has several heads.
    """
    heads, block_k = int(triton.next_power_of_2(h)), int(triton.next_power_of_2(d_k))
    block_k = max(block_k, lanes // heads)
    vec = min(vector(d_k, most), heads * block_k // lanes, block_k)
    block_h = max(1, lanes * vec // block_k)
    return {
        "BLOCK_H": block_h,
        "BLOCK_K": block_k,
        "BLOCK_A": lanes * vec,
        "VEC_A": vec,
        "N_A": heads * block_k // (lanes * vec),
        "N_H": heads // block_h,
    }


def value_sizes(d: int, lanes: int, most: int) -> dict[str, int]:
    """Compile-time sizes of a row of `d` columns: N_D chunks of BLOCK_D."""
    vec = vector(d, most)
    return {"BLOCK_D": lanes * vec, "VEC_D": vec, "N_D": triton.cdiv(d, lanes * vec)}


def edges(sizes: dict[str, int], lanes: int, values: int, *, scalars: int = 1) -> dict[str, int]:
    """Edges that a program gathers at a time, `[BLOCK_E, BLOCK_G]`, and its warps.

    Args:
        sizes: those of the tables, of `head_sizes` and `value_sizes`.
        lanes: that read one row; more than a warp's are of several warps.
        values: elements that a lane may hold of all tiles.
        scalars: numbers gathered per edge in one load next to the tables: 1, its index, or more.
    """
    warps = max(1, lanes // 32)
    groups = 32 * warps // lanes
    of_edge = sum(sizes.get(f"N_{t}", 0) * sizes.get(f"VEC_{t}", 0) for t in "AD")
    # A load of one scalar per lane or more gets a layout of its own, and drags the scores into it
    # through shared memory: stay below.
    most = min(values // of_edge, 16 * warps // (groups * scalars))
    return {"BLOCK_E": 1 << max(0, most.bit_length() - 1), "BLOCK_G": groups, "num_warps": warps}


@triton.jit
def load_piece(pid_p, piece_row_ptr, piece_beg_ptr, piece_end_ptr):
    """Row and first slot of a piece, in 64 bits: addresses are made of them; and its edges."""
    row = tl.load(piece_row_ptr + pid_p).to(tl.int64)
    beg = tl.load(piece_beg_ptr + pid_p).to(tl.int64)
    end = tl.load(piece_end_ptr + pid_p).to(tl.int64)
    return row, beg, (end - beg).to(tl.int32)


@triton.jit
def edge_offsets(BLOCK_E: tl.constexpr, BLOCK_G: tl.constexpr):
    """Slots of one turn, counted from its first: [BLOCK_E, BLOCK_G]."""
    return tl.arange(0, BLOCK_E)[:, None] * BLOCK_G + tl.arange(0, BLOCK_G)[None, :]


@triton.jit
def value_columns(chunk: tl.constexpr, d: tl.constexpr, BLOCK_D: tl.constexpr, VEC_D: tl.constexpr):
    """Offsets and mask of a chunk of a row, [lanes, VEC_D]."""
    lane = tl.arange(0, BLOCK_D // VEC_D)[:, None]
    if VEC_D == 1:
        # Hides from Triton that lanes read side by side: it would give one of them four columns,
        # and the edges to the lanes that are left. The machine code has no trace of it.
        lane = tl.minimum(lane, 1 << 20)
    offs = chunk * BLOCK_D + lane * VEC_D + tl.arange(0, VEC_D)[None, :]
    return offs, offs < d


@triton.jit
def head_columns(
    chunk: tl.constexpr,
    H: tl.constexpr,
    d_k: tl.constexpr,
    BLOCK_A: tl.constexpr,
    VEC_A: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Offsets and mask of a chunk of a row of q or k, which is laid out as padded heads."""
    c, mask = value_columns(chunk, H * d_k, BLOCK_A, VEC_A)
    offs = c
    if d_k != BLOCK_K:
        offs = (c // BLOCK_K) * d_k + c % BLOCK_K
        mask = (c // BLOCK_K < H) & (c % BLOCK_K < d_k)
    return offs, mask


@triton.jit
def heads_of(group: tl.constexpr, BLOCK_H: tl.constexpr):
    """The heads of one of N_H groups: [BLOCK_H]."""
    return group * BLOCK_H + tl.arange(0, BLOCK_H)


@triton.jit
def load_row(row_ptr, offs, mask):
    """A chunk of one row, float32 [columns]."""
    x = tl.load(row_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    return tl.reshape(x, [offs.shape[0] * offs.shape[1]])


@triton.jit
def load_values(row_ptr, d: tl.constexpr, BLOCK_D: tl.constexpr, VEC_D: tl.constexpr,
                N_D: tl.constexpr):  # fmt: skip
    """A row of `d` columns, in chunks [BLOCK_D]."""
    x = ()
    for c in tl.static_range(N_D):
        offs, mask = value_columns(c, d, BLOCK_D, VEC_D)
        x = x + (load_row(row_ptr, offs, mask),)
    return x


@triton.jit
def load_heads(row_ptr, H: tl.constexpr, d_k: tl.constexpr, BLOCK_A: tl.constexpr,
               VEC_A: tl.constexpr, BLOCK_K: tl.constexpr, N_A: tl.constexpr):  # fmt: skip
    """A row of q or k, in chunks [BLOCK_A]."""
    q = ()
    for c in tl.static_range(N_A):
        offs, mask = head_columns(c, H, d_k, BLOCK_A, VEC_A, BLOCK_K)
        q = q + (load_row(row_ptr, offs, mask),)
    return q


@triton.jit
def load_per_head(row_ptr, H: tl.constexpr, BLOCK_H: tl.constexpr, N_H: tl.constexpr, other):
    """A number for each head of a row, in groups [BLOCK_H]; `other` for padded heads."""
    lse = ()
    for g in tl.static_range(N_H):
        offs_h = heads_of(g, BLOCK_H)
        lse = lse + (tl.load(row_ptr + offs_h, mask=offs_h < H, other=other),)
    return lse


@triton.jit
def gather_per_head(rows, first: tl.constexpr, mask_e, other, H: tl.constexpr,
                    BLOCK_H: tl.constexpr, N_H: tl.constexpr):  # fmt: skip
    """Numbers of every head from column `first` on, N_H of [BLOCK_E, BLOCK_G, BLOCK_H].

    rows: pointers [BLOCK_E, BLOCK_G, 1]. `other` for padded heads, and where there is no edge.
    """
    numbers = ()
    for g in tl.static_range(N_H):
        offs_h = heads_of(g, BLOCK_H)
        mask = mask_e[:, :, None] & (offs_h < H)
        if first > 0:
            offs_h += first
        numbers = numbers + (tl.load(rows + offs_h, mask=mask, other=other),)
    return numbers


@triton.jit
def zeros(N: tl.constexpr, BLOCK_G: tl.constexpr, columns: tl.constexpr):
    """N sums [BLOCK_G, columns] before the first edge."""
    sums = ()
    for _ in tl.static_range(N):
        sums = sums + (tl.zeros([BLOCK_G, columns], tl.float32),)
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
def products(a, b):
    """The products of two rows, chunk by chunk."""
    y = ()
    for c in tl.static_range(len(a)):
        y = y + (a[c] * b[c],)
    return y


@triton.jit
def scaled(x, factor):
    """A row times a number."""
    y = ()
    for c in tl.static_range(len(x)):
        y = y + (x[c] * factor,)
    return y


@triton.jit
def words_of(table_ptr, stride: tl.constexpr, VEC: tl.constexpr):
    """A table of bfloat16 as one of 32-bit words, where lanes read whole ones; others as they are.

    Unpacked by hand, a pair takes two instructions; by the compiler's conversions, three.
    """
    if table_ptr.dtype.element_ty == tl.bfloat16 and VEC % 2 == 0 and stride % 2 == 0:
        table_ptr = table_ptr.to(tl.pointer_type(tl.uint32))
    return table_ptr


@triton.jit
def gather(table_ptr, index, mask_e, offs, mask, stride: tl.constexpr):
    """A chunk of rows of a table, float32 [BLOCK_E, BLOCK_G, columns]; zero where a mask is off."""
    at = table_ptr + index[:, :, None, None].to(tl.int64) * stride + offs
    x = tl.load(at, mask=mask_e[:, :, None, None] & mask, other=0)
    if x.dtype == tl.uint32:
        low = (x << 16).to(tl.float32, bitcast=True)
        high = (x & 0xFFFF0000).to(tl.float32, bitcast=True)
        x = tl.join(low, high)
    x = tl.reshape(x, [x.shape[0], x.shape[1], x.numel // (x.shape[0] * x.shape[1])])
    return x.to(tl.float32)


@triton.jit
def gather_values(
    table_ptr,
    index,
    mask_e,
    stride: tl.constexpr,
    d: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VEC_D: tl.constexpr,
    N_D: tl.constexpr,
):
    """Rows of a table, in chunks."""
    words = words_of(table_ptr, stride, VEC_D)
    per: tl.constexpr = 2 if words.dtype.element_ty == tl.uint32 else 1  # columns of a word
    x = ()
    for c in tl.static_range(N_D):
        offs, mask = value_columns(c, d // per, BLOCK_D // per, VEC_D // per)
        x = x + (gather(words, index, mask_e, offs, mask, stride // per),)
    return x


@triton.jit
def gather_heads(
    table_ptr,
    index,
    mask_e,
    stride: tl.constexpr,
    H: tl.constexpr,
    d_k: tl.constexpr,
    BLOCK_A: tl.constexpr,
    VEC_A: tl.constexpr,
    BLOCK_K: tl.constexpr,
    N_A: tl.constexpr,
):
    """Rows of q or k, in chunks."""
    words = words_of(table_ptr, stride, VEC_A)
    per: tl.constexpr = 2 if words.dtype.element_ty == tl.uint32 else 1  # columns of a word
    k = ()
    for c in tl.static_range(N_A):
        offs, mask = head_columns(c, H, d_k // per, BLOCK_A // per, VEC_A // per, BLOCK_K // per)
        k = k + (gather(words, index, mask_e, offs, mask, stride // per),)
    return k


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
def head_dot(a, b, BLOCK_H: tl.constexpr, N_H: tl.constexpr, VEC_A: tl.constexpr):
    """Sums over the columns of each head, N_H groups [BLOCK_E, BLOCK_G, BLOCK_H]."""
    chunks: tl.constexpr = len(a) // N_H  # of a group
    s = ()
    for g in tl.static_range(N_H):
        product = rounded_product(a[g * chunks], b[g * chunks], VEC_A)
        for c in tl.static_range(1, chunks):
            product += a[g * chunks + c] * b[g * chunks + c]
        s = s + (tl.sum(by_head(product, BLOCK_H), 3),)
    return s


@triton.jit
def add_products(total, products):
    """total [BLOCK_G, columns] + Σ over the edges of products [BLOCK_E, BLOCK_G, columns], in order.

    One fused multiply-add each: a sum of them that is then added takes one addition more. A lane
    has all edges of its columns, so the compiler knows which one is the first.
    """
    is_first = tl.arange(0, products.shape[0])[:, None, None] == 0
    return tl.sum(tl.where(is_first, total[None, :, :] + products, products), 0)


@triton.jit
def add_weighted(sums, p, x, BLOCK_H: tl.constexpr):
    """Σ over the edges of p x, added to the sums [BLOCK_G, columns] of each chunk.

    p: groups of heads [BLOCK_E, BLOCK_G, BLOCK_H], each for its share of the chunks.
    """
    new = ()
    chunks: tl.constexpr = len(x) // len(p)
    for c in tl.static_range(len(x)):
        px = p[c // chunks][:, :, :, None] * by_head(x[c], BLOCK_H)
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
