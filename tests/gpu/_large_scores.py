"""Attention whose scores are large: inputs, runs, and how far a result may be from float64."""

import math
import os
from dataclasses import replace

import torch
from torch.autograd import grad

from grand_fast import Graph
from grand_fast.kernels.attention_diffusion import gpu as attention_diffusion
from grand_fast.kernels.attention_diffusion import reference as attention_diffusion_reference
from grand_fast.kernels.edge_attention import gpu as edge_attention
from grand_fast.kernels.edge_attention import reference as edge_attention_reference
from grand_fast.kernels.gpu import pieces
from grand_fast.kernels.weighting import Weighting
from grand_fast.testing import TOLERANCE

PIECE_EDGES = 4  # instead of 256: rows of several pieces stay cheap
# Of receivers and senders: no edges, one, some, a piece, and hubs of two and three pieces.
RECEIVER = (1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 4, 4, 6, 6, 6, 6, 6)
SENDER = (2, 0, 1, 2, 3, 3, 5, 3, 3, 6, 3, 0, 3, 3, 5, 3, 2, 6, 3, 0)
NODES = 7

SCORES = (30.0, 300.0, 3e4, 1e5)  # the largest of a case, in absolute value
_DOT = Weighting(0.5)
_SQUAREPLUS = Weighting(0.5, normalizer="squareplus")
WEIGHTINGS = {  # whether edges have weights; H, d_k
    "paper": (_DOT, False, (4, 7)),
    # Tiles of forward and backward sum its 33 columns in different orders.
    "paper, one head": (_DOT, True, (1, 33)),
    "sender": (replace(_DOT, normalize="sender"), True, (3, 5)),
    "sender, one head": (replace(_DOT, normalize="sender"), False, (1, 4)),
    "squareplus": (_SQUAREPLUS, False, (3, 5)),
    "squareplus, sender": (replace(_SQUAREPLUS, normalize="sender"), True, (4, 2)),
    "leaky_relu": (Weighting(1.0, "leaky_relu", slope=0.2), False, (4, 1)),
    "exp": (Weighting(0.5, "exp", normalize="sender"), True, (3, 4)),
}


