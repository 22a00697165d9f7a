"""The jit helpers that load rows and tiles of gathered rows; their sizes: `gpu/sizes.py`.

A chunk of a gathered table is a tile `[BLOCK_E, BLOCK_G, columns]`, and a kernel holds a tuple of
them. Edges stay in registers that way: a sum over them needs no shuffle, and the groups are added
up once, at the end. Both tables of a kernel have the same lanes, so that weights meet values
without a trip through shared memory.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment"
# (functions under @triton.jit take values that Python's types cannot name, and grow tuples)

import triton
import triton.language as tl


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
    numbers = ()
    for g in tl.static_range(N_H):
        offs_h = heads_of(g, BLOCK_H)
        numbers = numbers + (tl.load(row_ptr + offs_h, mask=offs_h < H, other=other),)
    return numbers


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
