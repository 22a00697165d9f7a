"""Which kernels the operators launch, with which arguments: nothing runs, so no list goes stale.

Without a GPU the launchers are called on tensors of device `meta`, which have shapes and no memory:
a real graph costs no more than its own arrays.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.core.problem import Shape
from bench.gpu_report.compile import Launch, record
from grand_fast import Graph
from grand_fast.kernels.attention_diffusion import gpu as attention_diffusion
from grand_fast.kernels.attention_product import gpu as attention_product
from grand_fast.kernels.csr import Csr
from grand_fast.kernels.csr_diffusion import gpu as csr_diffusion
from grand_fast.kernels.edge_attention import gpu as edge_attention
from grand_fast.kernels.edge_softmax import gpu as edge_softmax
from grand_fast.kernels.error_ratio import gpu as error_ratio
from grand_fast.kernels.gpu import pieces
from grand_fast.kernels.spmm import gpu as spmm
from grand_fast.kernels.stage_update import gpu as stage_update
from grand_fast.kernels.weighting import Weighting

# Of the family of attentions, those whose kernels have every switch between them
_FAMILY = (
    Weighting(1.0, "exp", normalizer="squareplus", normalize="sender"),
    Weighting(1.0, "leaky_relu", slope=0.2, normalizer="squareplus"),
    Weighting(1.0, "identity", normalize="sender"),
)
_ON_META = partial(torch.empty, device="meta")
_STAGE = (1.0, 0.125, 0.375, -0.5)  # four terms


class Inputs(NamedTuple):
    """Arguments of every launcher; `da` per head, `a` one weight an edge."""

    x: Tensor
    df: Tensor
    q: Tensor
    k: Tensor
    a: Tensor
    da: Tensor
    alpha: Tensor
    norm: Tensor
    csr: Csr
    csr_t: Csr

    @property
    def plain(self) -> dict[str, Any]:
        """What a forward without a source takes beside its tensors."""
        return {"alpha": self.alpha, "beta": None, "x0": None, "csr": self.csr}

    @property
    def views(self) -> dict[str, Csr]:
        """What a backward takes of the graph."""
        return {"csr": self.csr, "csr_t": self.csr_t}


def inputs(
    graph: Graph, shape: Shape, dtype: torch.dtype, *, index: torch.dtype = torch.int32,
    make: Callable[..., Tensor] = _ON_META,
) -> Inputs:  # fmt: skip
    """Their tensors by `make(*sizes, dtype=)`."""
    n, e, h = graph.num_nodes, graph.num_edges, shape.heads
    # one projection gives both, so their rows lie side by side
    q, k = make(n, 2, h, shape.d_k, dtype=dtype).unbind(1)
    return Inputs(
        x=make(n, shape.channels, dtype=dtype),
        df=make(n, shape.channels, dtype=dtype),
        q=q,
        k=k,
        a=make(e, dtype=dtype),
        da=make(e, h, dtype=dtype),
        alpha=make(shape.channels, dtype=torch.float32),
        norm=make(n, 2, h, dtype=torch.float32),
        **views(graph, index=index),
    )


def calls(g: Inputs) -> dict[str, Callable[[], Any]]:
    """The launchers of each operator's forward and backward, without a source, by pass."""
    stage = [g.x] * len(_STAGE)
    softmax: dict[str, Any] = {"weighting": Weighting(1.0), **g.views}
    every = {
        "attention_diffusion forward": lambda: attention_diffusion.attention_diffusion_fwd(
            g.x, g.q, g.k, **g.plain
        ),
        "attention_diffusion forward, absorbed": (
            lambda: attention_diffusion.attention_diffusion_fwd(
                g.x, torch.empty_like(g.x[:, None]), g.x[:, None], **g.plain
            )
        ),
        "attention_diffusion backward": lambda: attention_diffusion.attention_diffusion_bwd(
            g.df, g.x, g.q, k=g.k, norm=g.norm, alpha=g.alpha, **g.views, needs_dqk=True,
            needs_dalpha=False,
        ),
        "csr_diffusion forward": lambda: csr_diffusion.csr_diffusion_fwd(g.x, g.a, **g.plain),
        "csr_diffusion backward": lambda: csr_diffusion.csr_diffusion_bwd(
            g.df, g.x, g.a, alpha=g.alpha, **g.views, needs_dx=True, needs_da=True,
            needs_dalpha=False,
        ),
        "edge_attention forward": lambda: edge_attention.edge_attention_fwd(
            g.q, g.k, mean_heads=False, csr=g.csr
        ),
        "edge_attention backward": lambda: edge_attention.edge_attention_bwd(
            g.da, g.q, g.k, norm=g.norm, **g.views
        ),
        "edge_softmax forward": lambda: edge_softmax.edge_softmax_fwd(g.da, **softmax),
        "edge_softmax backward": lambda: edge_softmax.edge_softmax_bwd(
            g.da, g.da, norm=g.norm, **softmax
        ),
        "spmm forward": lambda: spmm.spmm_fwd(g.q, g.da, csr=g.csr),
        "spmm backward": lambda: spmm.spmm_bwd(
            g.q, g.k, g.da, **g.views, needs_dx=True, needs_da=True
        ),
        "stage_update forward": lambda: stage_update.stage_update_fwd(stage, _STAGE),
        "stage_update backward": lambda: stage_update.stage_update_bwd(g.x, _STAGE),
        "error_ratio forward": lambda: error_ratio.error_ratio_fwd(
            stage, _STAGE, g.x, g.x, rtol=1e-3, atol=1e-6
        ),
    }  # fmt: skip
    if g.q.shape[1] > 1:
        del every["attention_diffusion forward, absorbed"]
    if g.x.shape[1] == g.q[:1].numel():  # heads share the channels of a layer
        v, dy = (t.unflatten(1, g.q.shape[1:]) for t in (g.x, g.df))
        every["attention_product forward"] = lambda: attention_product.attention_product_fwd(
            v, g.q, g.k, mean_heads=False, csr=g.csr
        )
        every["attention_product backward"] = lambda: attention_product.attention_product_bwd(
            dy, v, g.q, k=g.k, norm=g.norm, **g.views, needs_dv=True, needs_dqk=True
        )
    return every