class Case:
    """Inputs of one weighting on a graph with hubs and empty rows, whose largest score is given.

    Its views are cut into short pieces. `run_…` call the launchers, in the interpreter or under
    `emulated`, `plain_…` the references in any dtype; both return results by name.
    """

    def __init__(self, weighting, has_weight, heads, largest, *, d=6, dtype=torch.float32):
        self.graph = Graph.from_edge_index(torch.tensor([SENDER, RECEIVER]), NODES)
        self.csr, self.csr_t = (
            view._replace(work=pieces.cut(view.rowptr, piece_edges=PIECE_EDGES))
            for view in (self.graph.csr(), self.graph.csr(transposed=True))
        )
        e = self.graph.num_edges
        self.receiver = torch.repeat_interleave(torch.arange(NODES), self.graph.rowptr.diff())
        self.sender = self.graph.col.long()
        self.weighting, self.dtype, self.top = weighting, dtype, None
        self.group = self.receiver if weighting.normalize == "receiver" else self.sender
        self.x, self.df = (torch.randn(NODES, d).to(dtype) for _ in range(2))
        self.alpha = 0.5 + torch.rand(d)
        self.edge_weight = None
        if has_weight:
            w = 2 * torch.rand(e) - 1
            self.edge_weight = torch.where(torch.rand(e) < 0.6, 1.0, w).to(dtype)
        self.da = torch.randn(e, heads[0]).to(dtype)
        self.q, self.k = (t.to(dtype) for t in _vectors(weighting, heads, largest))
        self.largest = float(self.scores().abs().max())

    def scores(self, *, of=None, edge_weight=True):
        """[E, H] in float64."""
        w = self.edge_weight if edge_weight else None
        return edge_attention_reference.edge_scores(
            self.q.double(), self.k.double(), weighting=of or self.weighting,
            receiver=self.receiver, sender=self.sender,
            edge_weight=None if w is None else w.double(),
        )  # fmt: skip

    def dots(self):
        """<q, k> of each edge times the scale, [E, H]."""
        return self.scores(of=replace(self.weighting, function="identity"), edge_weight=False)

    def _of(self, dtype=None, *names):
        """Arguments that reference and launchers both take."""
        names = ("q", "k", "edge_weight", *names)
        given = {n: getattr(self, n) for n in names if getattr(self, n) is not None}
        given = {n: t.to(dtype or t.dtype) for n, t in given.items()}
        if self.top is not None:
            given["top"] = self.top.to(dtype or torch.float32)
        return given | {"weighting": self.weighting}

    def _views(self):
        if self.weighting.normalizer == "squareplus":
            self.top = edge_attention.edge_attention_top(
                self.q, self.k, weighting=self.weighting, edge_weight=self.edge_weight, csr=self.csr
            ).max()
        return {"csr": self.csr, "csr_t": self.csr_t}

    def _da(self, *, mean_heads):
        return self.da.float().mean(1).to(self.dtype) if mean_heads else self.da

    def run_edge_attention(self, *, mean_heads=False):
        """The weights, what normalised them, and every gradient."""
        of = self._views() | self._of()
        q, k = of.pop("q"), of.pop("k")
        a, norm = edge_attention.edge_attention_fwd(q, k, **of, mean_heads=mean_heads)
        grads = edge_attention.edge_attention_bwd(
            self._da(mean_heads=mean_heads), q, k, **of, norm=norm,
            needs_dedge_weight=self.edge_weight is not None,
        )  # fmt: skip
        return {"a": a, "norm": norm} | _named(grads)

    def run_attention_diffusion(self, *, needs_dqk=True):
        """The field, what normalised the weights, and every gradient, or `dx` alone."""
        of = self._views() | self._of()
        f, norm = attention_diffusion.attention_diffusion_fwd(
            self.x, **of, alpha=self.alpha, beta=None, x0=None
        )
        grads = attention_diffusion.attention_diffusion_bwd(
            self.df, self.x, **of, norm=norm, alpha=self.alpha, needs_dqk=needs_dqk,
            needs_dalpha=False, needs_dedge_weight=needs_dqk and self.edge_weight is not None,
        )  # fmt: skip
        return {"f": f, "norm": norm} | _named(grads)

    def plain_edge_attention(self, dtype, *, mean_heads=False):
        """The same by autograd."""
        of = _leaves(self._of(dtype))
        a, _ = edge_attention_reference.edge_attention_fwd(
            **of, mean_heads=mean_heads, csr=self.graph.csr()
        )
        return {"a": a.detach()} | _gradients(a, of, self._da(mean_heads=mean_heads))

    def plain_attention_diffusion(self, dtype):
        """The same by autograd."""
        of = _leaves(self._of(dtype, "x"))
        f, _ = attention_diffusion_reference.attention_diffusion_fwd(
            **of, alpha=self.alpha.to(dtype), beta=None, x0=None, csr=self.graph.csr()
        )
        return {"f": f.detach()} | _gradients(f, of, self.df)

    def check_edge_attention(self, got, *, mean_heads=False):
        """Every result; and the weights of each group sum to 1."""
        plain, want = (
            self.plain_edge_attention(dtype, mean_heads=mean_heads)
            for dtype in (torch.float32, torch.float64)
        )
        t = self._da(mean_heads=mean_heads).double()
        if mean_heads:
            t = t[:, None].expand_as(self.da) / self.da.shape[1]
        self._check(got, plain, want, self.sizes(t))
        assert_sums_to_1(got["a"], self.group)

    def check_attention_diffusion(self, got):
        """Every result."""
        plain, want = map(self.plain_attention_diffusion, (torch.float32, torch.float64))
        self._check(got, plain, want, self.sizes(self.weight_gradients()))

    def _check(self, got, plain, want, sizes):
        # exp passes a rounding of its argument on, times the score
        steep = math.log(self.largest) if self.weighting.function == "exp" else 1.0
        for name in want.keys() & got.keys():
            assert_near(name, got[name], plain[name], want[name], steep * self.largest, sizes[name])

    def weight_gradients(self):
        """Of a diffusion by its weights, [E, H] in float64."""
        t = (self.alpha * self.df.double())[self.receiver] * self.x.double()[self.sender]
        return (t.sum(1, keepdim=True) / self.q.shape[1]).expand(self.da.shape)

    def sizes(self, t):
        """The largest element of each result, if its terms were summed by absolute value.

        t: gradients by the weights [E, H]. What cancels in a sum leaves its roundings.
        """
        weighting, w = self.weighting, 1.0
        if self.edge_weight is not None:
            w = self.edge_weight.double().abs()[:, None]
        a, _ = edge_attention_reference.edge_attention_fwd(
            **self._of(torch.float64), mean_heads=False, csr=self.graph.csr()
        )
        phi, rho = self.scores(edge_weight=False).abs(), 1.0
        slope = torch.where(self.dots() > 0, 1.0, weighting.slope)
        derivative = {"identity": 1.0, "exp": phi, "leaky_relu": slope}[weighting.function]
        if self.top is not None:
            rho = 1 / torch.sqrt((self.scores() - self.top.double()) ** 2 + 4)
        delta = _summed(self.group, a * t.abs())
        ds = a * rho * (t.abs() + delta[self.group])
        du = (weighting.scale * w * derivative * ds)[..., None]
        mean = a.mean(1, keepdim=True)
        q, k = self.q.double().abs(), self.k.double().abs()
        x, df = (self.alpha * v.double().abs() for v in (self.x, self.df))
        sizes = {
            "a": a,
            "f": x + _summed(self.receiver, mean * x[self.sender]),
            "dx": df + _summed(self.sender, mean * df[self.receiver]),
            "dq": _summed(self.receiver, du * k[self.sender]),
            "dk": _summed(self.sender, du * q[self.receiver]),
            "dedge_weight": (phi * ds).sum(1),
            "dtop": ds.sum(),
        }
        return {name: float(size.max()) for name, size in sizes.items()}


