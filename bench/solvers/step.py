"""The solvers' own part of a step: f is replaced by a copy of the state."""

import argparse
from collections.abc import Callable, Sequence

import torch
import torchdiffeq
from torch import Tensor

import grand_fast as gf
from bench.core import fresh, machine
from bench.core.harness import interleave
from bench.core.problem import OURS, Problem
from bench.core.report import Report, Row, milliseconds, print_table
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
    if competitor == OURS:
        return _ours(method, x, f)
    return _torchdiffeq(method, x, f) if competitor == TORCHDIFFEQ else _torchode(method, x, f)


def _ours(method: str, x: Tensor, f: Callable[..., Tensor]) -> Tensor:
    if method == "rk4":
        return gf.integrate(f, x, 1.0, method="rk4", step_size=STEP).x
    return gf.integrate(
        f, x, 1.0, method="dopri5", rtol=TOLERANCE, atol=TOLERANCE, first_step=FIRST_STEP,
        end="interp",
    ).x  # fmt: skip


def _torchdiffeq(method: str, x: Tensor, f: Callable[..., Tensor]) -> Tensor:
    options = {"step_size": STEP} if method == "rk4" else {"first_step": FIRST_STEP}
    states: Sequence[Tensor] = torchdiffeq.odeint(
        f, x, torch.tensor([0.0, 1.0]), method=method, rtol=TOLERANCE, atol=TOLERANCE,
        options=options,
    )  # fmt: skip
    return states[-1]


def _torchode(method: str, x: Tensor, f: Callable[..., Tensor]) -> Tensor:
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
        if method == "dopri5":
            rivals += _installed(report)
        counts = _checked(method, [OURS, *rivals], x, report)
        rounds = options.rounds or (3 if options.quick else 9)
        rows = _time(method, counts, x, rounds, report)
        report.done()
        _weigh(rows, x, report)
        report.done()
        _figures(method, rows, report)
        report.rows += rows
        _print(method, rows, x)


def _installed(report: Report) -> list[str]:
    try:
        import torchode  # noqa: F401
    except ImportError:
        report.skipped.append("torchode: not installed (pip install torchode).")
        return []
    return [TORCHODE]


def _checked(method: str, names: list[str], x: Tensor, report: Report) -> dict[str, int]:
    """Attempts of each that gives torchdiffeq's answer."""
    counts, want = {}, None
    with torch.no_grad():
        for name in reversed(names):  # torchdiffeq before ours
            report.say(f"{method}, f a copy: {name}, check")
            f = Copies()
            got = solve(name, method, x, f)
            want = got if name == TORCHDIFFEQ else want
            try:
                # torchode's steps are its own: both are within the tolerance of the exact answer.
                exact = x.double().mul_(torch.e) if want is None else want
                assert_close(name, got, exact, tolerance=1e-3 if want is None else None)
                counts[name] = attempts(method, f.calls)
            except AssertionError as difference:
                report.failed.append(f"{method}, f a copy: {difference}")
    return {name: counts[name] for name in names if name in counts}


def _time(method: str, counts: dict[str, int], x: Tensor, rounds: int, report: Report) -> list[Row]:
    evaluations = 4 * STEPS

    def call(name: str) -> Callable[[], object]:
        return torch.no_grad()(lambda: solve(name, method, x, Copies()))

    def copies() -> None:
        for _ in range(evaluations):
            x.clone()

    calls = {name: call(name) for name in counts} | {COPY: copies}
    timings = interleave(calls, rounds=rounds, tick=lambda n: report.say(f"{method}, {n}"))
    copy_s = timings[COPY].median / evaluations
    rows = []
    for name, count in counts.items():
        record = timings[name].record()
        per_step = {key: value / count for key, value in record.items() if key != "rounds"}
        rows.append(
            {
                "op": "step",
                "method": method,
                "competitor": name,
                "attempts": count,
                "elements": x.numel(),
                "rounds": record["rounds"],
                **per_step,
                "copies_s": copy_s * (4 if method == "rk4" else 6),
            }
        )
    return rows


def _weigh(rows: list[Row], x: Tensor, report: Report) -> None:
    """Peak above the state of the solve without a graph, and of forward+backward a step."""
    for row in rows:
        for key, differentiated in (("peak_bytes", False), ("differentiated_peak_bytes", True)):
            report.say(f"{row['method']}, {row['competitor']}, memory")
            name = f"memory of {row['competitor']}, {row['method']}, f a copy"
            try:
                if differentiated and row["competitor"] == TORCHODE:
                    needed = 4 * x.numel() * TORCHODE_STATES * row["attempts"]
                    machine.require_memory(name, needed)
                row[key] = fresh.run(
                    peak_memory, solver=row["competitor"], method=row["method"],
                    size=tuple(x.shape), differentiated=differentiated,
                )["bytes"]  # fmt: skip
            except (RuntimeError, machine.DoesNotFitError) as reason:
                report.skipped.append(f"{name}: {reason}")


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
    ours = next((row for row in rows if row["competitor"] == OURS), None)
    what = "RK4 step" if method == "rk4" else "DOPRI5 attempt"
    for row in rows:
        if ours is None or row is ours:
            continue
        name = f"own part of a {what}"
        pair = f"ours over {row['competitor']}"
        report.figure(f"{name}, time: {pair}", ours["median_s"] / row["median_s"], "×")
        if "peak_bytes" in row and "peak_bytes" in ours:
            peaks = ours["peak_bytes"] / row["peak_bytes"]
            report.figure(f"{name}, peak memory above the state: {pair}", peaks, "×")


def _print(method: str, rows: list[Row], x: Tensor) -> None:
    state = 4 * x.numel()
    cells = [
        [
            row["competitor"],
            str(row["attempts"]),
            milliseconds(row),
            f"{row['copies_s'] * 1e3:.1f}",
            f"{row['peak_bytes'] / state:.1f}" if "peak_bytes" in row else "",
            f"{row['differentiated_peak_bytes'] / state / row['attempts']:.1f}"
            if "differentiated_peak_bytes" in row
            else "",
        ]
        for row in rows
    ]
    head = ["", "steps tried", "ms a step", "of it, the copies' own", "peak, states",
            "forward+backward, states a step"]  # fmt: skip
    print_table(f"{method}, f a copy of the state {list(x.shape)}", head, cells)