def passes(
    graph: Graph, shape: Shape, dtype: torch.dtype, *, index: torch.dtype = torch.int32
) -> dict[str, list[Launch]]:
    """The launches of all `calls`."""
    every: dict[str, list[Launch]] = {}
    for name, call in calls(inputs(graph, shape, dtype, index=index)).items():
        with record() as every[name]:
            call()
    return every


def every_launch(
    graph: Graph, shape: Shape, dtype: torch.dtype, *, index: torch.dtype = torch.int32
) -> list[Launch]:
    """Those of `passes`, and of every switch that a launcher has."""
    g = inputs(graph, shape, dtype, index=index)
    source = g.plain | {"beta": g.alpha, "x0": g.x, "add": [(2.0, g.x), (0.5, g.x)]}
    field = {"alpha": g.alpha, "x_scale": 0.5, **g.views}
    heads, d_k = g.q.shape[1:]
    dy = g.x.new_empty(graph.num_nodes, heads, shape.channels)
    v = torch.empty_like(dy)
    tables = [g.x.new_empty(graph.num_edges, heads, width) for width in (d_k, shape.channels)]
    with record() as switched:
        csr_diffusion.csr_diffusion_fwd(g.x, g.a, **source)
        csr_diffusion.csr_diffusion_bwd(
            g.x, g.x, g.a, **field, needs_dx=True, needs_da=False, needs_dalpha=True
        )
        edge_attention.edge_attention_fwd(g.q, g.k, mean_heads=True, csr=g.csr)
        edge_attention.edge_attention_bwd(g.a, g.q, g.k, norm=g.norm, **g.views)
        spmm.spmm_fwd(g.x[:, None], g.da, csr=g.csr)
        spmm.spmm_bwd(dy, g.x[:, None], g.da, **g.views, needs_dx=True, needs_da=True)
        product: dict[str, Any] = {"k": g.k, "edge_key": tables[0], "edge_value": tables[1]}
        attention_product.attention_product_fwd(v, g.q, **product, mean_heads=True, csr=g.csr)
        attention_product.attention_product_bwd(
            g.x, v, g.q, **product, norm=g.norm, **g.views, needs_dv=True, needs_dqk=True,
            needs_dedge_key=True, needs_dedge_value=True,
        )  # fmt: skip
        attention_diffusion.attention_diffusion_fwd(g.x, g.q, g.k, **source)
        for needs_dqk, needs_dalpha in ((False, False), (False, True), (True, True)):
            attention_diffusion.attention_diffusion_bwd(
                g.x, g.x, g.q, k=g.k, norm=g.norm, **field, needs_dqk=needs_dqk,
                needs_dalpha=needs_dalpha,
            )  # fmt: skip
    plain = passes(graph, shape, dtype, index=index).values()
    return [launch for launches in plain for launch in launches] + switched


def family(
    graph: Graph, shape: Shape, dtype: torch.dtype, *, prepared: torch.dtype | None = None
) -> list[Launch]:
    """The launches of other weightings: every switch, not every combination.

    prepared: type of q and k, which scores may bring as float32 to a state of a half type.
    """
    g = inputs(graph, shape, dtype)
    q, k = (t.to(prepared or dtype) for t in (g.q, g.k))
    with record() as launches:
        for weighting in _FAMILY:
            needs = weighting.normalizer == "squareplus"
            edge_weight = g.a.to(q.dtype) if needs else None
            edge_attention.edge_attention_top(
                q, k, weighting=weighting, edge_weight=edge_weight, csr=g.csr
            )
            of: dict[str, Any] = {
                "weighting": weighting,
                "top": g.alpha.new_empty(()) if needs else None,
                "edge_weight": edge_weight,
                **g.views,
            }
            back = {"norm": g.norm, "needs_dedge_weight": needs, **of}
            attention_diffusion.attention_diffusion_fwd(g.x, q, k, **g.plain | of)
            attention_diffusion.attention_diffusion_bwd(
                g.x, g.x, q, k=k, alpha=g.alpha, **back, needs_dqk=True, needs_dalpha=False
            )
            given = {name: of[name] for name in ("weighting", "top", "csr", "csr_t")}
            edge_softmax.edge_softmax_fwd(g.da, **given)
            edge_softmax.edge_softmax_bwd(g.da, g.da, norm=g.norm, **given)
            for mean_heads in (False, True):
                edge_attention.edge_attention_fwd(q, k, **of, mean_heads=mean_heads)
            edge_attention.edge_attention_bwd(g.da, q, k, **back)
    return launches


def views(
    graph: Graph, *, index: torch.dtype = torch.int32, piece_edges: int = pieces.PIECE_EDGES
) -> dict[str, Csr]:
    """`A` and `Aᵀ` as the GPU's plan makes them; their arrays stay where the graph is."""
    found = {}
    for name, view in (("csr", graph.csr()), ("csr_t", graph.csr(transposed=True))):
        rowptr, col = view.rowptr.to(index), view.col.to(index)
        slot = None if view.slot is None else view.slot.to(index)
        work = pieces.cut(rowptr, piece_edges=piece_edges)
        found[name] = view._replace(rowptr=rowptr, col=col, slot=slot, work=work)
    return found
