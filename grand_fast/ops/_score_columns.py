"""What a score makes of q and k, and its backward: on the CPU the cosine's by a kernel.

The others' come with few rows at a time there: a parallel region of torch leaves its threads
spinning on the cores that the kernels need next.
"""

from collections.abc import Iterator

from torch import Tensor

from grand_fast.ops.backends import unit_rows
from grand_fast.ops.checks import inner_contiguous
from grand_fast.ops.scores import EPS, AbstractScore, Cosine, Pair, ScaledDot, ScoreGradients

SERIAL = (1 << 15) - 1  # elements: up to so many, torch stays on the calling thread


def prepared(score: AbstractScore, q: Tensor, k: Tensor, backend: str) -> Pair:
    """What `score.prepare` makes of q and k, `[N, H, d]` each, with contiguous rows."""
    if backend == "cpu" and score.name == Cosine.name:
        qk = side_by_side(q, k)
        if qk is not None:
            n, h, d_k = q.shape
            made_qk = unit_rows().unit_rows_fwd(qk.view(n, 2 * h, d_k), eps=EPS)
            q, k = made_qk.view(n, 2, h, d_k).unbind(1)
        else:
            q, k = (unit_rows().unit_rows_fwd(inner_contiguous(t), eps=EPS) for t in (q, k))
        return q, k
    made: Pair | None = None
    for rows in _blocks(score, q, backend):
        part = score.prepare(q[rows], k[rows])
        if part[0].shape[0] == q.shape[0]:
            return inner_contiguous(part[0]), inner_contiguous(part[1])
        if made is None:
            q_made, k_made = (t.new_empty(q.shape[0], *t.shape[1:]) for t in part)
            made = q_made, k_made
        for whole, t in zip(made, part, strict=True):
            whole[rows] = t
    assert made is not None
    return made


def score_gradients(
    score: AbstractScore, given: Pair, made: Pair, of_made: Pair, backend: str
) -> ScoreGradients:
    """`score.gradients`; dq and dk may take the place of `of_made`."""
    if backend == "cpu" and score.name == Cosine.name:
        joined = [side_by_side(*pair) for pair in (given, made, of_made)]
        tables = [t for t in joined if t is not None]
        if len(tables) == len(joined):
            n, h, d_k = given[0].shape
            v, unit, grad = (t.view(n, 2 * h, d_k) for t in tables)
            unit_rows().unit_rows_bwd(grad, v, unit, eps=EPS)
            return *of_made, None, None
        for v, unit, grad in zip(given, made, of_made, strict=True):
            unit_rows().unit_rows_bwd(grad, inner_contiguous(v), unit, eps=EPS)
        return *of_made, None, None
    q, k = given
    found: Pair | None = None
    dsigma = dlengthscale = None
    for rows in _blocks(score, q, backend):
        in_rows = [(a[rows], b[rows]) for a, b in (given, made, of_made)]
        dq, dk, *of_parameters = score.gradients(*in_rows)
        dsigma, dlengthscale = map(_sum, (dsigma, dlengthscale), of_parameters)
        if dq.shape[0] == q.shape[0]:
            return dq, dk, dsigma, dlengthscale
        if found is None:
            is_in_place = of_made[0].shape == q.shape and of_made[0].dtype == q.dtype
            found = of_made if is_in_place else (q.new_empty(q.shape), k.new_empty(k.shape))
        for whole, t in zip(found, (dq, dk), strict=True):
            if whole[rows].data_ptr() != t.data_ptr():
                whole[rows] = t
    assert found is not None
    return *found, dsigma, dlengthscale


def side_by_side(a: Tensor, b: Tensor) -> Tensor | None:
    """`[N, 2m]` of two tensors `[N, H, d]`, m = H·d, where in memory b's rows follow a's."""
    (n, h, d), size = a.shape, a.element_size()
    rows = 2 * h * d
    if n == 0 or b.shape != a.shape or not a.stride() == b.stride() == (rows, d, 1):
        return None
    if a.dtype != b.dtype or b.data_ptr() - a.data_ptr() != h * d * size:
        return None
    return a.as_strided((n, rows), (rows, 1))


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else b if a is None else a + b


def _blocks(score: AbstractScore, q: Tensor, backend: str) -> Iterator[slice]:
    """Rows to take at a time: all of them where that needs no threads of torch."""
    n, h, d_k = q.shape
    per_row = h * (d_k + score.more_columns)
    if backend != "cpu" or n * per_row <= SERIAL or isinstance(score, ScaledDot):
        yield slice(None)
        return
    step = max(1, SERIAL // per_row)
    for first in range(0, n, step):
        yield slice(first, min(first + step, n))
