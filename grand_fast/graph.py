"""`Graph`: the edges as CSR of `A` and of `Aᵀ`, sorted and validated once, on construction.

Row `i` of `A` lists the senders of receiver `i`, so `y = A x` needs nothing transposed. This file
is the only place where the user's `edge_index` is turned into that layout.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from grand_fast.kernels._csr import Csr, Plan
from grand_fast.kernels._locality import reverse_cuthill_mckee, visiting_order

Flow = Literal["source_to_target", "target_to_source"]
_FLOWS = ("source_to_target", "target_to_source")
_INT32_MAX = 2**31 - 1
_INDEX_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True, eq=False, repr=False)
class Graph:
    """A directed graph with `N` nodes and `E` edges `j → i`, ready for every operator.

    Build it with `Graph.from_edge_index`. Attributes (all tensors on `device`):
        num_nodes, num_edges: `N` and `E`; appended self-loops and repeated edges count.
        edge_weight: `[E]` in the user's edge order, or None when every edge weighs 1.
        rowptr, col: CSR of `A`, `[N+1]` and `[E]`: row `i` lists the senders of `i`, ascending.
        rowptr_t, col_t: CSR of `Aᵀ`: row `j` lists the receivers of `j`, ascending.
        perm: `[E]`, slot in the CSR of `A` → edge id given by the user.
        perm_t: `[E]`, slot in the CSR of `Aᵀ` → slot in the CSR of `A`.
    Index arrays are int32 while `N` and `E` are below 2³¹, else int64.
    """

    rowptr: Tensor
    col: Tensor
    rowptr_t: Tensor
    col_t: Tensor
    perm: Tensor
    perm_t: Tensor
    edge_weight: Tensor | None = None
    _views: dict[Any, Any] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_views", _views_of(self._arrays()))

    def __reduce__(self) -> Any:
        return Graph, (*self._arrays(), self.edge_weight)  # what is planned is planned anew

    def _arrays(self) -> tuple[Tensor, ...]:
        return self.rowptr, self.col, self.rowptr_t, self.col_t, self.perm, self.perm_t

    @property
    def num_nodes(self) -> int:
        """`N`."""
        return self.rowptr.numel() - 1

    @property
    def num_edges(self) -> int:
        """`E`, self-loops and repeated edges included."""
        return self.col.numel()

    @property
    def device(self) -> torch.device:
        """Where all arrays lie."""
        return self.col.device

    def __repr__(self) -> str:
        weights = "" if self.edge_weight is None else ", edge_weight=[E]"
        return (
            f"Graph(num_nodes={self.num_nodes}, num_edges={self.num_edges}{weights}, "
            f"device='{self.device}')"
        )

    @classmethod
    def from_edge_index(
        cls,
        edge_index: Any,
        num_nodes: int | None = None,
        edge_weight: Tensor | None = None,
        *,
        flow: Flow = "source_to_target",
        self_loops: float | None = None,
        validate: bool = True,
    ) -> Graph:
        """Sort and validate a graph's edges.

        Args:
            edge_index: integer tensor `[2, E]`, PyG `EdgeIndex`; or a sparse matrix `A` of
                `y = A x` (`torch.sparse_csr`, scipy sparse, `SparseTensor`; rows receive, as in
                PyG's `adj_t`), whose values become `edge_weight` unless that is given.
            num_nodes: `N`; by default the largest id plus one, or the size of the matrix.
            edge_weight: `[E]`, floating, finite.
            flow: as in PyG. `"source_to_target"`: row 0 of `edge_index` sends;
                `"target_to_source"`: row 0 receives. A matrix has receivers in its rows always.
            self_loops: None leaves the edges as they are; a weight `w` appends a loop of that
                weight to every node that has none, after the given edges, in node order.
            validate: False skips the checks that read values (ids in range, weights finite).

        Returns:
            The graph, on the device of `edge_index`. Repeated edges are kept and count each.

        Raises:
            TypeError, ValueError: one line that names the argument, what was expected and what
                came.
        """
        if flow not in _FLOWS:
            raise ValueError(_message("flow", f"must be one of {_FLOWS}", repr(flow)))
        receiver, sender, size, weight = _edges(edge_index, flow)
        if edge_weight is None:
            edge_weight = weight
        n = _num_nodes(num_nodes, size, receiver, sender)
        _check_weight(edge_weight, receiver, validate)
        if validate:
            _check_ids(receiver, sender, n)
        if self_loops is not None:
            receiver, sender, edge_weight = _append_loops(
                receiver, sender, edge_weight, n, self_loops
            )
        return cls._sorted(receiver, sender, n, edge_weight)

    @classmethod
    def _sorted(cls, receiver: Tensor, sender: Tensor, n: int, weight: Tensor | None) -> Graph:
        # One sort of a combined key per view: 2-3 times faster than two stable sorts of columns.
        # It is stable, so repeated edges keep the user's order.
        e = receiver.numel()
        index = torch.int32 if max(n, e) <= _INT32_MAX else torch.int64
        perm = torch.sort(receiver * n + sender, stable=True).indices
        receiver, sender = receiver[perm], sender[perm]
        perm_t = torch.sort(sender * n + receiver, stable=True).indices
        return cls(
            rowptr=_rowptr(receiver, n, index),
            col=sender.to(index),
            rowptr_t=_rowptr(sender, n, index),
            col_t=receiver[perm_t].to(index),
            perm=perm.to(index),
            perm_t=perm_t.to(index),
            edge_weight=weight,
        )

    def csr(self, plan: Plan | None = None, *, transposed: bool = False) -> Csr:
        """The view of `A` (or `Aᵀ`) for a backend's launchers; `plan` runs once, cached."""
        key = (plan, transposed)
        view: Csr | None = self._views.get(key)
        if view is None:
            view = Csr(
                rowptr=_alias(self.rowptr_t if transposed else self.rowptr),
                col=_alias(self.col_t if transposed else self.col),
                slot=_alias(self.perm_t) if transposed else None,
                work=None,
            )
            if plan is not None:
                view = plan(view, lambda: self._visiting_order)
            self._views[key] = view
        return view

    @property
    def _visiting_order(self) -> Tensor | None:
        if "order" not in self._views:
            order = visiting_order(self.csr(), self.csr(transposed=True))
            self._views["order"] = order
        return self._views["order"]  # type: ignore[no-any-return]

    def edge_index(self) -> Tensor:
        """The edges in the user's order, int64 `[2, E]`: row 0 sends, row 1 receives."""
        edges = torch.empty(2, self.num_edges, dtype=torch.int64, device=self.device)
        nodes = torch.arange(self.num_nodes, device=self.device)
        perm = self.perm.long()
        edges[0, perm] = self.col.long()
        edges[1, perm] = torch.repeat_interleave(nodes, self.rowptr.diff())
        return edges

    def random_walk_weights(
        self, dtype: torch.dtype = torch.float32, *, edge_order: Literal["user", "csr"] = "user"
    ) -> Tensor:
        """`a_ij = w_ij / Σ_j w_ij`, `[E]`: rows of `A` sum to one; 0 where the sum is 0."""
        _, receiver = self.edge_index()
        weight = self._float64_weight()
        degree = self._degree(weight, receiver)
        share = degree.reciprocal().masked_fill(degree == 0, 0.0)
        a = (weight * share[receiver]).to(dtype)
        return a if edge_order == "user" else a[self.perm.long()]

    def symmetric_weights(
        self, dtype: torch.dtype = torch.float32, *, edge_order: Literal["user", "csr"] = "user"
    ) -> Tensor:
        """`a_ij = w_ij / √(D_i D_j)` with `D_i = Σ_j w_ij`, `[E]`; 0 where a `D` is 0, NaN below.

        Those of PyG's `gcn_norm`, which adds self-loops; here they are what `Graph` was given.
        """
        sender, receiver = self.edge_index()
        weight = self._float64_weight()
        degree = self._degree(weight, receiver)
        root = degree.rsqrt().masked_fill(degree == 0, 0.0)
        a = (root[receiver] * weight * root[sender]).to(dtype)
        return a if edge_order == "user" else a[self.perm.long()]

    def _float64_weight(self) -> Tensor:
        if self.edge_weight is None:
            return torch.ones(self.num_edges, dtype=torch.float64, device=self.device)
        return self.edge_weight.to(torch.float64)

    def _degree(self, weight: Tensor, receiver: Tensor) -> Tensor:
        """What each node receives, `[N]`."""
        return weight.new_zeros(self.num_nodes).index_add(0, receiver, weight)

    def to(self, device: torch.device | str) -> Graph:
        """The same graph on `device`; itself when it is there already."""
        device = torch.empty(0, device=device).device
        if device == self.device:
            return self
        moved = {
            name: getattr(self, name).to(device)
            for name in ("rowptr", "col", "rowptr_t", "col_t", "perm", "perm_t")
        }
        weight = None if self.edge_weight is None else self.edge_weight.to(device)
        return replace(self, **moved, edge_weight=weight)

    def is_symmetric(self) -> bool:
        """Whether `A` and `Aᵀ` have the same edges, with the same weights if there are any."""
        if not torch.equal(self.rowptr, self.rowptr_t) or not torch.equal(self.col, self.col_t):
            return False
        if self.edge_weight is None:
            return True
        slots = self.edge_weight[self.perm.long()]
        return torch.equal(slots, slots[self.perm_t.long()])

    def reorder(self, method: Literal["rcm", "degree"] = "rcm") -> tuple[Graph, Tensor]:
        """Renumber the nodes so that neighbours lie close in memory.

        The CPU kernels visit the rows in `"rcm"` order on their own where that helps, whatever
        the numbering.

        Args:
            method: `"rcm"` (reverse Cuthill–McKee, scipy) or `"degree"` (most senders first).

        Returns:
            The renumbered graph and `permutation` `[N]`: its node `n` is the old node
            `permutation[n]`, so use `x[permutation]` with it. Edges keep the user's order.
        """
        if method == "rcm":
            order = reverse_cuthill_mckee(self.csr(), self.csr(transposed=True))
        elif method == "degree":
            order = torch.argsort(self.rowptr.diff().cpu(), descending=True, stable=True)
        else:
            raise ValueError(_message("method", "must be 'rcm' or 'degree'", repr(method)))
        order = order.to(self.device)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(self.num_nodes, device=self.device)
        sender, receiver = rank[self.edge_index()]
        return Graph._sorted(receiver, sender, self.num_nodes, self.edge_weight), order


def _flatten(graph: Graph) -> tuple[list[Any], Any]:
    return [*graph._arrays(), graph.edge_weight], None


def _flatten_with_keys(graph: Graph) -> tuple[list[Any], Any]:
    # As keys of a mapping: export confuses attributes of which one name begins with another's.
    names = ("rowptr", "col", "rowptr_t", "col_t", "perm", "perm_t", "edge_weight")
    return [(pytree.MappingKey(name), getattr(graph, name)) for name in names], None


# An argument of an exported program. The public name of this, in torch.export, is slow to import.
pytree.register_pytree_node(
    Graph,
    _flatten,
    lambda children, _: Graph(*children),
    serialized_type_name="grand_fast.Graph",
    flatten_with_keys_fn=_flatten_with_keys,
)
torch.serialization.add_safe_globals([Graph])  # it holds tensors alone


def cached_graph(edge_index: Tensor, num_nodes: int) -> Graph:
    """The graph of an `edge_index` (source to target), kept while that tensor lives unchanged."""
    if edge_index.is_inference():  # has no version counter: a change would go unseen
        return Graph.from_edge_index(edge_index, num_nodes)
    key = (edge_index._version, num_nodes)
    known: tuple[Any, Graph] | None = _graphs.get(edge_index)  # type: ignore[no-untyped-call]
    if known is None or known[0] != key:
        known = _graphs[edge_index] = (key, Graph.from_edge_index(edge_index, num_nodes))
    return known[1]


_graphs: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


class _Known(NamedTuple):
    further: tuple[weakref.ref[Tensor], ...]
    views: dict[Any, Any]


def _views_of(arrays: Sequence[Tensor]) -> dict[Any, Any]:
    """Where the views of these very tensors are kept while they live.

    A compiled program knows a graph by its arrays alone, and finds here what was planned for them.
    """
    rowptr, *further = arrays
    known: _Known | None = _known.get(rowptr)  # type: ignore[no-untyped-call]
    if known is None or any(ref() is not t for ref, t in zip(known.further, further, strict=True)):
        known = _known[rowptr] = _Known(tuple(weakref.ref(t) for t in further), {})
    return known.views


def _alias(t: Tensor) -> Tensor:
    """The same memory as another tensor: a view that held `rowptr` would keep its own key alive."""
    return t.detach()


_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _message(argument: str, expected: str, got: str, remedy: str = "") -> str:
    return f"Graph: `{argument}` {expected}, got {got}.{' ' + remedy if remedy else ''}"


def _edges(edge_index: Any, flow: str) -> tuple[Tensor, Tensor, int | None, Tensor | None]:
    """Receivers, senders (int64), the size if the input knows it, and its weights."""
    if hasattr(edge_index, "tocoo") and hasattr(edge_index, "shape"):  # scipy.sparse
        coo = edge_index.tocoo()
        rows, cols = (torch.from_numpy(np.asarray(i, dtype=np.int64)) for i in (coo.row, coo.col))
        return rows, cols, _square(coo.shape), _floating(torch.from_numpy(np.array(coo.data)))
    if hasattr(edge_index, "sparse_sizes") and hasattr(edge_index, "coo"):  # SparseTensor
        rows, cols, values = edge_index.coo()
        return rows, cols, _square(edge_index.sparse_sizes()), _floating(values)
    if not isinstance(edge_index, Tensor):
        kinds = "an integer tensor [2, E], EdgeIndex, or a sparse matrix"
        raise TypeError(_message("edge_index", f"must be {kinds}", type(edge_index).__name__))
    if edge_index.layout is not torch.strided:
        matrix = edge_index.to_sparse_coo()  # type: ignore[no-untyped-call]
        # coalesce() would add up repeated edges; a CSR tensor's own order is already by row
        rows, cols = matrix._indices()
        return rows, cols, _square(tuple(matrix.shape)), _floating(matrix._values())
    size = None
    pyg = sys.modules.get("torch_geometric")  # whoever holds an EdgeIndex has imported it
    if pyg is not None and isinstance(edge_index, pyg.EdgeIndex):
        size = max((s for s in edge_index.sparse_size() if s is not None), default=None)
        edge_index = edge_index.as_tensor()
    if edge_index.dtype not in _INDEX_DTYPES:
        remedy = "Convert it with .long()." if edge_index.is_floating_point() else ""
        raise TypeError(
            _message("edge_index", "must be of an integer dtype", str(edge_index.dtype), remedy)
        )
    if edge_index.dim() != 2 or edge_index.shape[0] != 2:
        shape = list(edge_index.shape)
        transposed = edge_index.dim() == 2 and shape[1] == 2
        remedy = "Did you mean edge_index.t()?" if transposed else ""
        raise ValueError(_message("edge_index", "must have shape [2, E]", str(shape), remedy))
    first, second = edge_index.long()
    return (second, first, size, None) if flow == _FLOWS[0] else (first, second, size, None)


def _square(shape: Any) -> int:
    rows, cols = (int(s) for s in shape)
    if rows != cols:
        raise ValueError(_message("edge_index", "as a matrix must be square", f"[{rows}, {cols}]"))
    return rows


def _floating(values: Tensor | None) -> Tensor | None:
    if values is None or values.is_floating_point():
        return values
    return values.to(torch.get_default_dtype())


def _num_nodes(given: int | None, size: int | None, receiver: Tensor, sender: Tensor) -> int:
    if given is not None:
        if isinstance(given, bool) or not isinstance(given, int | np.integer):
            raise TypeError(_message("num_nodes", "must be an int or None", type(given).__name__))
        if given < 0 or given > _INT32_MAX:
            raise ValueError(_message("num_nodes", "must lie in [0, 2³¹)", str(given)))
        return int(given)
    if size is not None:
        return size
    if receiver.numel() == 0:
        return 0
    return max(int(torch.maximum(receiver.max(), sender.max())) + 1, 0)


def _check_ids(receiver: Tensor, sender: Tensor, n: int) -> None:
    if receiver.numel() == 0:
        return
    low = int(torch.minimum(receiver.min(), sender.min()))
    high = int(torch.maximum(receiver.max(), sender.max()))
    if low < 0:
        raise ValueError(_message("edge_index", "must hold ids of at least 0", f"id {low}"))
    if high >= n:
        remedy = f"Pass num_nodes={high + 1} or drop these edges."
        raise ValueError(
            _message("edge_index", f"must hold ids below num_nodes={n}", f"id {high}", remedy)
        )


def _check_weight(weight: Tensor | None, receiver: Tensor, validate: bool) -> None:
    if weight is None:
        return
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        got = str(weight.dtype) if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(_message("edge_weight", "must be a floating tensor", got))
    e = receiver.numel()
    if tuple(weight.shape) != (e,):
        shape = list(weight.shape)
        remedy = "Did you mean edge_weight.flatten()?" if weight.numel() == e else ""
        raise ValueError(
            _message("edge_weight", f"must have shape [E] = [{e}]", str(shape), remedy)
        )
    if weight.device != receiver.device:
        raise ValueError(
            _message(
                "edge_weight",
                f"must be on the device of edge_index, {receiver.device}",
                str(weight.device),
                f"Move it with .to('{receiver.device}').",
            )
        )
    if validate and not bool(torch.isfinite(weight.detach()).all()):
        bad = int((~torch.isfinite(weight.detach())).nonzero()[0])
        raise ValueError(_message("edge_weight", "must be finite", f"{weight[bad]} at edge {bad}"))


def _append_loops(
    receiver: Tensor, sender: Tensor, weight: Tensor | None, n: int, loop_weight: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    if isinstance(loop_weight, bool) or not isinstance(loop_weight, int | float):
        got = repr(loop_weight)
        raise TypeError(_message("self_loops", "must be a float or None", got, "Try 1.0."))
    if not math.isfinite(loop_weight):
        raise ValueError(_message("self_loops", "must be finite", str(loop_weight)))
    bare = torch.ones(n, dtype=torch.bool, device=receiver.device)
    bare[receiver[receiver == sender]] = False
    loops = bare.nonzero().flatten()
    if weight is None and loop_weight != 1.0:
        weight = torch.ones(receiver.numel(), device=receiver.device)
    if weight is not None:
        weight = torch.cat([weight, weight.new_full((loops.numel(),), loop_weight)])
    return torch.cat([receiver, loops]), torch.cat([sender, loops]), weight


def _rowptr(rows: Tensor, n: int, index: torch.dtype) -> Tensor:
    rowptr = torch.zeros(n + 1, dtype=torch.int64, device=rows.device)
    rowptr[1:] = torch.bincount(rows, minlength=n).cumsum(0)
    return rowptr.to(index)