def _vectors(weighting, heads, largest):
    """q and k of scores up to `largest`.

    Those of most nodes are nearly one vector: their scores, large as they are, differ by a few, and
    many edges of a group have weight. The others fall behind or lead by far.
    """
    center = torch.nn.functional.normalize(torch.randn(heads), dim=1)
    is_far = (torch.arange(NODES) % 3 == 2)[:, None, None]
    dot = math.log(largest) if weighting.function == "exp" else largest
    vectors = []
    for _ in "qk":
        near = center + 3 * torch.randn(NODES, *heads) / largest
        far = torch.nn.functional.normalize(torch.randn(NODES, *heads), dim=2)
        vectors.append(math.sqrt(dot / weighting.scale) * torch.where(is_far, 0.9 * far, near))
    return vectors


def assert_sums_to_1(a, group):
    """Weights of edges [E] or [E, H], over each node in `group`, each rounded by itself."""
    total = _summed(group, a.double())[group]
    # Triton's interpreter cuts bfloat16 off instead of rounding it.
    is_cut_off = a.dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1"
    tolerance = max(1e-5, torch.finfo(a.dtype).eps / (1 if is_cut_off else 2))
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=tolerance)


def assert_near(name, got, plain, want, largest, size):
    """Compare a result of the kernels, of PyTorch in float32, and in float64.

    The kernels may be twice as far from float64 as PyTorch; and by one rounding of the largest
    score, which a weight passes on; and by the roundings of terms of the size `size`.
    """
    assert got.isfinite().all(), name
    error, of_plain = (float((result.double() - want).abs().max()) for result in (got, plain))
    rounding = torch.finfo(torch.float32).eps * largest * float(want.abs().max())
    floor = TOLERANCE[got.dtype] * size
    assert error <= 2 * of_plain + rounding + floor, (
        f"{name}: error {error:.2e} exceeds twice PyTorch's {of_plain:.2e}, a rounding of scores "
        f"{rounding:.2e} and those of terms {floor:.2e}"
    )


def _summed(at, terms):
    return torch.zeros(NODES, *terms.shape[1:], dtype=terms.dtype).index_add(0, at, terms)


def _named(grads):
    return {name: t for name, t in grads._asdict().items() if t is not None}


def _leaves(given):
    return {n: t.requires_grad_() if torch.is_tensor(t) else t for n, t in given.items()}


def _gradients(out, given, upstream):
    wanted = {name: leaf for name, leaf in given.items() if torch.is_tensor(leaf)}
    grads = grad(out, list(wanted.values()), upstream.to(out.dtype))
    return {f"d{name}": g for name, g in zip(wanted, grads, strict=True)}
