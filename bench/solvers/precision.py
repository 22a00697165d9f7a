"""Work and precision: error of each method against evaluations of f and against seconds."""

import argparse
from collections.abc import Callable

import torch
import torchdiffeq
from torch import Tensor

import grand_fast as gf
from bench.core.configurations import BY_DATASET, load_graph
from bench.core.harness import interleave
from bench.core.problem import Problem
from bench.core.report import Report
from bench.core.tables import Column, Row, cell, print_rows
from bench.solvers.problem import nonlinear_term, setup
from grand_fast.solvers import AbstractTerm, Stats, Uniformisation
from grand_fast.solvers.methods.table import ADAPTIVE

T = 4.0
VARIANTS = ("GRAND-l", "GRAND-nl")
# Evaluations that the methods with fixed steps may take, and how many they take a step
BUDGETS = (8, 16, 32, 64)
STAGES = {"euler": 1, "midpoint": 2, "rk4": 4, "rk4_classic": 4, "explicit_adams": 1,
          "implicit_adams": 2}  # fmt: skip
IMPLICIT_STEPS = (2, 4, 8)  # of semi_implicit_euler
TOLERANCES = (1e-2, 1e-3, 1e-4, 1e-5)
LARGE = 50_000  # nodes, from which the tightest tolerance is left out, and fewer rounds are taken
POWERS = (1e-2, 1e-4, 1e-6)  # what uniformisation may leave out
PEER = "torchdiffeq "
EXACT = 1e-9  # tolerance of the reference
NEAR = 1e-2  # error that a method may end with, where more work did not lessen it
CONFIRMED = 1e-6  # relative difference that a second method may have from it


_Point = tuple[str, str, Callable[[], tuple[Tensor, Stats]]]  # method, setting, how to solve

COLUMNS: list[Column] = [
    ("", cell("method")),
    ("setting", cell("setting")),
    ("NFE", cell("nfe")),
    ("error", cell("error", "{:.1e}")),
    ("ms", cell("median_s", "{:.1f}", 1e3)),
]


def run(problem: Problem, options: argparse.Namespace, report: Report) -> None:
    """Both variants on both graphs."""
    on = {options.graph: problem}
    try:
        on = {"Cora": setup(load_graph(BY_DATASET["Cora"]), problem.shape)} | on
    except ValueError as missing:
        report.skipped.append(f"work–precision on Cora: {missing}")
    for name, each in on.items():
        rounds = options.rounds or (1 if each.graph.num_nodes >= LARGE else 3)
        for variant in VARIANTS:
            with torch.no_grad():
                _measure(name, variant, each, rounds, report, quick=options.quick)
            if options.json:
                report.write(options.json)
            report.done()


def _measure(
    graph: str, variant: str, problem: Problem, rounds: int, report: Report, *, quick: bool
) -> None:
    report.say(f"{variant} on {graph}: reference in float64")
    wide = problem.double()
    exact = _reference(variant, wide, report)
    x, term = problem.inputs["x"], _term(variant, problem)
    common = {"op": "precision", "graph": graph, "variant": variant}
    rows: dict[str, Row] = {}
    calls: dict[str, Callable[[], object]] = {}
    for method, setting, solve in _points(variant, term, x, quick=quick):
        key = f"{method}, {setting}"
        report.say(f"{variant} on {graph}: {key}, error")
        x_end, stats = solve()
        rows[key] = common | {"method": method, "setting": setting, "nfe": stats.nfe,
                              "error": _distance(x_end, exact)}  # fmt: skip
        calls[key] = solve
    every = list(rows.values())
    calls = {key: solve for key, solve in calls.items() if _converges(rows[key], every, report)}
    timings = interleave(calls, rounds=rounds, tick=lambda n: report.say(f"{graph}: {n}"))
    timed = [rows[key] | timing.record() for key, timing in timings.items()]
    report.rows += timed
    print_rows(f"{variant} on {graph}, T = {T:g}, relative error of x(T)", timed, COLUMNS)


def _term(variant: str, problem: Problem) -> AbstractTerm:
    term = nonlinear_term(problem)
    return term.freeze(0.0, problem.inputs["x"]) if variant == VARIANTS[0] else term


def _reference(variant: str, wide: Problem, report: Report) -> Tensor:
    """DOPRI5 in float64, confirmed by uniformisation where f is linear, else by many RK4 steps."""
    x, term = wide.inputs["x"], _term(variant, wide)
    exact = gf.integrate(term, x, T, method="dopri5", rtol=EXACT, atol=EXACT).check().x
    if variant == VARIANTS[0]:
        second = gf.integrate(term, x, T, method=Uniformisation(), step_size=T).x
    else:
        second = gf.integrate(term, x, T, method="rk4", step_size=T / 64).x
    if _distance(second, exact) > CONFIRMED:
        report.failed.append(f"{variant}: the float64 reference, by {_distance(second, exact):.1g}")
    return exact


def _distance(x: Tensor, exact: Tensor) -> float:
    return float((x.double() - exact).norm() / exact.norm())


def _points(variant: str, term: AbstractTerm, x: Tensor, *, quick: bool) -> list[_Point]:
    points: list[_Point] = []

    def ours(name: str, setting: str, **options: object) -> None:
        def solve() -> tuple[Tensor, Stats]:
            given = {"method": name, **options}
            solution = gf.integrate(term, x, T, **given).check()  # type: ignore[arg-type]
            return solution.x, solution.stats

        points.append((name, setting, solve))

    def peer(method: str, setting: str, **options: object) -> None:
        def solve() -> tuple[Tensor, Stats]:
            calls = 0

            def f(t: Tensor, y: Tensor) -> Tensor:
                nonlocal calls
                calls += 1
                return term(float(t), y)

            times = torch.tensor([0.0, T])
            states: Tensor = torchdiffeq.odeint(f, x, times, method=method, **options)
            return states[-1], Stats(calls, 0, 0)

        points.append((f"{PEER}{method}", setting, solve))

    for name, stages in STAGES.items():
        for budget in BUDGETS[:2] if quick else BUDGETS:
            tau = T * stages / budget
            ours(name, f"tau {tau:g}", step_size=tau)
            if name == "rk4":
                peer(name, f"tau {tau:g}", options={"step_size": tau})
    for name in ADAPTIVE:
        for tol in TOLERANCES[:2] if quick else TOLERANCES[: 3 if len(x) >= LARGE else None]:
            ours(name, f"tolerance {tol:g}", rtol=tol, atol=tol)
            if name == "dopri5":
                peer(name, f"tolerance {tol:g}", rtol=tol, atol=tol)
    for steps in IMPLICIT_STEPS[:2] if quick else IMPLICIT_STEPS:
        ours("semi_implicit_euler", f"tau {T / steps:g}", step_size=T / steps)
    if variant == VARIANTS[0]:
        for tol in POWERS:
            method = Uniformisation(tol)
            ours("uniformisation", f"tail {tol:g}", method=method, step_size=T)
    return points


def _converges(row: Row, rows: list[Row], report: Report) -> bool:
    """Whether its method comes near to the reference, or nearer with more work; else no time."""
    first, *_, last = (r["error"] for r in rows if r["method"] == row["method"])
    if last < max(first, NEAR):
        return True
    failed = f"{row['variant']} on {row['graph']}: {row['method']}, {first:.1g} to {last:.1g}"
    if failed not in report.failed:
        report.failed.append(failed)
    return False
