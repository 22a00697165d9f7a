"""Attention whose scores are large: inputs, runs, and how far a result may be from float64."""

import math
from dataclasses import replace

import torch
from torch.autograd import grad

from grand_fast import Graph
from grand_fast.kernels import _triton
from grand_fast.kernels._weighting import Weighting
from grand_fast.kernels.attention_diffusion import gpu as attention_diffusion
from grand_fast.kernels.attention_diffusion import reference as attention_diffusion_reference
from grand_fast.kernels.edge_attention import gpu as edge_attention
from grand_fast.kernels.edge_attention import reference as edge_attention_reference
from grand_fast.testing import TOLERANCE

PIECE_EDGES = 4  # instead of 256: rows of several pieces stay cheap
# Of receivers and senders: no edges, one, some, a piece, and hubs of two and three pieces.
RECEIVER = (1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 4, 4, 6, 6, 6, 6, 6)
SENDER = (2, 0, 1, 2, 3, 3, 5, 3, 3, 6, 3, 0, 3, 3, 5, 3, 2, 6, 3, 0)
NODES = 7

SCORES = (30.0, 300.0, 3e4, 1e5)  # the largest of a case, in absolute value
WEIGHTINGS = {  # whether edges have weights; H, d_k
    "paper": (Weighting(0.5), False, (4, 7)),
    "paper, one head": (Weighting(0.5), True, (1, 4)),
    "sender": (Weighting(0.5, normalize="sender"), True, (3, 5)),
    "sender, one head": (Weighting(0.5, normalize="sender"), False, (1, 33)),
    "squareplus": (Weighting(0.5, normalizer="squareplus"), False, (3, 5)),
    "squareplus, sender": (
        Weighting(0.5, normalizer="squareplus", normalize="sender"), True, (4, 2),
    ),
    "leaky_relu": (Weighting(1.0, "leaky_relu", slope=0.2), False, (4, 1)),
    "exp": (Weighting(0.5, "exp", normalize="sender"), True, (3, 4)),
}  # fmt: skip


