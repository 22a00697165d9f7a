"""The rows of a covering array against the definition."""

import itertools

import pytest

from tests._pairwise import covering


@pytest.mark.parametrize("strength", [1, 2, 3])
@pytest.mark.parametrize("sizes", [(3,), (2, 3), (5, 2, 2, 4, 3), (2, 2, 2, 2, 2, 2)], ids=str)
def test_every_combination_is_shown(sizes, strength):
    rows = covering(sizes, strength)
    for group in itertools.combinations(range(len(sizes)), min(strength, len(sizes))):
        seen = {tuple(row[i] for i in group) for row in rows}
        assert seen == set(itertools.product(*(range(sizes[i]) for i in group)))
    assert len(set(rows)) == len(rows)


def test_few_rows():
    """Of 240 combinations; no fewer than the two longest options have pairs."""
    assert 20 <= len(covering((5, 2, 2, 4, 3))) <= 24
