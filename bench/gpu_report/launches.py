"""Which kernels the operators launch, with which arguments: nothing runs, so no list goes stale.

The launchers are called on tensors of device `meta`, which have shapes and no memory: a real graph
costs no more than its own arrays.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.core.problem import Shape
from bench.gpu_report.compile import Launch, record
from grand_fast import Graph
from grand_fast.kernels.attention_diffusion import gpu as attention_diffusion
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
_STAGE = (1.0, 0.125, 0.375, -0.5)  # four terms


class _Inputs(NamedTuple):
    """Arguments of every launcher; `da` per head, `a` one weight an edge."""

    x: Tensor
    q: Tensor
    k: Tensor
    a: Tensor
    da: Tensor
    alpha: Tensor
    norm: Tensor
    csr: Csr
    csr_t: Csr


def passes(
    graph: Graph, shape: Shape, dtype: torch.dtype, *, index: torch.dtype = torch.int32
) -> dict[str, list[Launch]]:
    """The launches of each operator's forward and backward, without a source, by pass."""
    g = _inputs(graph, shape, dtype, index)
    plain: dict[str, Any] = {"alpha": g.alpha, "beta": None, "x0": None, "csr": g.csr}
    views: dict[str, Any] = {"csr": g.csr, "csr_t": g.csr_t}
    every: dict[str, list[Launch]] = {}
    with record() as every["attention_diffusion forward"]:
        attention_diffusion.attention_diffusion_fwd(g.x, g.q, g.k, **plain)
    if shape.heads == 1:
        with record() as every["attention_diffusion forward, absorbed"]:
            attention_diffusion.attention_diffusion_fwd(
                g.x, g.x.new_empty(g.x[:, None].shape), g.x[:, None], **plain
            )
    with record() as every["attention_diffusion backward"]:
        attention_diffusion.attention_diffusion_bwd(
            g.x, g.x, g.q, k=g.k, norm=g.norm, alpha=g.alpha, **views, needs_dqk=True,
            needs_dalpha=False,
        )  # fmt: skip
    with record() as every["csr_diffusion forward"]:
        csr_diffusion.csr_diffusion_fwd(g.x, g.a, **plain)
    with record() as every["csr_diffusion backward"]:
        csr_diffusion.csr_diffusion_bwd(
            g.x, g.x, g.a, alpha=g.alpha, **views, needs_dx=True, needs_da=True, needs_dalpha=False
        )
    with record() as every["edge_attention forward"]:
        edge_attention.edge_attention_fwd(g.q, g.k, mean_heads=False, csr=g.csr)
    with record() as every["edge_attention backward"]:
        edge_attention.edge_attention_bwd(g.da, g.q, g.k, norm=g.norm, **views)
    softmax: dict[str, Any] = {"weighting": Weighting(1.0), **views}
    with record() as every["edge_softmax forward"]:
        edge_softmax.edge_softmax_fwd(g.da, **softmax)
    with record() as every["edge_softmax backward"]:
        edge_softmax.edge_softmax_bwd(g.da, g.da, norm=g.norm, **softmax)
    with record() as every["spmm forward"]:
        spmm.spmm_fwd(g.q, g.da, csr=g.csr)
    with record() as every["spmm backward"]:
        spmm.spmm_bwd(g.q, g.k, g.da, **views, needs_dx=True, needs_da=True)
    with record() as every["stage_update forward"]:
        stage_update.stage_update_fwd([g.x] * len(_STAGE), _STAGE)
    with record() as every["stage_update backward"]:
        stage_update.stage_update_bwd(g.x, _STAGE)
    with record() as every["error_ratio forward"]:
        error_ratio.error_ratio_fwd([g.x] * len(_STAGE), _STAGE, g.x, g.x, rtol=1e-3, atol=1e-6)
    return every


