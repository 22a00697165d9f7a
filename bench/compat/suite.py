"""The suite `compat`: somebody's program as it is against the same on our kernels."""

import argparse
import sys
from typing import Any

import numpy as np

from bench.compat.compare import ORDERS, measure
from bench.compat.program import WHAT, Program
from bench.core import fresh
from bench.core.harness import Timing
from bench.core.problem import OURS
from bench.core.report import Report
from bench.core.tables import Column, Row, cell, milliseconds, print_rows, print_table

EPILOG = f"""\
A checkout of GRAND's released code, or of code that grew out of it, is run as it is and as
`grand-fast run` runs it, in turns in one process, from the same seeds, without an edit. The program
is one that trains: an epoch is what lies between two steps of its optimiser, its evaluation
included; it is stopped after --epochs of them and one before, which is not timed.

First the two are compared at every step: loss, gradients, evaluations of the vector field. They may
differ by --tolerance, or {ORDERS:g} times what the program as it is differs from itself when
torch_sparse.spmm sums the edges in another order. What disagrees gets no time.

Seconds of CPU stand beside those of the clock: on a busy machine they say more. Each allocator has
a process of its own. What the program needs beside torch_sparse and torch_scatter, for which there
are stand-ins, has to be installed. Options of its own follow two dashes. Try:
python -m bench compat --repository graph-neural-pde --dataset Cora -- --no_early
"""
STOCK = "as it is"
ALLOCATORS = ("keep", "system")
EPOCHS, ROUNDS, QUICK = 5, 5, 2


def _over_ours(row: Row) -> str:
    return "{:.2f}× [{:.2f}–{:.2f}]".format(*row["over_ours"]) if "over_ours" in row else ""


COLUMNS: list[Column] = [
    ("allocator", cell("allocator")),
    ("", cell("competitor")),
    ("ms", milliseconds),
    ("over ours", _over_ours),
    ("ms of CPU", lambda row: milliseconds(row["cpu"])),
    ("over ours", lambda row: _over_ours(row["cpu"])),
    ("evaluations", cell("evaluations")),
]


def run(options: argparse.Namespace, report: Report) -> None:
    """Measure, print as it comes, and fill `report`.

    Raises:
        ValueError: there is no such program, or it trains nothing.
    """
    program = _program(options)
    name = " ".join([f"{program.repository.name}/{options.script}", *program.arguments])
    chosen = [options.allocator] if options.allocator in ALLOCATORS else list(ALLOCATORS)
    report.header["allocator"], report.compared_with = options.allocator, "the program as it is"
    report.start(len(chosen))
    found = {}
    for allocator in chosen:
        report.say(f"{name}, allocator: {allocator}")
        found[allocator] = one = _measured(program, options, keep=allocator == "keep")
        report.failed += [f"{name}, allocator {allocator}, {text}" for text in one["failed"]]
        if not one["failed"]:
            report.rows += _rows(one, report, program=name, allocator=allocator)
        report.done()
    report.close()
    table = {key: [one["differences"][key] for one in found.values()] for key in WHAT}
    worst = {
        key: max(rows, key=lambda row: row["ours"] / row["allowed"]) for key, rows in table.items()
    }
    cells = [[WHAT[key], *(f"{value:.1e}" for value in row.values())] for key, row in worst.items()]
    head = ["differs by, at the worst", OURS, "another order of sums", "allowed"]
    print_table(f"{name}: against the program as it is", head, cells)
    print(one["report"])
    if report.rows:
        print_rows(f"{name}: an epoch", report.rows, COLUMNS)
    report.header["compat"] = found


def _program(options: argparse.Namespace) -> Program:
    repository = options.repository.resolve()
    script = repository / options.script
    if not script.is_file():
        raise ValueError(f"there is no file {str(script)!r}; --script names it")
    dataset = ["--dataset", options.dataset] if options.dataset else []
    epochs = options.epochs or (QUICK if options.quick else EPOCHS)
    return Program(repository, script, (*dataset, *options.arguments), epochs)


def _measured(program: Program, options: argparse.Namespace, *, keep: bool) -> dict[str, Any]:
    rounds = options.rounds or (QUICK if options.quick else ROUNDS)
    try:
        found = fresh.run(measure, program=program, keep=keep, threads=options.threads,
                          rounds=rounds, tolerance=options.tolerance)  # fmt: skip
    except RuntimeError as error:
        raise ValueError(f"the process that ran it has failed: {error}") from error
    if "errors" in found:
        *trace, last = found["errors"].splitlines()
        print("\n".join(trace), file=sys.stderr)
        raise ValueError(f"{program.script}, as it is: {last}")
    return found


def _rows(found: dict[str, Any], report: Report, **common: str) -> list[Row]:
    """Of both, the seconds of an epoch, and the ratio of the medians of the rounds."""
    rows: list[Row] = [
        common | {"competitor": name, "op": "epoch", "evaluations": found["evaluations"], "cpu": {}}
        for name in (STOCK, OURS)
    ]
    for key, text in (("wall_s", "time"), ("cpu_s", "CPU time")):
        medians = []
        into = rows if key == "wall_s" else [row["cpu"] for row in rows]
        for row, mode in zip(into, ("stock", "patched"), strict=True):
            epochs = np.array([one[key] for one in found[mode]])
            row |= Timing(tuple(epochs.flat)).record()
            medians.append(np.median(epochs, axis=1))
        into[0]["over_ours"] = np.percentile(medians[0] / medians[1], (50, 10, 90)).tolist()
        what = f"an epoch, allocator {common['allocator']}, {text}: {STOCK} over ours"
        report.figure(what, into[0]["over_ours"][0], "×")
    return rows
