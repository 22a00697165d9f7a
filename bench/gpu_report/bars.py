"""What the kernels are held to, printed with what they reach: `met`, or what is missed.

Of the machine code of every kernel: no spills, no atomics on floats, at most one barrier in a turn
of a loop. Of the passes of `attention_diffusion` over the edges:

- the longest piece, that of a hub, is never what bounds a pass;
- float32, 4 divides d: at least 90 % of the bytes of a gathered row come 128 bits a lane;
- float32, rows by number: neither pipe nor latency takes longer than memory, and they, added to
  memory, take at most twice the floor;
- float32, reverse Cuthill-McKee order: the longest bound is at most 1.3 times the floor;
- half types, rows by number: added, they take at most 2.5 times the floor.

The forward that gathers keys and state as one row has half the floor of its shape, and no bar.
"""

import torch

from bench.core.problem import Shape
from bench.core.report import Report
from bench.core.tables import Column, Row, cell, print_rows
from bench.gpu_report import sass
from bench.gpu_report.metrics import Kernel
from bench.gpu_report.model import gathered

_PASSES = {
    "attention_diffusion_fwd": "forward",
    "attention_bwd_dq (state": "row pass",
    "attention_bwd_dk (state": "column pass",
}
_COLUMNS: list[Column] = [
    ("", cell("dtype")),
    ("shape", cell("shape")),
    ("GPU", cell("gpu")),
    ("attention_diffusion", cell("pass")),
    ("others", cell("others", "{:.2f}")),
    ("added", cell("added", "{:.2f}")),
    ("community", cell("community", "{:.2f}")),
    ("bound by", lambda row: row["model"]["natural"]["bound"]),
    ("128-bit %", cell("gathered_wide_percent", "{:.0f}")),
    ("bars", cell("bars")),
]
_OTHERS, _ADDED, _ADDED_HALF, _COMMUNITY, _WIDE = 1.0, 2.0, 2.5, 1.3, 90.0
_ROUNDING = 0.005  # figures are read with two decimals


def gathered_wide_percent(kernel: Kernel) -> float:
    """Of the bytes of the rows that an edge gathers, those that lanes load 128 bits at a time."""
    wide = needed = 0.0
    for loop, tables in zip(kernel.loops, gathered(kernel.launch), strict=True):
        rows = [kernel.launch.arguments[f"{name}_ptr"] for name in tables]
        size = sum(float(t[0].numel() * t.element_size()) for t in rows)
        loaded = sass.load_bytes(loop, at_least=16) * kernel.used.warps / kernel.launch.slots
        needed += size
        wide += min(size, loaded)  # lanes past the end of a row load nothing
    return 100 * wide / needed


def missed(row: Row, shape: Shape) -> list[str]:
    """The bars that one pass over the edges misses, each with its figure."""
    figures, natural = _figures(row), row["model"]["natural"]
    is_single = row["dtype"] == str(torch.float32).removeprefix("torch.")
    bars = [("added", _ADDED if is_single else _ADDED_HALF)]
    if is_single:
        bars += [("others", _OTHERS), ("community", _COMMUNITY)]
    texts = [
        f"{name} {figures[name]:.2f} > {bar:g}"
        for name, bar in bars
        if figures[name] >= bar + _ROUNDING
    ]
    if natural["bound"] == "longest":
        texts.append("bound by the longest piece")
    if is_single and shape.channels % 4 == 0 and row["gathered_wide_percent"] < _WIDE:
        texts.append(f"128-bit {row['gathered_wide_percent']:.0f} % < {_WIDE:g} %")
    return texts


def print_bars(rows: list[Row], shapes: dict[str, Shape], report: Report) -> None:
    """One line for each pass, shape, type and GPU; how many meet their bars, as figures too."""
    lines = []
    for row in rows:
        found = [text for label, text in _PASSES.items() if row["kernel"].startswith(label)]
        if found and "model" in row:
            texts = missed(row, shapes[row["shape"]])
            line = row | _figures(row) | {"pass": found[0], "bars": "; ".join(texts) or "met"}
            if "absorbed" in row["kernel"]:
                line |= {"pass": f"{found[0]}, absorbed", "bars": "no bar"}
            lines.append(line)
    print_rows(
        "MODEL, nothing ran. others: pipe or latency over memory; added: memory and the longest "
        "other bound over the floor; community: the longest bound over the floor, rcm",
        lines,
        _COLUMNS,
    )
    judged = [line["bars"] == "met" for line in lines if line["bars"] != "no bar"]
    report.figure("passes that meet their bars", sum(judged), f"of {len(judged)}")
    for name, most, bar in (
        ("spill instructions", max(row["exact"]["spills"] for row in rows), 0),
        ("atomics on floats", max(row["float_atomics"] for row in rows), 0),
        ("barriers in a turn of a loop", max(row["exact"]["barriers"] for row in rows), 1),
    ):
        verdict = "met" if most <= bar else "MISSED"
        report.figure(f"{name}, most of any kernel", most, f"bar {bar}: {verdict}")


def _figures(row: Row) -> dict[str, float]:
    natural, community = row["model"]["natural"], row["model"]["rcm"]
    memory = max(natural["dram_s"], natural["l2_s"])
    return {
        "others": max(natural["pipe_s"], natural["latency_s"]) / memory,
        "added": natural["added_s"] / natural["floor_s"],
        "community": community["seconds"] / community["floor_s"],
    }
