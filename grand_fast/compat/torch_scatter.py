"""The parts of `torch_scatter` that graph diffusion code uses, by torch's own operators.

Signatures are those of torch_scatter. `index` has one dimension, or the shape of `src`.
"""

import torch
from torch import Tensor

__version__ = "0.0+grand_fast"


def _spread(index: Tensor, src: Tensor, dim: int) -> Tensor:
    """`index` in the shape of `src`."""
    dim = dim % src.dim()
    if index.dim() == 1:
        index = index.view([-1 if d == dim else 1 for d in range(src.dim())])
    while index.dim() < src.dim():
        index = index.unsqueeze(-1)
    return index.expand_as(src)


def _target(
    index: Tensor, src: Tensor, dim: int, out: Tensor | None, dim_size: int | None
) -> Tensor:
    if out is not None:
        return out
    size = list(src.shape)
    given = dim_size is not None
    size[dim] = dim_size if given else int(index.max()) + 1 if index.numel() else 0  # type: ignore
    return src.new_zeros(size)


def scatter_sum(
    src: Tensor, index: Tensor, dim: int = -1, out: Tensor | None = None,
    dim_size: int | None = None,
) -> Tensor:  # fmt: skip
    """Sums of the entries with the same index; 0 where there are none."""
    index = _spread(index, src, dim)
    target = _target(index, src, dim, out, dim_size)
    return target.scatter_add_(dim, index, src)


scatter_add = scatter_sum


def scatter_mul(
    src: Tensor, index: Tensor, dim: int = -1, out: Tensor | None = None,
    dim_size: int | None = None,
) -> Tensor:  # fmt: skip
    """Products; 1 where there are none."""
    index = _spread(index, src, dim)
    target = _target(index, src, dim, out, dim_size)
    if out is None:
        target = target + 1
    return target.scatter_reduce_(dim, index, src, "prod")


def scatter_mean(
    src: Tensor, index: Tensor, dim: int = -1, out: Tensor | None = None,
    dim_size: int | None = None,
) -> Tensor:  # fmt: skip
    """Means; 0 where there are none."""
    total = scatter_sum(src, index, dim, out, dim_size)
    ones = torch.ones_like(src)
    count = scatter_sum(ones, index, dim, None, total.shape[dim]).clamp_(min=1)
    return total.div_(count, rounding_mode=None if total.is_floating_point() else "floor")


def _extreme(
    src: Tensor, index: Tensor, dim: int, out: Tensor | None, dim_size: int | None, reduce: str
) -> tuple[Tensor, Tensor]:
    """The extreme entries, and where in `src` the first of each is; its length where none is."""
    index = _spread(index, src, dim)
    target = _target(index, src, dim, out, dim_size)
    found = target.scatter_reduce(dim, index, src, reduce, include_self=out is not None)
    with torch.no_grad():
        n = src.shape[dim]
        shape = [-1 if d == dim % src.dim() else 1 for d in range(src.dim())]
        place = torch.arange(n, device=src.device).view(shape).expand_as(src)
        is_it = src == found.gather(dim, index)
        arg = torch.full_like(found, n, dtype=torch.int64)
        arg = arg.scatter_reduce(dim, index, torch.where(is_it, place, n), "amin")
    if out is None and src.requires_grad:
        # The gradient goes to that entry alone, not to all that are equal
        none = src.new_zeros(()).expand_as(src.narrow(dim, 0, min(n, 1)))
        found = torch.cat([src, none], dim).gather(dim, arg)
    return found if out is None else out.copy_(found), arg


def scatter_max(
    src: Tensor, index: Tensor, dim: int = -1, out: Tensor | None = None,
    dim_size: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Largest entries and where they are; 0 and the number of entries where there are none."""
    return _extreme(src, index, dim, out, dim_size, "amax")


def scatter_min(
    src: Tensor, index: Tensor, dim: int = -1, out: Tensor | None = None,
    dim_size: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Smallest entries and where they are; 0 and the number of entries where there are none."""
    return _extreme(src, index, dim, out, dim_size, "amin")


def scatter(
    src: Tensor,
    index: Tensor,
    dim: int = -1,
    out: Tensor | None = None,
    dim_size: int | None = None,
    reduce: str = "sum",
) -> Tensor:
    """By the name of what is done to entries with the same index."""
    if reduce in ("max", "min"):
        return (scatter_max if reduce == "max" else scatter_min)(src, index, dim, out, dim_size)[0]
    by_name = {"sum": scatter_sum, "add": scatter_sum, "mean": scatter_mean, "mul": scatter_mul}
    if reduce not in by_name:
        raise ValueError(f"scatter: `reduce` must be sum, mean, mul, max or min, got {reduce!r}.")
    return by_name[reduce](src, index, dim, out, dim_size)


def scatter_softmax(
    src: Tensor, index: Tensor, dim: int = -1, dim_size: int | None = None
) -> Tensor:
    """The softmax within the entries with the same index."""
    index = _spread(index, src, dim)
    largest = scatter_max(src.detach(), index, dim, None, dim_size)[0]
    p = (src - largest.gather(dim, index)).exp()
    return p / scatter_sum(p, index, dim, None, dim_size).gather(dim, index)


def gather_csr(src: Tensor, indptr: Tensor) -> Tensor:
    """Each row of `src` as often as its part of `indptr` is long."""
    return src.repeat_interleave(indptr.diff(), dim=indptr.dim() - 1)


def segment_csr(
    src: Tensor, indptr: Tensor, out: Tensor | None = None, reduce: str = "sum"
) -> Tensor:
    """`scatter` of rows that are in order, whose parts begin at `indptr` `[parts + 1]`."""
    if indptr.dim() != 1:
        raise NotImplementedError("segment_csr: grand_fast's stand-in takes one `indptr` for all.")
    parts = indptr.numel() - 1
    index = torch.arange(parts, device=src.device).repeat_interleave(indptr.diff())
    return scatter(src[: int(indptr[-1])], index, 0, out, parts, reduce)
