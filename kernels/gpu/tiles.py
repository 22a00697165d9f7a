"""The jit helpers that load and store rows and gather tiles of them; `sizes`: `gpu/sizes.py`.

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
def load_piece(view, pid_p):
    """Row and first slot of a piece, in 64 bits: addresses are made of them; and its edges."""
    row = tl.load(view.piece_row + pid_p).to(tl.int64)
    beg = tl.load(view.piece_beg + pid_p).to(tl.int64)
    end = tl.load(view.piece_end + pid_p).to(tl.int64)
    return row, beg, (end - beg).to(tl.int32)


@triton.jit
def load_split(split_row_ptr, split_ptr_ptr):
    """The row of several pieces that a join kernel adds up, and `first ≤ piece < last` of it."""
    pid_s = tl.program_id(0)
    row = tl.load(split_row_ptr + pid_s).to(tl.int64)
    first = tl.load(split_ptr_ptr + pid_s).to(tl.int64)
    last = tl.load(split_ptr_ptr + pid_s + 1).to(tl.int64)
    return row, first, last


@triton.jit
def edge_offsets(sizes: tl.constexpr):
    """Slots of one turn, counted from its first: [BLOCK_E, BLOCK_G]."""
    groups = tl.arange(0, sizes.BLOCK_G)[None, :]
    return tl.arange(0, sizes.BLOCK_E)[:, None] * sizes.BLOCK_G + groups


@triton.jit
def load_columns(view, beg, offs, count):
    """Column indices of the slots `beg + offs` of a piece of `count` edges."""
    return tl.load(view.col + beg + offs, mask=offs < count, other=0)


@triton.jit
def turn_columns(j_next, view, beg, e, offs_e, count, IS_AHEAD: tl.constexpr, sizes: tl.constexpr):
    """Column indices of the turn at `e`, and of the next: a turn ahead, nothing waits for them."""
    j = j_next
    if IS_AHEAD:
        j_next = load_columns(view, beg, e + (sizes.BLOCK_E * sizes.BLOCK_G + offs_e), count)
    else:
        j = load_columns(view, beg, e + offs_e, count)
    return j, j_next


@triton.jit
def load_slots(view, beg, offs, mask_e):
    """Slots in `A` of the slots `beg + offs` of a view; its own without `view.slot`."""
    if view.slot is None:
        return beg + offs
    else:
        return tl.load(view.slot + beg + offs, mask=mask_e, other=0)


@triton.jit
def chunk_columns(chunk: tl.constexpr, width: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr):
    """Offsets and mask of a chunk of a row, [lanes, VEC]."""
    lane = tl.arange(0, BLOCK // VEC)[:, None]
    if VEC == 1:
        # Hides from Triton that lanes read side by side: it would give one of them four columns,
        # and the edges to the lanes that are left. The machine code has no trace of it.
        lane = tl.minimum(lane, 1 << 20)
    offs = chunk * BLOCK + lane * VEC + tl.arange(0, VEC)[None, :]
    return offs, offs < width


@triton.jit
def row_columns(
    kind: tl.constexpr, chunk: tl.constexpr, sizes: tl.constexpr, per: tl.constexpr = 1
):
    """Offsets and mask of a chunk of a row of a kind, in words of `per` columns.

    kind: "values", `d` columns as x has them, or "heads", as q and k do, laid out as padded heads;
    or "shared", d_k columns for each of these heads anew.
    """
    if kind == "values":
        return chunk_columns(chunk, sizes.d // per, sizes.BLOCK_D // per, sizes.VEC_D // per)
    else:
        d_k: tl.constexpr = sizes.d_k // per
        block_k: tl.constexpr = sizes.BLOCK_K // per
        c, mask = chunk_columns(chunk, sizes.H * d_k, sizes.BLOCK_A // per, sizes.VEC_A // per)
        offs = c
        if kind == "shared":
            offs = c % block_k
            mask = (c // block_k < sizes.H) & (offs < d_k)
        elif d_k != block_k:
            offs = (c // block_k) * d_k + c % block_k
            mask = (c // block_k < sizes.H) & (c % block_k < d_k)
        return offs, mask


@triton.jit
def heads_of(group: tl.constexpr, sizes: tl.constexpr):
    """The heads of one of N_H groups: [BLOCK_H]; and which there are, others are padding."""
    offs_h = group * sizes.BLOCK_H + tl.arange(0, sizes.BLOCK_H)
    return offs_h, offs_h < sizes.H


@triton.jit
def load_row(kind: tl.constexpr, row_ptr, sizes: tl.constexpr):
    """A row of a kind of `row_columns`, float32, in chunks [BLOCK_D] or [BLOCK_A]."""
    x = ()
    for c in tl.static_range(sizes.N_D if kind == "values" else sizes.N_A):
        offs, mask = row_columns(kind, c, sizes)
        x_c = tl.load(row_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        x = x + (tl.reshape(x_c, [offs.shape[0] * offs.shape[1]]),)
    return x


@triton.jit
def load_scaled(row_ptr, alpha_ptr, sizes: tl.constexpr):
    """A row of `d` columns times alpha, in chunks [BLOCK_D]."""
    x = load_row("values", row_ptr, sizes)
    alpha = load_row("values", alpha_ptr, sizes)
    y = ()
    for c in tl.static_range(sizes.N_D):
        y = y + (x[c] * alpha[c],)
    return y


@triton.jit
def load_per_head(row_ptr, other, sizes: tl.constexpr):
    """A number for each head of a row, in groups [BLOCK_H]; `other` for padded heads."""
    numbers = ()
    for g in tl.static_range(sizes.N_H):
        offs_h, mask_h = heads_of(g, sizes)
        numbers = numbers + (tl.load(row_ptr + offs_h, mask=mask_h, other=other),)
    return numbers


@triton.jit
def gather_per_head(rows, first: tl.constexpr, mask_e, other, sizes: tl.constexpr):
    """Numbers of every head from column `first` on, N_H of [BLOCK_E, BLOCK_G, BLOCK_H].

    rows: pointers [BLOCK_E, BLOCK_G, 1]. `other` for padded heads, and where there is no edge.
    """
    numbers = ()
    for g in tl.static_range(sizes.N_H):
        offs_h, mask_h = heads_of(g, sizes)
        mask = mask_e[:, :, None] & mask_h
        if first > 0:
            offs_h += first
        numbers = numbers + (tl.load(rows + offs_h, mask=mask, other=other),)
    return numbers


@triton.jit
def store_per_head(rows, numbers, mask_e, sizes: tl.constexpr):
    """Write numbers of every head, of `gather_per_head`'s shapes."""
    for g in tl.static_range(sizes.N_H):
        offs_h, mask_h = heads_of(g, sizes)
        mask = mask_e[:, :, None] & mask_h
        tl.store(rows + offs_h, numbers[g].to(rows.dtype.element_ty), mask=mask)


