"""The solvers' own part of a step: f is replaced by a copy of the state."""

import argparse
import importlib.util
from collections.abc import Callable
from itertools import product

import torch
import torchdiffeq
from torch import Tensor

import grand_fast as gf
from bench.core import fresh, machine
from bench.core.harness import Timing, interleave
from bench.core.problem import OURS, Problem
from bench.core.report import Report
from bench.core.tables import Column, Row, cell, milliseconds, ours_beside, print_rows, ratio
from grand_fast.testing import assert_close

TORCHDIFFEQ, TORCHODE = "torchdiffeq", "torchode"
STEPS = 4
STEP = 0.25
# x' = x over [0, 1], in six attempts
FIRST_STEP, TOLERANCE = 0.9, 1e-6
METHODS = ("rk4", "dopri5")
COPY = "the copies alone"
# That forward+backward of one of its attempts takes, as measured on 20,000 nodes
TORCHODE_STATES = 31
# What is weighed, and whether forward and backward
PEAKS = {"peak_bytes": False, "differentiated_peak_bytes": True}


def attempts(method: str, evaluations: int) -> int:
    """Steps tried: RK4 evaluates four times in each, DOPRI5 six times and once at the start."""
    return evaluations // 4 if method == "rk4" else (evaluations - 1) // 6


class Copies:
    """f(t, x) = x, copied; counts."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, t: object, x: Tensor) -> Tensor:
        """A new tensor each time."""
        self.calls += 1
        return x.clone()


def solve(competitor: str, method: str, x: Tensor, f: Callable[..., Tensor]) -> Tensor:
    """x(1), at the same steps whoever solves."""
    if competitor == TORCHODE:
        return _torchode(x, f)
    tolerances = {"rtol": TOLERANCE, "atol": TOLERANCE}
    steps = {"step_size": STEP} if method == "rk4" else {"first_step": FIRST_STEP}
    if competitor == OURS:
        adaptive = {} if method == "rk4" else tolerances | {"end": "interp"}
        return gf.integrate(f, x, 1.0, method=method, **steps, **adaptive).x
    times = torch.tensor([0.0, 1.0])
    states: Tensor = torchdiffeq.odeint(f, x, times, method=method, options=steps, **tolerances)
    return states[-1]


def _torchode(x: Tensor, f: Callable[..., Tensor]) -> Tensor:
    """DOPRI5 with its own controller, the whole state as one sample."""
    import torchode

    flat = x.view(1, -1)
    term = torchode.ODETerm(f)  # type: ignore[attr-defined]
    control = torchode.IntegralController(TOLERANCE, TOLERANCE, term=term)
    solver = torchode.AutoDiffAdjoint(torchode.Dopri5(term=term), control)
    problem = torchode.InitialValueProblem(flat, t_start=torch.zeros(1), t_end=torch.ones(1))
    found = solver.solve(problem, dt0=torch.tensor([FIRST_STEP]))
    last: Tensor = found.ys[:, -1].view_as(x)
    return last


def run(problem: Problem, options: argparse.Namespace, report: Report) -> None:
    """Time and memory per step, for RK4 and DOPRI5."""
    x = problem.inputs["x"]
    for method in METHODS:
        rivals = [TORCHDIFFEQ]
        if method == "dopri5" and importlib.util.find_spec("torchode"):
            rivals.append(TORCHODE)
        elif method == "dopri5":
            report.skipped.append("torchode: not installed (pip install torchode).")
        counts = _checked(method, [OURS, *rivals], x, report)
        rounds = options.rounds or (3 if options.quick else 9)
        rows = _time(method, counts, x, rounds, report)
        report.done()
        _weigh(rows, x, report)
        report.done()
        _figures(method, rows, report)
        report.rows += rows
        _print(method, rows, x)


def _checked(method: str, names: list[str], x: Tensor, report: Report) -> dict[str, int]:
    """Attempts of each that gives torchdiffeq's answer."""
    counts = {}
    with torch.no_grad():
        want = solve(TORCHDIFFEQ, method, x, Copies())
        for name in names:
            report.say(f"{method}, f a copy: {name}, check")
            f = Copies()
            got = solve(name, method, x, f)
            try:
                if name == TORCHODE:  # its steps are its own: it is compared with the exact answer
                    assert_close(name, got, x.double().mul_(torch.e), tolerance=1e-3)
                else:
                    assert_close(name, got, want)
                counts[name] = attempts(method, f.calls)
            except AssertionError as difference:
                report.failed.append(f"{method}, f a copy: {difference}")
    return counts


