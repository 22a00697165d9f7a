"""Cases that hold every pair of options, instead of every combination of all."""

import itertools
from collections.abc import Mapping, Sequence

import pytest

Values = Sequence[object] | Mapping[str, object]  # those of one option; its ids, or `str`


def covering(sizes: Sequence[int], strength: int = 2) -> list[tuple[int, ...]]:
    """Rows of indices in which every `strength` columns show each of their combinations.

    Greedy: the row that shows most of what is missing comes next, the first of several.
    """
    groups = list(itertools.combinations(range(len(sizes)), min(strength, len(sizes))))
    rows = list(itertools.product(*map(range, sizes)))
    shown = {row: {(g, tuple(row[i] for i in g)) for g in groups} for row in rows}
    missing = set().union(*shown.values())
    chosen = []
    while missing:
        best = max(rows, key=lambda row: len(shown[row] & missing))
        missing -= shown[best]
        chosen.append(best)
    return chosen


def pairwise(strength: int = 2, **options: Values) -> pytest.MarkDecorator:
    """Parametrize a test by the `options`: every pair of two options' values (or so many's)."""
    named = [
        list(values.items()) if isinstance(values, Mapping) else [(_id(v), v) for v in values]
        for values in options.values()
    ]
    rows = [
        [values[i] for values, i in zip(named, row, strict=True)]
        for row in covering([len(values) for values in named], strength)
    ]
    return pytest.mark.parametrize(
        tuple(options),
        [tuple(value for _, value in row) for row in rows],
        ids=["-".join(name for name, _ in row) for row in rows],
    )


def _id(value: object) -> str:
    return str(value).removeprefix("torch.")
