"""The compiled GPU kernels, executed without a GPU: their PTX in an emulator, against float64.

It shows what the interpreter cannot: that the compiler's own code computes the right thing, with
its layouts, vector loads, shuffles and shared memory.
"""

import pytest
import torch
import triton
import triton.language as tl
from torch.autograd import grad

from ._mode import INTERPRETED, skip_module

if INTERPRETED:
    skip_module(__file__)

from grand_fast import Graph
from grand_fast.kernels.attention_diffusion import gpu as attention_diffusion
from grand_fast.kernels.attention_diffusion import reference as attention_diffusion_reference
from grand_fast.kernels.attention_product import gpu as attention_product
from grand_fast.kernels.attention_product.reference import attention_product_fwd
from grand_fast.kernels.csr_diffusion import gpu as csr_diffusion
from grand_fast.kernels.csr_diffusion import reference as csr_diffusion_reference
from grand_fast.kernels.edge_attention import gpu as edge_attention
from grand_fast.kernels.edge_attention import reference as edge_attention_reference
from grand_fast.kernels.edge_softmax import gpu as edge_softmax
from grand_fast.kernels.edge_softmax.reference import edge_softmax_fwd
from grand_fast.kernels.error_ratio import gpu as error_ratio
from grand_fast.kernels.error_ratio import reference as error_ratio_reference
from grand_fast.kernels.gpu import diffusion, pieces
from grand_fast.kernels.spmm import gpu as spmm
from grand_fast.kernels.spmm.reference import spmm_fwd
from grand_fast.kernels.stage_update import gpu as stage_update
from grand_fast.kernels.stage_update.reference import stage_update_fwd
from grand_fast.kernels.weighting import Weighting
from grand_fast.testing import assert_close
from tests.gpu.ptx.emulator import emulated

from ._compiled import (
    PIECE_EDGES,
    cut_views,
    diffusion_in_float64,
    make_graph,
    make_inputs,
    make_scales,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("nan_filled")]

CASES = [
    ((128, 4, 128), torch.float32, "sm_80"),  # d, H, d_att
    ((128, 4, 128), torch.float32, "sm_90"),
    ((128, 4, 128), torch.bfloat16, "sm_80"),
    ((128, 4, 128), torch.float16, "sm_80"),
    ((64, 8, 128), torch.float32, "sm_80"),
    ((80, 8, 128), torch.bfloat16, "sm_90"),  # narrow loads of x
    ((162, 2, 32), torch.float32, "sm_80"),
    ((256, 4, 128), torch.float32, "sm_80"),
    ((5, 3, 21), torch.float32, "sm_80"),
    ((5, 3, 21), torch.bfloat16, "sm_90"),
    ((600, 1, 1024), torch.float32, "sm_80"),  # several warps share a row
]
IDS = [f"{'-'.join(map(str, shape))}-{str(dtype)[6:]}-{arch}" for shape, dtype, arch in CASES]
each_case = pytest.mark.parametrize(("shape", "dtype", "arch"), CASES, ids=IDS)


def _leaves(**tensors):
    return {name: t.double().requires_grad_() for name, t in tensors.items()}


def _check(got, want):
    for name, value in want.items():
        assert_close(name, got[name], value)


@each_case
def test_attention_diffusion(shape, dtype, arch):
    graph = make_graph()
    csr, csr_t = cut_views(graph)
    t, scales = make_inputs(shape, dtype, graph), make_scales(shape[0])
    x, q, k, df, alpha = t["x"], t["q"], t["k"], t["df"], scales["alpha"]
    got = {}
    with emulated(arch) as launches:
        got["f"], got["norm"] = attention_diffusion.attention_diffusion_fwd(
            x, q, k, **scales, x0=t["x0"], csr=csr
        )
        grads = attention_diffusion.attention_diffusion_bwd(
            df, x, q, k=k, norm=got["norm"], alpha=alpha, csr=csr, csr_t=csr_t,
            needs_dqk=True, needs_dalpha=False,
        )  # fmt: skip
        got |= {"dx": grads.dx, "dq": grads.dq, "dk": grads.dk}
    assert any("join" in launch.kernel for launch in launches)
    leaves = _leaves(x=x, q=q, k=k)
    constants = {name: value.double() for name, value in scales.items()}
    f, norm = attention_diffusion_reference.attention_diffusion_fwd(
        **leaves, **constants, x0=t["x0"].double(), csr=graph.csr()
    )
    dx, dq, dk = grad(f, list(leaves.values()), df.double())
    _check(got, {"f": f, "norm": norm, "dx": dx, "dq": dq, "dk": dk})


