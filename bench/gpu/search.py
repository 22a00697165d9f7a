"""Our kernels one by one: their times, and other launch parameters than the library's."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bench.core.harness import Budget, interleave
from bench.core.report import Report
from bench.core.tables import Column, cell, milliseconds, print_rows
from bench.gpu.device import Call, Cuda, clock
from bench.gpu_report.compile import Launch, record
from bench.gpu_report.metrics import label
from grand_fast.kernels.gpu.pieces import PIECE_EDGES
from grand_fast.kernels.gpu.sizes import Sizes

COLUMNS: list[Column] = [
    ("pass", cell("op")),
    ("kernel", cell("kernel")),
    ("ms", milliseconds),
    ("over model", cell("over_model", "{:.2f}×")),
    ("best variant", cell("changed")),
    ("its time", cell("ratio", "{:.2f}×")),
]
_REGISTERS = (64, 80, 96, 128)  # a lane: 32, 24, 20 and 16 warps resident
_PIECES = (128, 512)  # edges, instead of 256
# Sums in another order differ by roundings of float32, which a hub adds up.
_TOLERANCE = 1e-4

# Runs the launchers of a pass on the device, with pieces of so many edges.
Pass = Callable[[int], object]


def measure_kernels(
    passes: dict[str, Pass],
    device: Cuda,
    report: Report,
    budget: Budget,
    *,
    rounds: int,
    model: dict[str, float] | None = None,
) -> None:
    """Time each kernel of each pass as launched, then its variants; checked against the first.

    `model`: seconds of the GPU report, by kernel, to stand beside the measured ones.
    """
    rows = []
    for name, run in passes.items():
        report.say(f"launch parameters: {name}")
        for launch, variants in _launches(run, report):
            if not budget.allows(f"launch parameters of {label(launch)}", 5.0):
                continue
            row = _measure(launch, variants, device, report, rounds)
            modelled = (model or {}).get(label(launch))
            row |= {"op": name, "mode": "kernel", "model_s": modelled}
            over = {"over_model": row["median_s"] / modelled} if modelled else {}
            best = (*row["variants"], {"changed": "", "ratio": 1.0})[0]
            rows.append(row | over | best)
            report.rows.append(row)
        report.done()
    print_rows("our kernels, and the best of other launch parameters", rows, COLUMNS)


def _launches(run: Pass, report: Report) -> Iterator[tuple[Launch, dict[str, Launch]]]:
    """Each launch of a pass, made once so that its inputs are there, and its variants."""
    with record() as launches:
        run(PIECE_EDGES)
    others: dict[str, list[Launch]] = {}
    for piece in _PIECES:
        with record() as others[f"pieces of {piece} edges"]:
            run(piece)
    for launch in launches:
        _run(launch)
    for text, changed in others.items():
        if [launch.name for launch in changed] != [launch.name for launch in launches]:
            report.skipped.append(f"{text}: other kernels, as no row is cut any more.")
            others[text] = []
        for launch in changed:
            _run(launch)
    for i, launch in enumerate(launches):
        variants = dict(_variants(launch))
        variants |= {text: changed[i] for text, changed in others.items() if changed}
        yield launch, variants


def _variants(launch: Launch) -> Iterator[tuple[str, Launch]]:
    sizes = launch.kwargs.get("sizes", {})
    edges = sizes.get("BLOCK_E")
    for value in (edges // 2, 2 * edges) if edges else ():
        if value:
            changed = {"sizes": Sizes(sizes, BLOCK_E=value)}
            yield f"BLOCK_E={value}", replace(launch, kwargs=launch.kwargs | changed)
    if edges and torch.version.hip is None:
        for value in _REGISTERS:
            yield f"maxnreg={value}", replace(launch, kwargs=launch.kwargs | {"maxnreg": value})


def _measure(
    launch: Launch, variants: dict[str, Launch], device: Cuda, report: Report, rounds: int
) -> dict[str, Any]:
    name = label(launch)
    _run(launch)
    want = [t.clone() for t in _tensors(launch)]
    calls: dict[str, Call] = {"": lambda: _run(launch)}
    for text, variant in variants.items():
        try:
            _run(variant)
            if not text.startswith("pieces"):  # those have other inputs and outputs
                _compare(_tensors(variant), want)
        except (AssertionError, RuntimeError, ValueError) as problem:
            report.skipped.append(f"{name}, {text}: {str(problem).splitlines()[0]}")
            continue
        calls[text] = lambda variant=variant: _run(variant)  # type: ignore[misc]
    each_s = 2.0 / len(calls)
    timings = interleave(calls, rounds=rounds, budget_s=each_s, **clock(device))
    default = timings.pop("")
    found = [{"changed": text, "ratio": timing.median / default.median}
             for text, timing in timings.items()]  # fmt: skip
    found.sort(key=lambda variant: variant["ratio"])
    return {"kernel": name, **default.record(), "variants": found}


def _compare(got: list[Tensor], want: list[Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        if a.is_floating_point() and a.numel():
            a, b = a.nan_to_num().double(), b.nan_to_num().double()
            error = float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))
            assert error <= _TOLERANCE, f"error {error:.1e} against the default's result"


def _tensors(launch: Launch) -> list[Tensor]:
    return [value for value in launch.arguments.values() if isinstance(value, Tensor)]


def _run(launch: Launch) -> None:
    launch.kernel.run(*launch.args, grid=launch.grid, warmup=False, **launch.kwargs)