def every_launch(
    graph: Graph, shape: Shape, dtype: torch.dtype, *, index: torch.dtype = torch.int32
) -> list[Launch]:
    """Those of `passes`, and of every switch that a launcher has."""
    g = _inputs(graph, shape, dtype, index)
    source: dict[str, Any] = {"alpha": g.alpha, "beta": g.alpha, "x0": g.x, "csr": g.csr}
    source["add"] = [(2.0, g.x), (0.5, g.x)]
    views: dict[str, Any] = {"csr": g.csr, "csr_t": g.csr_t}
    field = {"alpha": g.alpha, "x_scale": 0.5, **views}
    with record() as switched:
        csr_diffusion.csr_diffusion_fwd(g.x, g.a, **source)
        csr_diffusion.csr_diffusion_bwd(
            g.x, g.x, g.a, **field, needs_dx=True, needs_da=False, needs_dalpha=True
        )
        edge_attention.edge_attention_fwd(g.q, g.k, mean_heads=True, csr=g.csr)
        edge_attention.edge_attention_bwd(g.a, g.q, g.k, norm=g.norm, **views)
        spmm.spmm_fwd(g.x[:, None], g.da, csr=g.csr)
        spmm.spmm_bwd(
            g.x[:, None].expand(-1, shape.heads, -1).contiguous(), g.x[:, None], g.da, **views,
            needs_dx=True, needs_da=True,
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
    g = _inputs(graph, shape, dtype, torch.int32)
    q, k = (t.to(prepared or dtype) for t in (g.q, g.k))
    views: dict[str, Any] = {"csr": g.csr, "csr_t": g.csr_t}
    with record() as launches:
        for weighting in _FAMILY:
            is_squareplus = weighting.normalizer == "squareplus"
            of: dict[str, Any] = {
                "weighting": weighting,
                "top": g.alpha.new_empty(()) if is_squareplus else None,
                "edge_weight": g.a.to(q.dtype) if is_squareplus else None,
            }
            edge_attention.edge_attention_top(
                q, k, weighting=weighting, edge_weight=of["edge_weight"], csr=g.csr
            )
            attention_diffusion.attention_diffusion_fwd(
                g.x, q, k, **of, alpha=g.alpha, beta=None, x0=None, **views
            )
            attention_diffusion.attention_diffusion_bwd(
                g.x, g.x, q, k=k, norm=g.norm, **of, alpha=g.alpha, **views, needs_dqk=True,
                needs_dalpha=False, needs_dedge_weight=is_squareplus,
            )  # fmt: skip
            s = {"weighting": weighting, "top": of["top"], **views}
            edge_softmax.edge_softmax_fwd(g.da, **s)
            edge_softmax.edge_softmax_bwd(g.da, g.da, norm=g.norm, **s)
            for mean_heads in (False, True):
                edge_attention.edge_attention_fwd(q, k, **of, mean_heads=mean_heads, **views)
            edge_attention.edge_attention_bwd(
                g.da, q, k, norm=g.norm, **of, **views, needs_dedge_weight=is_squareplus
            )
    return launches


def _inputs(graph: Graph, shape: Shape, dtype: torch.dtype, index: torch.dtype) -> _Inputs:
    n, e, h = graph.num_nodes, graph.num_edges, shape.heads

    def empty(*sizes: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    # one projection gives both, so their rows lie side by side
    q, k = empty(n, 2, h, shape.d_k).unbind(1)
    return _Inputs(
        x=empty(n, shape.channels),
        q=q,
        k=k,
        a=empty(e),
        da=empty(e, h),
        alpha=empty(shape.channels, dtype=torch.float32),
        norm=empty(n, 2, h, dtype=torch.float32),
        csr=_view(graph, index, transposed=False),
        csr_t=_view(graph, index, transposed=True),
    )


def _view(graph: Graph, index: torch.dtype, *, transposed: bool) -> Csr:
    """As the GPU's plan makes it; its index arrays stay here, where they can be counted."""
    view = graph.csr(transposed=transposed)
    rowptr, col = view.rowptr.to(index), view.col.to(index)
    slot = None if view.slot is None else view.slot.to(index)
    return view._replace(rowptr=rowptr, col=col, slot=slot, work=pieces.cut(rowptr))