@each_case
def test_csr_diffusion(shape, dtype, arch):
    graph = make_graph()
    csr, csr_t = cut_views(graph)
    t, scales = make_inputs(shape, dtype, graph), make_scales(shape[0])
    x, df, a = t["x"], t["df"], torch.rand(graph.num_edges).to(dtype)
    got = {}
    with emulated(arch):
        got["f"] = csr_diffusion.csr_diffusion_fwd(x, a, **scales, x0=t["x0"], csr=csr)
        got["dx"], got["da"], _ = csr_diffusion.csr_diffusion_bwd(
            df, x, a, alpha=scales["alpha"], csr=csr, csr_t=csr_t,
            needs_dx=True, needs_da=True, needs_dalpha=False,
        )  # fmt: skip
    leaves = _leaves(x=x, a=a)
    constants = {name: value.double() for name, value in scales.items()}
    f = csr_diffusion_reference.csr_diffusion_fwd(
        **leaves, **constants, x0=t["x0"].double(), csr=graph.csr()
    )
    dx, da = grad(f, list(leaves.values()), df.double())
    _check(got, {"f": f, "dx": dx, "da": da})


@each_case
def test_edge_attention(shape, dtype, arch):
    """By turns one weight a head, and their mean."""
    graph, mean_heads = make_graph(), CASES.index((shape, dtype, arch)) % 2 == 1
    csr, csr_t = cut_views(graph)
    t = make_inputs(shape, dtype, graph)
    q, k = t["q"], t["k"]
    got = {}
    with emulated(arch):
        got["a"], got["norm"] = edge_attention.edge_attention_fwd(
            q, k, mean_heads=mean_heads, csr=csr
        )
        da = torch.randn(got["a"].shape).to(dtype)
        grads = edge_attention.edge_attention_bwd(da, q, k, norm=got["norm"], csr=csr, csr_t=csr_t)
        got |= {"dq": grads.dq, "dk": grads.dk}
    leaves = _leaves(q=q, k=k)
    a, norm = edge_attention_reference.edge_attention_fwd(
        **leaves, mean_heads=mean_heads, csr=graph.csr()
    )
    dq, dk = grad(a, list(leaves.values()), da.double())
    _check(got, {"a": a, "norm": norm, "dq": dq, "dk": dk})


_BY_SENDER = Weighting(0.5, normalize="sender")


@pytest.mark.parametrize(
    ("sizes", "mean_heads", "weighting", "dtype", "arch"),
    [((4, 64, 16), True, None, torch.float32, "sm_80"),  # H, d, d_k: heads in groups
     ((1, 130, 3), False, _BY_SENDER, torch.bfloat16, "sm_90")],  # a head in chunks
    ids=str,
)  # fmt: skip
def test_attention_product(sizes, mean_heads, weighting, dtype, arch):
    graph, (h, d, d_k) = make_graph((0, 13, 34, 3), busy=0.9), sizes
    csr, csr_t = cut_views(graph)
    n, e = graph.num_nodes, graph.num_edges
    shapes = {"v": (n, h, d), "q": (n, h, d_k), "k": (n, h, d_k), "edge_key": (e, h, d_k)}
    shapes |= {"edge_value": (e, h, d), "dy": (n, d) if mean_heads else (n, h, d)}
    t = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    dy, v, q, k = (t.pop(name) for name in ("dy", "v", "q", "k"))
    of = {"weighting": weighting, "csr": csr, "csr_t": csr_t, **t}
    got = {}
    with emulated(arch) as launches:
        got["y"], got["norm"] = attention_product.attention_product_fwd(
            v, q, k, mean_heads=mean_heads, **of
        )
        grads = attention_product.attention_product_bwd(
            dy, v, q, k=k, norm=got["norm"], **of, needs_dv=True, needs_dqk=True,
            needs_dedge_key=True, needs_dedge_value=True,
        )  # fmt: skip
    assert any("join" in launch.kernel for launch in launches)
    leaves = _leaves(v=v, q=q, k=k, **t)
    y, norm = attention_product_fwd(
        **leaves, weighting=weighting, mean_heads=mean_heads, csr=graph.csr()
    )
    want = grad(y, list(leaves.values()), dy.double())
    _check(got, {"y": y, "norm": norm})
    _check(grads._asdict(), {f"d{name}": dx for name, dx in zip(leaves, want, strict=True)})


