"""A program against itself on our kernels: what it computes, then its time, in this process."""

import math
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from bench.compat.program import WHAT, Program, Run, run
from bench.core import machine

# How much further than another order of sums in the program itself: that is one sample of rounding.
ORDERS = 4.0
# Of the norm of all gradients: what a smaller one is off by is rounding.
SMALLEST = 1e-6


def measure(
    program: Program, *, keep: bool, threads: int | None, rounds: int, tolerance: float
) -> dict[str, Any]:
    """Check, then time; of a fresh process.

    Args:
        program: what.
        keep: whether the C library is to keep freed memory.
        threads: of torch; None: its own choice.
        rounds: runs of each kind, in turns, after those of the check.
        tolerance: of the relative differences.

    Returns:
        `errors`, why there is nothing to compare; or `failed`, what disagrees; `differences`, for
        each item of `WHAT` the worst of ours, that of another order of sums, and what is allowed;
        the `report` of the patch; `evaluations` of an epoch; and, if nothing failed, for
        both kinds the seconds of the epochs in each round.
    """
    if keep and not machine.keep_memory():
        return {"errors": "the C library cannot be told to keep memory; try --allocator system"}
    if threads:
        torch.set_num_threads(threads)
    stock = run(program, "stock")
    steps = len(stock.values["loss"])
    if stock.code or steps < 2:
        made = f"{steps} steps of an optimiser were made, of two that are needed"
        return {"errors": f"{stock.errors}exit code {stock.code}, {made}"}
    patched, other = run(program, "patched"), run(program, "reordered")
    ours, orders = differences(stock, patched), differences(stock, other)
    table = {key: _worst(ours[key], orders[key], tolerance) for key in WHAT}
    failed = [
        f"{WHAT[key]}: differs by {row['ours']:.1e}, more than {row['allowed']:.1e}"
        for key, row in table.items()
        if not row["ours"] <= row["allowed"]
    ]
    if patched.code:
        failed = [f"exit code {patched.code}: {patched.errors.strip()}"]
    found = {"failed": failed, "differences": table, "report": patched.report,
             "evaluations": int(stock.values["evaluations"][-1])}  # fmt: skip
    if not failed:
        found |= {"stock": [], "patched": []}
        for _ in range(rounds):
            for mode in ("stock", "patched"):
                seconds = run(program, mode).seconds
                found[mode].append({key: values[1:] for key, values in seconds.items()})
    return found


def differences(stock: Run, other: Run) -> dict[str, list[float]]:
    """The relative differences of each item of `WHAT`; infinite where one of the two has none."""
    least = SMALLEST * float(stock.values["norm"][0])
    return {
        key: [_relative(*pair, least if key == "gradient" else 0.0)
              for pair in zip_longest(stock.values[key], other.values[key])]
        for key in WHAT
    }  # fmt: skip


def _relative(want: Tensor | None, got: Tensor | None, least: float) -> float:
    if want is None or got is None:
        return 0.0 if want is got else math.inf
    difference, scale = (got - want).norm(), want.norm().clamp_min(least)
    ratio = torch.where(difference == 0, difference, difference / scale)
    return float(ratio.nan_to_num(math.inf, math.inf))


def _worst(ours: list[float], orders: list[float], tolerance: float) -> dict[str, float]:
    """The difference of ours that is most of what is allowed, beside both."""
    rows = [
        {"ours": value, "orders": order, "allowed": max(tolerance, ORDERS * order)}
        for value, order in zip_longest(ours, orders, fillvalue=0.0)
    ]
    return max(rows, key=lambda row: row["ours"] / row["allowed"])
