"""Rows of results: timed, compared with ours, and printed as tables."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from bench.core.harness import Timing
from bench.core.problem import MODES, OURS

Row = dict[str, Any]
Column = tuple[str, Callable[[Row], str]]  # its head, and how a row's cell reads


def print_table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A Markdown table with aligned columns, to be read here or pasted there."""
    cells = [list(head), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        " | ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    ]
    rule = "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths))
    print(f"\n{title}\n")
    print(f"| {lines[0]} |\n|{rule}|")
    for line in lines[1:]:
        print(f"| {line} |")
    print(flush=True)


def print_rows(title: str, rows: Iterable[Row], columns: Sequence[Column]) -> None:
    """`print_table` with a line for each row."""
    head, cells = zip(*columns, strict=True)
    print_table(title, head, [[cell(row) for cell in cells] for row in rows])


def cell(key: str, form: str = "{}", scale: float = 1) -> Callable[[Row], str]:
    """What a row has under `key`, times `scale`; empty where it has nothing."""

    def read(row: Row) -> str:
        value = row.get(key)
        if value is None:
            return ""
        return form.format(value if scale == 1 else value * scale)

    return read


def milliseconds(row: Row) -> str:
    """Median and spread."""
    return f"{row['median_s'] * 1e3:.1f} [{row['p10_s'] * 1e3:.1f}–{row['p90_s'] * 1e3:.1f}]"


_OVER_OURS = cell("over_ours", "{:.2f}×")
# Of rows by `both_modes`
BOTH_TIMES: list[Column] = [
    ("", cell("competitor")),
    ("forward ms", milliseconds),
    ("over ours", _OVER_OURS),
    ("forward+backward ms", lambda row: milliseconds(row["both"])),
    ("over ours", lambda row: _OVER_OURS(row["both"])),
]


def timed_rows(timings: Mapping[str, Timing], **common: Any) -> list[Row]:
    """A row for each of the calls `competitor|mode`, with what they have in common."""
    rows = []
    for key, timing in timings.items():
        competitor, _, mode = key.partition("|")
        rows.append(common | {"competitor": competitor, "mode": mode} | timing.record())
    return rows


def both_modes(rows: Iterable[Row]) -> list[Row]:
    """A row for each competitor: that of its forward, with that of forward+backward as `both`."""
    forward, both = ([row for row in rows if row["mode"] == mode] for mode in MODES)
    return [f | {"both": b} for f, b in zip(forward, both, strict=True)]


def ours_beside(row: Row, rows: Iterable[Row], *same: str) -> Row:
    """Our row of those that have these values in common with `row`; empty where there is none."""
    ours = (r for r in rows if r["competitor"] == OURS and all(r[k] == row[k] for k in same))
    return next(ours, {})


def add_ratios(rows: Sequence[Row], *same: str) -> None:
    """Each row's time and peak of memory over ours in the row that has the same."""
    for row in rows:
        ours = ours_beside(row, rows, *same)
        row["time_over_ours"] = ratio(row, ours, "median_s")
        row["peak_over_ours"] = ratio(row, ours, "peak_bytes")


def ratio(row: Row, ours: Row, key: str) -> float | None:
    """Over ours; None for ours itself, and where one of them has no value."""
    if row is ours or key not in row or key not in ours:
        return None
    return float(row[key] / ours[key])
