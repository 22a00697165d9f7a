"""What an operator is given beside tensors: as an object in eager calls, flat in programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from grand_fast.graph import Graph
from grand_fast.kernels.weighting import Weighting

# Fields of a `Call` as plain arguments of a registered operator; those of a Weighting in its order.
PLAIN = {
    "weighting": "float scale, str function, float slope, str normalizer, str normalize",
    "heads": "int heads",
    "score": "str score",
    "mean_heads": "bool mean_heads",
    "of_x": "float of_x",
    "scales": "float[] scales",
}
_WEIGHTING_FIELDS = 5


class Call(NamedTuple):
    """What an operator is given beside tensors."""

    graph: Graph
    backend: str
    weighting: Weighting | None = None
    heads: int = 1
    score: str = "scaled_dot"
    mean_heads: bool = False
    of_x: float = 0.0
    scales: tuple[float, ...] = ()

    def flat(self, options: Sequence[str]) -> list[Any]:
        """The graph's arrays, the backend and those of the fields, as plain arguments."""
        graph = self.graph
        arrays = [graph.rowptr, graph.col, graph.rowptr_t, graph.col_t, graph.perm, graph.perm_t]
        flat: list[Any] = [arrays, self.backend]
        for name in options:
            value = getattr(self, name)
            if isinstance(value, Weighting):
                flat += [value.scale, value.function, value.slope]
                flat += [value.normalizer, value.normalize]
            else:
                flat.append(list(value) if name == "scales" else value)
        return flat

    @staticmethod
    def from_flat(flat: Sequence[Any], options: Sequence[str]) -> Call:
        """`flat` undone."""
        arrays, backend, *plain = flat
        fields: dict[str, Any] = {}
        for name in options:
            if name == "weighting":
                fields[name] = Weighting(*plain[:_WEIGHTING_FIELDS])
                plain = plain[_WEIGHTING_FIELDS:]
            else:
                fields[name] = tuple(plain[0]) if name == "scales" else plain[0]
                plain = plain[1:]
        return Call(Graph(*arrays), backend, **fields)