def _time(method: str, counts: dict[str, int], x: Tensor, rounds: int, report: Report) -> list[Row]:
    evaluations = 4 * STEPS

    def copies() -> None:
        for _ in range(evaluations):
            x.clone()

    calls: dict[str, Callable[[], object]] = {
        name: torch.no_grad()(lambda name=name: solve(name, method, x, Copies())) for name in counts
    }
    calls[COPY] = copies
    timings = interleave(calls, rounds=rounds, tick=lambda n: report.say(f"{method}, {n}"))
    copies_s = timings[COPY].median / evaluations * (4 if method == "rk4" else 6)
    rows = []
    for name, count in counts.items():
        per_step = Timing(tuple(seconds / count for seconds in timings[name].seconds))
        row = {"op": "step", "method": method, "competitor": name, "attempts": count,
               "elements": x.numel(), "copies_s": copies_s}  # fmt: skip
        rows.append(row | per_step.record())
    return rows


def _weigh(rows: list[Row], x: Tensor, report: Report) -> None:
    """Peak above the state of the solve without a graph, and of forward+backward a step."""
    for row, (key, differentiated) in product(rows, PEAKS.items()):
        name = f"{row['competitor']}, {row['method']}, f a copy"
        try:
            if differentiated and row["competitor"] == TORCHODE:
                needed = 4 * x.numel() * TORCHODE_STATES * row["attempts"]
                machine.require_memory(f"memory of {name}", needed)
        except machine.DoesNotFitError as reason:
            report.skipped.append(str(reason))
            continue
        peaks = fresh.peaks(
            report, name, peak_memory, solver=row["competitor"], method=row["method"],
            size=tuple(x.shape), differentiated=differentiated,
        )  # fmt: skip
        for peak in peaks:
            row[key] = peak["bytes"]


def peak_memory(
    solver: str, method: str, size: tuple[int, int], differentiated: bool
) -> dict[str, float]:
    """Bytes above the state at the peak of a solve; in a fresh process."""

    def call(x: Tensor) -> None:
        with torch.set_grad_enabled(differentiated):
            y = solve(solver, method, x, Copies())
        if differentiated:
            torch.autograd.grad(y, x, torch.ones_like(y))

    call(torch.randn(size[0], 1, requires_grad=differentiated))
    x = torch.randn(size, requires_grad=differentiated)
    return fresh.peak(lambda: call(x))


def _figures(method: str, rows: list[Row], report: Report) -> None:
    name = f"own part of a {'RK4 step' if method == 'rk4' else 'DOPRI5 attempt'}"
    for row in rows:
        ours, pair = ours_beside(row, rows), f"ours over {row['competitor']}"
        for key, text in (("median_s", "time"), ("peak_bytes", "peak memory above the state")):
            if ours:
                report.figure(f"{name}, {text}: {pair}", ratio(ours, row, key), "×")


def _print(method: str, rows: list[Row], x: Tensor) -> None:
    states = 1 / (4 * x.numel())

    def both(row: Row) -> str:
        return cell("differentiated_peak_bytes", "{:.1f}", states / row["attempts"])(row)

    columns: list[Column] = [
        ("", cell("competitor")),
        ("steps tried", cell("attempts")),
        ("ms a step", milliseconds),
        ("of it, the copies' own", cell("copies_s", "{:.1f}", 1e3)),
        ("peak, states", cell("peak_bytes", "{:.1f}", states)),
        ("forward+backward, states a step", both),
    ]
    print_rows(f"{method}, f a copy of the state {list(x.shape)}", rows, columns)