@pytest.mark.parametrize(
    ("heads", "vectors", "d", "dtype"),
    [(1, 1, 162, torch.float32), (4, 4, 32, torch.float32), (3, 3, 5, torch.bfloat16),
     (2, 1, 64, torch.float32), (3, 1, 6, torch.bfloat16)],
    ids=str,
)  # fmt: skip
def test_spmm(heads, vectors, d, dtype):
    graph = make_graph()
    csr, csr_t = cut_views(graph)
    n, e = graph.num_nodes, graph.num_edges
    shapes = ((n, vectors, d), (e, heads), (n, heads, d))
    x, a, dy = (torch.randn(shape).to(dtype) for shape in shapes)
    got = {}
    with emulated("sm_90"):
        got["y"] = spmm.spmm_fwd(x, a, csr=csr)
        got["dx"], got["da"] = spmm.spmm_bwd(
            dy, x, a, csr=csr, csr_t=csr_t, needs_dx=True, needs_da=True
        )
    leaves = _leaves(x=x, a=a)
    y = spmm_fwd(**leaves, csr=graph.csr())
    dx, da = grad(y, list(leaves.values()), dy.double())
    _check(got, {"y": y, "dx": dx, "da": da})


@pytest.mark.parametrize(
    ("heads", "normalizer", "normalize", "dtype"),
    [(1, "softmax", "sender", torch.float32), (3, "squareplus", "receiver", torch.float32),
     (40, "softmax", "receiver", torch.float32), (8, "squareplus", "sender", torch.bfloat16)],
    ids=str,
)  # fmt: skip
def test_edge_softmax(heads, normalizer, normalize, dtype):
    graph, weighting = make_graph(), Weighting(1.0, normalizer=normalizer, normalize=normalize)
    csr, csr_t = cut_views(graph)
    s, da = (torch.randn(graph.num_edges, heads).to(dtype) for _ in range(2))
    top = s.float().amax() if normalizer == "squareplus" else None
    given = {"weighting": weighting, "top": top, "csr": csr, "csr_t": csr_t}
    got = {}
    with emulated("sm_90"):
        got["a"], got["norm"] = edge_softmax.edge_softmax_fwd(s, **given)
        got["ds"], got["dtop"] = edge_softmax.edge_softmax_bwd(da, s, norm=got["norm"], **given)
    leaves = _leaves(s=s) if top is None else _leaves(s=s, top=top)
    a, norm = edge_softmax_fwd(**leaves, weighting=weighting, csr=graph.csr())
    grads = grad(a, list(leaves.values()), da.double())
    _check(got, {"a": a, "norm": norm} | dict(zip(("ds", "dtop"), grads, strict=False)))


each_type = pytest.mark.parametrize(
    ("dtype", "arch"),
    [(torch.float32, "sm_80"), (torch.bfloat16, "sm_90"), (torch.float16, "sm_80")],
    ids=str,
)


@each_type
def test_stage_update(dtype, arch):
    """Whole programs, and one that is not; all loads of the first are wide."""
    scales = (1.0, -0.5, 2.0, 0.1)
    tensors = [torch.randn(3, 1027).to(dtype) for _ in scales]
    with emulated(arch) as launches:
        y = stage_update.stage_update_fwd(tensors, scales)
        grads = stage_update.stage_update_bwd(y, scales)
    wide = [t.double() for t in tensors]
    assert_close("y", y, stage_update_fwd(wide, scales))
    for scale, got in zip(scales, grads, strict=True):
        assert_close("dy", got, scale * y.double())
    assert [launch.programs for launch in launches] == [4, 4]
    assert all(
        launch.bytes_loaded[16] >= 3 / 4 * launch.bytes_loaded.total() for launch in launches
    )
    assert all(launch.shuffles == launch.barriers == 0 for launch in launches)


@each_type
def test_error_ratio(dtype, arch):
    """Two programs, of which the second has blocks that lie partly and wholly outside."""
    scales, tolerances = (0.5, -1.0, 0.25), {"rtol": 1e-2, "atol": 1e-3}
    tensors = [torch.randn(17, 1027).to(dtype) for _ in range(5)]
    with emulated(arch) as launches:
        got = error_ratio.error_ratio_fwd(tensors[2:], scales, *tensors[:2], **tolerances)
    x, y, *terms = (t.double() for t in tensors)
    assert_close(
        "ratio", got, error_ratio_reference.error_ratio_fwd(terms, scales, x, y, **tolerances)
    )
    assert [launch.programs for launch in launches] == [2]
    assert launches[0].wide_percent >= 90