class Case:
    """Inputs on a graph of rows of every length, hubs among them, whose largest score is `largest`.

    Launchers get views cut into short pieces: run them in the interpreter or under `emulated`.
    """

    def __init__(self, weighting, has_weight, heads, largest, *, d=6):
        edges = torch.tensor([SENDER, RECEIVER])
        self.graph, self.weighting = Graph.from_edge_index(edges, NODES), weighting
        self.csr, self.csr_t = (
            view._replace(work=_triton.cut(view.rowptr, piece_edges=PIECE_EDGES))
            for view in (self.graph.csr(), self.graph.csr(transposed=True))
        )
        n, e = self.graph.num_nodes, self.graph.num_edges
        self.receiver = torch.repeat_interleave(torch.arange(n), self.graph.rowptr.diff())
        self.sender = self.graph.col.long()
        self.x, self.df, self.alpha = torch.randn(n, d), torch.randn(n, d), 0.5 + torch.rand(d)
        self.q, self.k = torch.randn(n, *heads), torch.randn(n, *heads)
        self.edge_weight = torch.randn(e) if has_weight else None
        self.da = torch.randn(e, heads[0])
        self.top = None
        if weighting.function == "exp":
            u = self.scores(replace(weighting, function="identity"), edge_weight=None)
            factor = math.log(largest) / float(u.max())
        else:
            factor = largest / float(self.scores(weighting).abs().max())
        self.q, self.k = (math.sqrt(factor) * t for t in (self.q, self.k))
        self.largest = float(self.scores(weighting).abs().max())

    def scores(self, weighting, **given):
        """[E, H], in float64."""
        w = given.get("edge_weight", self.edge_weight)
        return edge_attention_reference.edge_scores(
            self.q.double(), self.k.double(), weighting=weighting, receiver=self.receiver,
            sender=self.sender, edge_weight=None if w is None else w.double(),
        )  # fmt: skip

    @property
    def group(self):
        """Of each edge, the node over whose edges it is normalised."""
        return self.receiver if self.weighting.normalize == "receiver" else self.sender

    def _given(self, dtype=torch.float32, *names):
        tensors = {name: getattr(self, name) for name in ("q", "k", "edge_weight", "top", *names)}
        return {name: None if t is None else t.to(dtype) for name, t in tensors.items()}

    def find_top(self):
        """Of squareplus, by a kernel too."""
        if self.weighting.normalizer == "squareplus":
            self.top = edge_attention.edge_attention_top(
                self.q, self.k, weighting=self.weighting, edge_weight=self.edge_weight, csr=self.csr
            ).max()

    def run_edge_attention(self, *, mean_heads=False):
        """The weights, what normalised them, and every gradient."""
        self.find_top()
        of = {**self._given(), "weighting": self.weighting, "csr": self.csr, "csr_t": self.csr_t}
        q, k = of.pop("q"), of.pop("k")
        a, norm = edge_attention.edge_attention_fwd(q, k, **of, mean_heads=mean_heads)
        da = self.da.mean(1) if mean_heads else self.da
        grads = edge_attention.edge_attention_bwd(
            da, q, k, **of, norm=norm, needs_dedge_weight=self.edge_weight is not None
        )
        return {"a": a, "norm": norm} | _named(grads)

    def run_attention_diffusion(self, *, needs_dqk=True):
        """The field, what normalised the weights, and every gradient."""
        self.find_top()
        of = {**self._given(), "weighting": self.weighting, "csr": self.csr, "csr_t": self.csr_t}
        f, norm = attention_diffusion.attention_diffusion_fwd(
            self.x, **of, alpha=self.alpha, beta=None, x0=None
        )
        grads = attention_diffusion.attention_diffusion_bwd(
            self.df, self.x, **of, norm=norm, alpha=self.alpha, needs_dqk=needs_dqk,
            needs_dalpha=False, needs_dedge_weight=needs_dqk and self.edge_weight is not None,
        )  # fmt: skip
        return {"f": f, "norm": norm} | _named(grads)

    def plain_edge_attention(self, dtype, *, mean_heads=False):
        """The same in PyTorch; of norm only what each dtype can be compared by."""
        leaves = self._leaves(dtype)
        a, _ = edge_attention_reference.edge_attention_fwd(
            **leaves, weighting=self.weighting, mean_heads=mean_heads, csr=self.graph.csr()
        )
        da = self.da.mean(1) if mean_heads else self.da
        return {"a": a.detach()} | _gradients(a, leaves, da)

    def plain_attention_diffusion(self, dtype):
        leaves = self._leaves(dtype, "x")
        f, _ = attention_diffusion_reference.attention_diffusion_fwd(
            **leaves, alpha=self.alpha.to(dtype), beta=None, x0=None, weighting=self.weighting,
            csr=self.graph.csr(),
        )  # fmt: skip
        return {"f": f.detach()} | _gradients(f, leaves, self.df)

    def _leaves(self, dtype, *names):
        given = self._given(dtype, *names).items()
        return {name: None if t is None else t.requires_grad_() for name, t in given}

    def weights(self):
        """[E, H], in float64."""
        a, _ = edge_attention_reference.edge_attention_fwd(
            **self._given(torch.float64), weighting=self.weighting, mean_heads=False,
            csr=self.graph.csr(),
        )  # fmt: skip
        return a

    def sizes(self, t):
        """The largest element of each result, were its terms summed by their absolute values.

        t: gradients by the weights [E, H]. Roundings are to be seen against that.
        """
        weighting, a, t = self.weighting, self.weights(), t.double().abs()
        n, h = self.q.shape[:2]
        u = self.scores(replace(weighting, function="identity"), edge_weight=None)
        w = (
            torch.ones(len(u), 1).double()
            if self.edge_weight is None
            else self.edge_weight[:, None]
        )
        phi = self.scores(weighting, edge_weight=None)
        slope = torch.where(u > 0, 1.0, weighting.slope)
        derivative = {"identity": 1.0, "exp": phi, "leaky_relu": slope}[weighting.function]
        rho = 1.0
        if self.top is not None:
            rho = 1 / torch.sqrt((self.scores(weighting) - self.top.double()) ** 2 + 4)
        delta = torch.zeros(n, h).double().index_add(0, self.group, a * t)[self.group]
        ds = a * rho * (t + delta)
        du = (weighting.scale * ds * derivative * w).abs()[..., None]
        mean = a.mean(1)[:, None]

        def summed(at, terms):
            total = torch.zeros(n, *terms.shape[1:]).double().index_add(0, at, terms.double())
            return float(total.abs().max())

        of_x, of_df = (self.alpha * v.abs() for v in (self.x, self.df))
        return {
            "a": 1.0,
            "f": float(of_x.max()) + summed(self.receiver, mean * of_x[self.sender]),
            "dx": float(of_df.max()) + summed(self.sender, mean * of_df[self.receiver]),
            "dq": summed(self.receiver, du * self.k[self.sender].abs()),
            "dk": summed(self.sender, du * self.q[self.receiver].abs()),
            "dedge_weight": float((phi.abs() * ds).sum(1).max()),
            "dtop": float(ds.sum()),
        }

    def check(self, got, plain, want, sizes):
        """Compare results: those of the kernels, of PyTorch in float32, and in float64.

        The kernels may be twice as far from float64 as PyTorch in float32, and by one rounding of
        the largest score, which a weight passes on, and by roundings of what is summed.
        """
        for name, value in want.items():
            assert got[name].isfinite().all(), name
            error, of_plain = (
                float((result[name].double() - value).abs().max()) for result in (got, plain)
            )
            rounding = torch.finfo(torch.float32).eps * self.largest * float(value.abs().max())
            allowed = 2 * of_plain + rounding + TOLERANCE[torch.float32] * sizes[name]
            assert error <= allowed, (
                f"{name}: error {error:.2e} exceeds {allowed:.2e}; "
                f"PyTorch's {of_plain:.2e}, a rounding of scores {rounding:.2e}"
            )

    def check_edge_attention(self, got, *, mean_heads=False):
        """Every result; weights of each group sum to 1."""
        dtypes = (torch.float32, torch.float64)
        plain, want = (self.plain_edge_attention(t, mean_heads=mean_heads) for t in dtypes)
        t = self.da
        if mean_heads:  # a mean of gradients, of which each head has an H-th part
            t = (t.mean(1, keepdim=True) / t.shape[1]).expand_as(t)
        self.check(got, plain, want, self.sizes(t))
        total = torch.zeros(self.graph.num_nodes, *got["a"].shape[1:])
        total = total.index_add(0, self.group, got["a"])[self.group]
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-5)

    def check_attention_diffusion(self, got):
        """Every result."""
        plain, want = map(self.plain_attention_diffusion, (torch.float32, torch.float64))
        t = ((self.alpha * self.df)[self.receiver] * self.x[self.sender]).sum(1, keepdim=True)
        h = self.q.shape[1]
        self.check(
            got, plain, {n: v for n, v in want.items() if n in got}, self.sizes(t.expand(-1, h) / h)
        )


def _named(grads):
    return {name: t for name, t in grads._asdict().items() if t is not None}


def _gradients(out, leaves, upstream):
    wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    grads = grad(out, list(wanted.values()), upstream.to(out.dtype))
    return {f"d{name}": g for name, g in zip(wanted, grads, strict=True)}
