"""What would start a process, or a compiler, for each of many competitors."""

import pickle
from collections.abc import Callable

import pytest

from bench.core import fresh
from bench.peers import sampled


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks of fresh processes run here, sent as they are there; and no peer is compiled.

    `test_peak_memory_in_a_fresh_process` starts one, `test_peer_agrees_with_reference` compiles.
    """

    def run(
        task: Callable[..., dict[str, float]], *, cache: str | None = None, **values: object
    ) -> dict[str, float]:
        task, values = pickle.loads(pickle.dumps((task, values)))
        return task(**values)

    monkeypatch.setattr(fresh, "run", run)
    monkeypatch.setattr(sampled, "has_compiler", lambda: False)
    sampled._elementwise.cache_clear()
    yield
    sampled._elementwise.cache_clear()
