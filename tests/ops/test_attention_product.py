import pytest
import torch

from grand_fast.ops import attention_product
from grand_fast.testing import GRAPH_KINDS, random_graph
from tests._pairwise import pairwise
from tests.ops._problems import compare, normal

pytestmark = pytest.mark.usefixtures("nan_filled")

REDUCE = ("mean", "cat")
KEY, VALUE = "edge_key", "edge_value"
TABLES = {"none": (), "key": (KEY,), "value": (VALUE,), "both": (KEY, VALUE)}


def problem(graph, heads, d, d_k, tables=()):
    n, e = graph.num_nodes, graph.num_edges
    shapes = {"edge_key": (e, heads, d_k), "edge_value": (e, heads, d)}
    made = {"values": normal(n, heads, d, seed=1), "q": normal(n, heads, d_k, seed=2)}
    made["k"] = normal(n, heads, d_k, seed=3)
    return made | {name: normal(*shapes[name], seed=4 + len(name)) for name in tables}


def run(graph, **options):
    def call(values, q, k, backend="auto", **more):
        return attention_product(values, q, k, graph, backend=backend, **more, **options)

    return call


def by_node(graph, values, q, k, edge_key=None, edge_value=None, reduce="mean"):
    """Receiver by receiver, as the docstring has it."""
    sender, receiver = graph.edge_index()
    keys = k[sender] if edge_key is None else k[sender] + edge_key
    messages = values[sender] if edge_value is None else values[sender] + edge_value
    s = (q[receiver] * keys).sum(2) / q.shape[2] ** 0.5
    rows = []
    for node in range(graph.num_nodes):
        into = receiver == node
        rows.append((torch.softmax(s[into], 0)[:, :, None] * messages[into]).sum(0))
    y = torch.stack(rows) if rows else values
    return y.mean(1) if reduce == "mean" else y.flatten(1)


@pairwise(reduce=REDUCE, tables=TABLES, kind=GRAPH_KINDS)
def test_against_its_equation(kind, tables, reduce, backend):
    graph = random_graph(kind)
    compare(
        run(graph, reduce=reduce), problem(graph, 3, 5, 2, tables), backend=backend,
        dtype=torch.float64, specification=lambda **p: by_node(graph, **p, reduce=reduce),
    )  # fmt: skip