def test_gradients_by_alpha():
    """The column pass then leaves out alpha, and writes float32."""
    graph, d = make_graph(), 5
    csr, csr_t = cut_views(graph)
    t, scales = make_inputs((d, 3, 21), torch.float32, graph), make_scales(d)
    x, q, k, df, alpha = t["x"], t["q"], t["k"], t["df"], scales["alpha"]
    a = torch.rand(graph.num_edges)
    _, norm = edge_attention_reference.edge_attention_fwd(q, k, mean_heads=True, csr=graph.csr())
    views = {"csr": csr, "csr_t": csr_t}
    with emulated("sm_80"):
        by_attention = attention_diffusion.attention_diffusion_bwd(
            df, x, q, k=k, norm=norm, alpha=alpha, **views, needs_dqk=False, needs_dalpha=True
        )
        by_weights = csr_diffusion.csr_diffusion_bwd(
            df, x, a, alpha=alpha, **views, needs_dx=True, needs_da=False, needs_dalpha=True
        )
    nothing = {"beta": None, "x0": None, "csr": graph.csr()}
    leaves = _leaves(x=x, alpha=alpha)
    constants = {name: value.double() for name, value in (("q", q), ("k", k), ("a", a))}
    f = csr_diffusion_reference.csr_diffusion_fwd(a=constants.pop("a"), **leaves, **nothing)
    dx, dalpha = grad(f, list(leaves.values()), df.double())
    _check({"dx": by_weights[0], "dalpha": by_weights[2]}, {"dx": dx, "dalpha": dalpha})
    f, _ = attention_diffusion_reference.attention_diffusion_fwd(**constants, **leaves, **nothing)
    dx, dalpha = grad(f, list(leaves.values()), df.double())
    _check({"dx": by_attention.dx, "dalpha": by_attention.dalpha}, {"dx": dx, "dalpha": dalpha})


def test_dalpha_of_many_rows():
    """More rows than one program sums up, and more than it loads at a time."""
    n, d = 2 * diffusion._ROWS + 3, 33
    nodes = torch.arange(n)
    graph = Graph.from_edge_index(torch.stack([nodes, (nodes + 1) % n]), n)
    csr, csr_t = (
        view._replace(work=pieces.cut(view.rowptr))
        for view in (graph.csr(), graph.csr(transposed=True))
    )
    x, df, a, alpha = torch.randn(n, d), torch.randn(n, d), torch.rand(n), torch.rand(d)
    with emulated("sm_80"):
        dx, _, dalpha = csr_diffusion.csr_diffusion_bwd(
            df, x, a, alpha=alpha, csr=csr, csr_t=csr_t,
            needs_dx=True, needs_da=False, needs_dalpha=True,
        )  # fmt: skip
    leaves = _leaves(x=x, alpha=alpha)
    f = csr_diffusion_reference.csr_diffusion_fwd(
        a=a.double(), **leaves, beta=None, x0=None, csr=graph.csr()
    )
    want = grad(f, list(leaves.values()), df.double())
    _check({"dx": dx, "dalpha": dalpha}, dict(zip(("dx", "dalpha"), want, strict=True)))


@pytest.mark.parametrize("d", (64, 6))
def test_keys_that_are_the_state(d):
    """One head, the projection of the keys absorbed: each row is gathered once for both."""
    graph = make_graph()
    csr, _ = cut_views(graph)
    t, scales = make_inputs((d, 1, d), torch.float32, graph), make_scales(d)
    x, q = t["x"], t["q"]
    got, loaded = [], []
    for k in (x[:, None], x[:, None].clone()):
        with emulated("sm_90") as launches:
            f, norm = attention_diffusion.attention_diffusion_fwd(
                x, q, k, **scales, x0=t["x0"], csr=csr
            )
        got.append({"f": f, "norm": norm})
        loaded.append(sum(launch.sectors_loaded for launch in launches))
    want = diffusion_in_float64(x, q, x[:, None], **scales, x0=t["x0"], graph=graph)
    for values in got:
        _check(values, dict(zip(("f", "norm"), want, strict=True)))
    assert loaded[0] < loaded[1]


