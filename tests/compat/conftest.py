"""No patch is left over, and torch_sparse and torch_scatter are there."""

import pytest

from grand_fast.compat import active
from grand_fast.compat.stand_ins import stand_ins


@pytest.fixture(autouse=True)
def _modules(one_thread):
    with stand_ins():
        yield
    assert not active.stack
