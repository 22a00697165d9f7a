"""Terms whose sums run over the edges: diffusion with given weights, with attention, sharpening."""

from torch import Tensor

from grand_fast.graph import Graph
from grand_fast.nn import AttentionDiffusion
from grand_fast.nn.terms import LinearDiffusion, NonlinearDiffusion
from grand_fast.ops.checks import check_graph, check_tensor, message
from grand_fast.solvers import AbstractLinearTerm, AbstractTerm, Combination, Scale
from grand_fast.solvers.checks import check_scale
from grand_fast.solvers.combination import pair
from grand_fast.solvers.term import AbstractFusedTerm, Constant, Sum


def linear(a: Tensor, graph: Graph, *, alpha: Scale = 1.0) -> AbstractLinearTerm:
    """Diffusion with edge weights that are given.

    `f_i = alpha (Σ_j a_ij x_j − x_i)`

    Args:
        a: edge weights `[E]` in the user's order: `graph.random_walk_weights()`, or
            `gf.ops.edge_attention(q, k, graph, mean_heads=True)`.
        graph: the edges; a node without edges gets `−alpha x_i`.
        alpha: diffusivity scale, a float or a tensor (scalar or `[d]`).

    Returns:
        A linear term: semi_implicit_euler and uniformisation take it, too.

    Differentiable by `a` and `alpha`.
    Reference: GRAND (Chamberlain et al. 2021), equation 2 with constant `A`. ACMP (Wang et al.
    2023) has `a − beta`, below 0 where a node repels another.
    """
    check_graph("terms.linear", graph)
    remedy = "Did you mean its mean over heads, a.mean(1)?" if getattr(a, "ndim", 1) == 2 else ""
    check_tensor(
        "terms.linear", "a", a, letters="[E]", sizes=(graph.num_edges,), graph=graph, remedy=remedy
    )
    check_scale("terms.linear", "alpha", alpha)
    return LinearDiffusion(a, graph, alpha=alpha, edge_order="user")


def attention(layer: AttentionDiffusion, graph: Graph, x0: Tensor | None = None) -> AbstractTerm:
    """Diffusion with the attention of a layer, computed again at each state.

    `f_i = alpha (mean_h Σ_j a^h_ij(x) x_j − x_i) + beta x0_i`

    Args:
        layer: what makes weights of states, its alpha and beta. Projections of another model take
            the places of its own: `layer.query, layer.key = …`, as `AttentionDiffusion` says.
        graph: the edges; a node without edges gets `−alpha x_i + beta x0_i`.
        x0: like the state, with `AttentionDiffusion(source=True)`, and not without.

    Returns:
        A term; semi_implicit_euler takes it as well, with the attention at the start of a step.

    For one solve: a model makes it in its `forward`.
    Differentiable by the layer's parameters, `x0` and, with `reweight`, the edge weights.
    Reference: GRAND (Chamberlain et al. 2021), equations 2, 10 and 13.
    """
    op = "terms.attention"
    if not isinstance(layer, AttentionDiffusion):
        got = type(layer).__name__
        raise TypeError(message(op, "layer", "must be a gf.nn.AttentionDiffusion", got))
    check_graph(op, graph)
    if (layer.scale.beta is None) != (x0 is None):
        got = "None" if x0 is None else "a Tensor"
        expected = "must be given with AttentionDiffusion(source=True), and only then"
        raise ValueError(message(op, "x0", expected, got, "Or add gf.terms.source(x0, beta)."))
    if x0 is not None:
        sizes = (graph.num_nodes, layer.channels)
        check_tensor(op, "x0", x0, letters="[N, channels]", sizes=sizes, graph=graph)
    term = NonlinearDiffusion(layer, graph, None)
    term.source = False
    beta = layer.scale.beta
    return term if beta is None or x0 is None else term + Constant(x0).scaled(beta)


def blurring_sharpening(diffusion: AbstractTerm, beta: Scale = 1.0) -> AbstractTerm:
    """Diffusion, which blurs, and what sharpens: A of what that has changed, taken away.

    `f = alpha (A x − x) + beta (A x − A² x)`, and the source of the diffusion

    Args:
        diffusion: a term with a matrix, from `linear` or `attention`. Its alpha is the first scale.
        beta: of the sharpening, a float or a tensor (scalar or `[d]`).

    Returns:
        A term of two passes over the edges; attention is computed once for both.

    Differentiable by what the diffusion is, and by `beta`.
    Reference: GREAD (Choi et al. 2023), GREAD-BS.
    """
    op = "terms.blurring_sharpening"
    parts = Sum([(1.0, (), diffusion)]).parts
    if sum(type(g).freeze is not AbstractTerm.freeze for _, _, g in parts) != 1:
        got = type(diffusion).__name__
        remedy = "Use gf.terms.linear or gf.terms.attention."
        raise TypeError(message(op, "diffusion", "must be a term with one matrix", got, remedy))
    check_scale(op, "beta", beta)
    return BlurringSharpening(diffusion, beta)


class BlurringSharpening(AbstractFusedTerm):
    """`f = alpha (A x − x) + beta (A x − A² x)` with the A of a term at each state."""

    def __init__(self, diffusion: AbstractTerm, beta: Scale) -> None:
        self.diffusion, self.beta = diffusion, beta

    def tensors(self) -> tuple[Tensor, ...]:
        """Those of the diffusion, and beta if it is one."""
        return (*self.diffusion.tensors(), *([self.beta] if isinstance(self.beta, Tensor) else []))

    def planned(self, x: Tensor) -> AbstractTerm:
        """The same of the planned diffusion."""
        return BlurringSharpening(self.diffusion.planned(x), self.beta)

    def axpy(self, t: float, x: Tensor, base: Combination, tau: float) -> Tensor:
        """`base + tau · f`, with `d = A x − x` as `alpha d − beta A d`."""
        held = self.diffusion.freeze(t, x)
        d = held.product(x, 1.0, [(-1.0, x)])
        pairs = [*base.terms, pair(tau * held.alpha, d)]
        if held.beta is not None and held.source is not None:
            pairs.append(pair(tau * held.beta, held.source))
        return held.product(d, -tau * self.beta, pairs)