def test_pieces_of_the_real_length():
    """A hub's row, cut at the length that users get."""
    n, degree, shape = 6, 700, (64, 4, 64)
    edges = torch.randint(0, n, (2, degree + 3 * n))
    edges[1, :degree] = 1
    graph = Graph.from_edge_index(edges, n)
    csr = graph.csr()
    csr = csr._replace(work=pieces.cut(csr.rowptr))
    assert csr.work.n_split == 3
    t, scales = make_inputs(shape, torch.float32, graph), make_scales(shape[0])
    x, q, k, x0 = t["x"], t["q"], t["k"], t["x0"]
    with emulated("sm_80"):
        f, _ = attention_diffusion.attention_diffusion_fwd(x, q, k, **scales, x0=x0, csr=csr)
    assert_close("f", f, diffusion_in_float64(x, q, k, **scales, x0=x0, graph=graph)[0])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_strided_rows_at_odd_addresses_and_long_indices(dtype):
    """The compiler may use wide loads only where a launch's own pointers and strides allow it."""
    graph, (d, h, d_k) = make_graph(), (64, 4, 16)
    csr = graph.csr()
    rowptr, col = csr.rowptr.long(), csr.col.long()
    csr = csr._replace(rowptr=rowptr, col=col, work=pieces.cut(rowptr, piece_edges=PIECE_EDGES))
    n, scales = graph.num_nodes, make_scales(d)
    x = torch.randn(n * (d + 3) + 1).to(dtype)[1:].view(n, d + 3)[:, :d]
    q, k = torch.randn(n, 2, h, d_k).to(dtype).unbind(1)
    with emulated("sm_90"):
        f, _ = attention_diffusion.attention_diffusion_fwd(x, q, k, **scales, x0=x, csr=csr)
    assert_close("f", f, diffusion_in_float64(x, q, k, **scales, x0=x, graph=graph)[0])


def test_bytes_requested_are_those_of_cost():
    """Where no row is reused, which a program does not see; its pieces and sectors add little."""
    n, degree, d = 40, 16, 128
    graph = Graph.from_edge_index(torch.randint(0, n, (2, n * degree)), n)
    csr = graph.csr()
    csr = csr._replace(work=pieces.cut(csr.rowptr))
    x, a, alpha = torch.randn(n, d), torch.rand(graph.num_edges), torch.ones(d)
    with emulated("sm_80") as launches:
        csr_diffusion.csr_diffusion_fwd(x, a, alpha=alpha, beta=None, x0=None, csr=csr)
    (launch,) = launches
    cost = csr_diffusion_reference.cost(n=n, e=graph.num_edges, d=d, element_bytes=4)
    requested = 32 * (launch.sectors_loaded + launch.sectors_stored)
    assert cost.bytes_max <= requested <= 1.25 * cost.bytes_max
    assert launch.sectors_stored == n * d * 4 // 32
    assert launch.barriers == launch.shuffles == 0


@pytest.mark.parametrize("shape", [(128, 4, 128), (64, 8, 128), (64, 1, 64)], ids=str)
def test_nine_tenths_of_the_bytes_come_in_loads_of_128_bits(shape):
    """Of the bytes gathered: rows are long, so that what each loads once hardly counts."""
    n, degree = 12, 100
    graph = Graph.from_edge_index(torch.randint(0, n, (2, n * degree)), n)
    csr, csr_t = (
        view._replace(work=pieces.cut(view.rowptr))
        for view in (graph.csr(), graph.csr(transposed=True))
    )
    t, alpha = make_inputs(shape, torch.float32, graph), torch.ones(shape[0])
    x, q, k = t["x"], t["q"], t["k"]
    with emulated("sm_80") as launches:
        _, norm = attention_diffusion.attention_diffusion_fwd(
            x, q, k, alpha=alpha, beta=None, x0=None, csr=csr
        )
        attention_diffusion.attention_diffusion_bwd(
            t["df"], x, q, k=k, norm=norm, alpha=alpha, csr=csr, csr_t=csr_t,
            needs_dqk=True, needs_dalpha=False,
        )  # fmt: skip
    assert len(launches) == 3
    for launch in launches:
        # norm and Delta are 12 bytes a head and edge, 4 at a time: of eight heads, a tenth
        least = 89 if shape == (64, 8, 128) else 90
        assert launch.wide_percent >= least, f"{launch.kernel}: {launch.bytes_loaded}"


@triton.jit
def _weighted_sum_kernel(y_ptr, tables, n, N_TABLES: tl.constexpr, BLOCK: tl.constexpr):
    """Σ over all tables, each a scale and a pointer to n elements."""
    offs = tl.arange(0, BLOCK)
    x = tl.zeros([BLOCK], tl.float32)
    for t in tl.static_range(N_TABLES):
        x += tables[t][0] * tl.load(tables[t][1] + offs, mask=offs < n, other=0.0)
    tl.store(y_ptr, tl.sum(x, 0))


@pytest.mark.parametrize("arch", ("sm_80", "sm_90"))
def test_tuples_of_arguments_and_four_warps(arch):
    a, b, y = torch.randn(100), torch.randn(100), torch.empty(1)
    with emulated(arch) as launches:
        _weighted_sum_kernel[(1,)](y, ((2.0, a), (-0.5, b)), 100, N_TABLES=2, BLOCK=128)
    assert launches[0].barriers > 0
    assert_close("y", y[0], (2 * a.double() - 0.5 * b.double()).sum())