@triton.jit
def words_of(table_ptr, stride: tl.constexpr, width: tl.constexpr, VEC: tl.constexpr):
    """A table of bfloat16 as one of 32-bit words, where lanes read whole ones; others as they are.

    Unpacked by hand, a pair takes two instructions; by the compiler's conversions, three.
    """
    is_even: tl.constexpr = VEC % 2 == 0 and stride % 2 == 0 and width % 2 == 0
    if table_ptr.dtype.element_ty == tl.bfloat16 and is_even:
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
def gather_rows(
    kind: tl.constexpr, table_ptr, index, mask_e, stride: tl.constexpr, sizes: tl.constexpr
):
    """Rows of a table of a kind of `row_columns`, in chunks."""
    if kind == "values":
        words = words_of(table_ptr, stride, sizes.d, sizes.VEC_D)
    else:
        words = words_of(table_ptr, stride, sizes.d_k, sizes.VEC_A)
    per: tl.constexpr = 2 if words.dtype.element_ty == tl.uint32 else 1  # columns of a word
    x = ()
    for c in tl.static_range(sizes.N_D if kind == "values" else sizes.N_A):
        offs, mask = row_columns(kind, c, sizes, per)
        x = x + (gather(words, index, mask_e, offs, mask, stride // per),)
    return x


@triton.jit
def add_edge_rows(far, own, table_ptr, slot, mask_e, view, sizes: tl.constexpr):
    """Rows at the far ends of edges and the own, with those of a table of edges, if there is one.

    It belongs to senders, which are the far ends in the view of `A` itself, without `view.slot`.
    """
    if table_ptr is not None:
        rows = gather_rows("heads", table_ptr, slot, mask_e, sizes.H * sizes.d_k, sizes)
        if view.slot is None:
            far = added(far, rows)
        else:
            own = added(own, rows)
    return far, own


@triton.jit
def added(x, y):
    """Sums of chunks."""
    z = ()
    for c in tl.static_range(len(y)):
        z = z + (x[c] + y[c],)
    return z


@triton.jit
def store_edge_rows(table_ptr, p, far, own, factor, slot, mask_e, view, sizes: tl.constexpr):
    """Write factor · p x of edges, x the row of the receiver, p as in `add_weighted`."""
    chunks: tl.constexpr = sizes.N_A // sizes.N_H
    for c in tl.static_range(sizes.N_A):
        offs, mask = row_columns("heads", c, sizes)
        if view.slot is None:
            x = own[c][None, None, :]
        else:
            x = far[c]
        x = tl.reshape(x, [x.shape[0], x.shape[1], sizes.BLOCK_H, sizes.BLOCK_A // sizes.BLOCK_H])
        px = (factor * p[c // chunks])[:, :, :, None] * x
        px = tl.reshape(px, [px.shape[0], px.shape[1], offs.shape[0], offs.shape[1]])
        at = table_ptr + slot[:, :, None, None].to(tl.int64) * (sizes.H * sizes.d_k) + offs
        tl.store(at, px.to(table_ptr.dtype.element_ty), mask=mask_e[:, :, None, None] & mask)


@triton.jit
def store_row(kind: tl.constexpr, row_ptr, x, sizes: tl.constexpr):
    """Write a row of a kind of `row_columns`, given in chunks."""
    for c in tl.static_range(len(x)):
        offs, mask = row_columns(kind, c, sizes)
        x_c = tl.reshape(x[c], offs.shape).to(row_ptr.dtype.element_ty)
        tl.store(row_ptr + offs, x_c, mask=mask)


@triton.jit
def store_piece(
    kind: tl.constexpr, table_ptr, part_ptr, x, row, pid_p, n_split, sizes: tl.constexpr
):  # fmt: skip
    """Write a row of a table whose rows are of a kind, or what is known of it from a piece."""
    width: tl.constexpr = sizes.d if kind == "values" else sizes.H * sizes.d_k
    if pid_p < n_split:
        store_row(kind, part_ptr + pid_p * width, x, sizes)
    else:
        store_row(kind, table_ptr + row * width, x, sizes)
