"""Graphs and inputs for the compiled kernels: every kind of row, and few of them."""

import torch

from grand_fast import Graph
from grand_fast.kernels.attention_diffusion.reference import attention_diffusion_fwd
from grand_fast.kernels.gpu import pieces

PIECE_EDGES = 16  # instead of 256: rows of several pieces stay cheap
# No edges, one, less than a turn of 4 or 8 edges, a turn, several, a piece, two and three pieces.
DEGREES = (0, 1, 3, 4, 0, 0, 8, 13, 16, 17, 33, 5, 0)
BUSY, MUTE = 2, (0, 5, 11)  # nodes that send to many and to none


def make_graph(degrees=DEGREES, busy=0.35):
    """Rows of every length, in A and in Aᵀ; edges repeated, and loops."""
    g = torch.Generator().manual_seed(0)
    n, e = len(degrees), sum(degrees)
    receiver = torch.repeat_interleave(torch.arange(n), torch.tensor(degrees))
    talkative = torch.tensor([node for node in range(n) if node not in MUTE])
    sender = talkative[torch.randint(0, len(talkative), (e,), generator=g)]
    sender[torch.rand(e, generator=g) < busy] = BUSY
    return Graph.from_edge_index(torch.stack([sender, receiver]), n)


def cut_views(graph):
    """The CSR of A and of Aᵀ, rows of both cut into pieces."""
    views = [graph.csr(transposed=transposed) for transposed in (False, True)]
    assert all(int(view.rowptr.diff().max()) > 2 * PIECE_EDGES for view in views)
    return [v._replace(work=pieces.cut(v.rowptr, piece_edges=PIECE_EDGES)) for v in views]


def make_inputs(shape, dtype, graph):
    """Tables of a shape (d, H, d_att); q and k side by side, as one projection gives them."""
    d, h, d_att = shape
    n = graph.num_nodes
    x, x0, df = (torch.randn(n, d).to(dtype) for _ in range(3))
    q, k = torch.randn(n, 2, h, d_att // h).to(dtype).unbind(1)
    return {"x": x, "q": q, "k": k, "x0": x0, "df": df}


def diffusion_in_float64(x, q, k, *, graph, **scales):
    """`f` and `norm` of the reference."""
    wide = {name: t.double() for name, t in {"x": x, "q": q, "k": k, **scales}.items()}
    return attention_diffusion_fwd(**wide, csr=graph.csr())


def make_scales(d):
    """`alpha` and `beta`, by name."""
    return {"alpha": 0.5 + torch.rand(d), "beta": torch.randn(d)}
