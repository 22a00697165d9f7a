"""A number by which arrays of ids are known again, without a copy of them."""

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_COLUMNS = 1 << 12  # random numbers that a pass over the ids reads again and again: 32 KiB


def fingerprint(*arrays: Tensor) -> Tensor:
    """Of tensors of ids `[…]`, at least one, a scalar int64 on their device; a pass over each.

    The sum modulo 2⁶⁴ of every id times a random odd number that belongs to its place, so that the
    order counts. One id that changes always changes it; several, or two that change places, all
    but once in 2³² times while ids are below 2³¹. How many ids there are it does not tell.
    """
    parts = []
    for number, array in enumerate(arrays):
        flat = array.reshape(1, -1).long()
        whole = flat.shape[1] - flat.shape[1] % _COLUMNS
        parts.append(_product(flat[:, whole:], seed=2 * number + 1))
        if whole:
            rows = _product(flat[0, :whole].view(-1, _COLUMNS), seed=0)
            parts.append(_product(rows[None], seed=2 * number + 2))
    return torch.stack(parts).sum()


def _product(table: Tensor, *, seed: int) -> Tensor:
    """The products of the rows with random odd numbers."""
    vector = torch.from_numpy(_odd(table.shape[1], seed)).to(table.device)
    if table.device.type == "cpu":
        return table.mv(vector)
    return (table * vector).sum(1)  # elsewhere torch multiplies no matrix of integers


@lru_cache(maxsize=64)
def _odd(n: int, seed: int) -> NDArray[np.int64]:
    # No tensor: one made while a program is traced would be of no use to the next call
    numbers: NDArray[np.int64] = np.random.default_rng(seed).integers(-(1 << 62), 1 << 62, n)
    return 2 * numbers + 1
