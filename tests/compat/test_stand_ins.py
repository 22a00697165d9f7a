"""The parts of torch_sparse and torch_scatter that stand in for them."""

import importlib
import sys
import types

import pytest
import torch

from grand_fast.compat.stand_ins import MODULES, stand_ins
from grand_fast.testing import assert_close
from tests.compat._released import F64

INDEX = torch.tensor([2, 0, 2, 5, 0, 2])
SRC = (
    torch.tensor([3.0, -1, 4, 1, -5, 4], dtype=F64).unsqueeze(1) * torch.tensor([1.0, -2]).double()
)
FILL = {"sum": 0.0, "mean": 0.0, "mul": 1.0, "max": 0.0, "min": 0.0}
DENSE = {
    "sum": lambda rows: rows.sum(0), "mean": lambda rows: rows.mean(0),
    "mul": lambda rows: rows.prod(0), "max": lambda rows: rows.amax(0),
    "min": lambda rows: rows.amin(0),
}  # fmt: skip


@pytest.mark.parametrize("reduce", DENSE)
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_scatter(reduce, dim):
    import torch_scatter

    src = SRC if dim == 0 else SRC.t().contiguous()
    got = torch_scatter.scatter(src, INDEX, dim=dim, dim_size=7, reduce=reduce)
    want = torch.full((7, 2), FILL[reduce], dtype=F64)
    for i in INDEX.unique():
        want[i] = DENSE[reduce](SRC[i == INDEX])
    assert_close(reduce, got, want if dim == 0 else want.t())
    by_name = getattr(torch_scatter, f"scatter_{reduce}")(src, INDEX, dim)
    by_name = by_name[0] if reduce in ("max", "min") else by_name
    assert_close(reduce, by_name, (want[:6] if dim == 0 else want[:6].t()))


def test_where_the_largest_are_and_their_gradient():
    import torch_scatter

    src = SRC[:, 0].clone().requires_grad_()
    largest, place = torch_scatter.scatter_max(src, INDEX, dim_size=7)
    assert place.tolist() == [1, 6, 2, 6, 6, 3, 6]
    assert torch.autograd.grad(largest.sum(), src)[0].tolist() == [0, 1, 1, 1, 0, 0]
    integers = torch_scatter.scatter_min(SRC[:, 0].long(), INDEX)[0]
    assert integers.tolist() == [-5, 0, 3, 0, 0, 1]


def test_sums_of_others_and_into_a_tensor():
    import torch_scatter

    out = torch.ones(7, 2, dtype=F64)
    assert torch_scatter.scatter_add(SRC, INDEX, 0, out) is out and float(out[5, 0]) == 2.0
    p = torch_scatter.scatter_softmax(SRC, INDEX, 0)
    assert_close("p", torch_scatter.scatter_add(p, INDEX, 0)[INDEX], torch.ones(6, 2).double())
    ptr, rows = torch.tensor([0, 2, 2, 6]), SRC
    sums = torch_scatter.segment_csr(rows, ptr)
    assert_close("sums", sums, torch.stack([rows[:2].sum(0), rows[:0].sum(0), rows[2:].sum(0)]))
    assert torch.equal(torch_scatter.gather_csr(sums, ptr), sums[[0, 0, 2, 2, 2, 2]])
    assert torch_scatter.scatter(SRC[:0], INDEX[:0], 0).shape == (0, 2)
    with pytest.raises(ValueError, match="`reduce` must be"):
        torch_scatter.scatter(SRC, INDEX, 0, reduce="median")


def dense(index, value, m, n):
    return torch.zeros(m, n, dtype=F64).index_put(tuple(index), value, accumulate=True)


def test_sparse_matrices():
    import torch_sparse

    index, value = torch.tensor([[1, 0, 1, 2], [0, 3, 0, 1]]), torch.rand(4, dtype=F64)
    a, x = dense(index, value, 3, 4), torch.rand(4, 2, dtype=F64)
    assert_close("A x", torch_sparse.spmm(index, value, 3, 4, x), a @ x)
    assert torch_sparse.spmm(index, value, 3, 4, x[:, 0]).shape == (3, 1)
    found = torch_sparse.coalesce(index, value, 3, 4)
    assert found[0].tolist() == [[0, 1, 2], [3, 0, 1]]
    assert_close("A", dense(*found, 3, 4), a)
    assert torch_sparse.coalesce(index, None, 3, 4)[1] is None
    assert torch_sparse.coalesce(index, value, 3, 4, op="max")[1][1] == value[[0, 2]].max()
    assert_close("At", dense(*torch_sparse.transpose(index, value, 3, 4), 4, 3), a.t())
    b = torch.rand(4, dtype=F64)
    other = index.flip(0)
    product = torch_sparse.spspmm(index, value, other, b, 3, 4, 3, coalesced=True)
    assert_close("A B", dense(*product, 3, 3), a @ dense(other, b, 4, 3))


def test_sparse_tensor():
    import torch_sparse

    index, value = torch.tensor([[2, 0, 1], [1, 3, 0]]), torch.rand(3, dtype=F64)
    a, x = dense(index, value, 3, 4), torch.rand(4, 2, dtype=F64)
    matrix = torch_sparse.SparseTensor(row=index[0], col=index[1], value=value)
    assert matrix.sparse_sizes() == (3, 4) and matrix.nnz() == 3 and matrix.size(1) == 4
    assert_close("A", matrix.to_dense(), a)
    assert_close("At", matrix.t().to_dense(), a.t())
    assert_close("A x", matrix @ x, a @ x)
    rowptr, col, values = matrix.csr()
    again = torch_sparse.SparseTensor(rowptr=rowptr, col=col, value=values, sparse_sizes=(3, 4))
    assert_close("A", again.to_dense(), a)
    ones = torch_sparse.SparseTensor.from_edge_index(index).set_value(None)
    assert ones.to_dense().sum() == 3 and ones.sizes() == [3, 4]
    with pytest.raises(NotImplementedError, match="sums only"):
        matrix.matmul(x, reduce="max")


def test_only_where_the_import_fails(monkeypatch):
    theirs = types.ModuleType("torch_sparse")
    monkeypatch.setitem(sys.modules, "torch_sparse", theirs)
    monkeypatch.delitem(sys.modules, "torch_scatter", raising=False)
    with stand_ins() as reasons:
        assert importlib.import_module("torch_sparse") is theirs
        assert importlib.import_module("torch_scatter") is MODULES["torch_scatter"]
        assert reasons == {"torch_scatter": "it is not installed"}
        import torch_geometric.typing

        assert not torch_geometric.typing.WITH_TORCH_SCATTER
    assert "torch_scatter" not in sys.modules


def test_they_are_found_after_all_there_is_on_the_path(monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "torch_scatter", raising=False)
    (tmp_path / "torch_scatter.py").write_text("MINE = True")
    own = MODULES["torch_scatter"].__spec__
    with stand_ins():
        assert importlib.import_module("torch_scatter") is MODULES["torch_scatter"]
        del sys.modules["torch_scatter"]
        assert importlib.import_module("torch_scatter") is MODULES["torch_scatter"]
        assert MODULES["torch_scatter"].__spec__ is own
        del sys.modules["torch_scatter"]
        monkeypatch.syspath_prepend(tmp_path)
        assert importlib.import_module("torch_scatter").MINE
    assert sys.modules.pop("torch_scatter").MINE


def test_a_module_that_is_broken(monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "torch_scatter", raising=False)
    (tmp_path / "torch_scatter").mkdir()
    (tmp_path / "torch_scatter" / "part.py").write_text("")
    file = tmp_path / "torch_scatter" / "__init__.py"
    file.write_text("import torch_scatter.part\nraise OSError('undefined symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    with stand_ins() as reasons:
        assert reasons["torch_scatter"] == "it cannot be imported: OSError: undefined symbol"
        assert "torch_scatter.part" not in sys.modules
        for _ in range(2):
            assert importlib.import_module("torch_scatter") is MODULES["torch_scatter"]
            del sys.modules["torch_scatter"]


@pytest.mark.parametrize("reduce", ["sum", "mean", "mul", "max", "min"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_a_scatter_into_a_tensor_writes_it(reduce, dtype):
    import torch_scatter

    src, index = torch.tensor([3, 5, 2, 4]).to(dtype), torch.tensor([0, 2, 0, 2])
    out = torch.tensor([4, 7, 1]).to(dtype)
    function = getattr(torch_scatter, f"scatter_{reduce}")
    want = {"sum": [9, 7, 10], "mean": [4.5, 7, 5], "mul": [24, 7, 20], "max": [4, 7, 5],
            "min": [2, 7, 1]}[reduce]  # fmt: skip
    given = function(src, index, -1, out)
    given = given if torch.is_tensor(given) else given[0]
    assert given.data_ptr() == out.data_ptr()
    assert torch.equal(out, torch.tensor(want).to(dtype))
