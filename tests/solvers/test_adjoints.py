"""Gradients of a solve: direct, checkpointed, within a memory limit, by the continuous adjoint."""

import math
from contextlib import nullcontext
from importlib import import_module
from math import comb

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import grand_fast as gf
from grand_fast.nn import AttentionDiffusion
from grand_fast.ops.calls import recompute, recompute_limit
from grand_fast.solvers import ContinuousOptions, SolveError
from grand_fast.solvers.gradients.memory_limit import first_part
from grand_fast.testing import assert_close, random_graph

METHODS = ("rk4", "dopri5", "bosh3")


def field():
    torch.manual_seed(1)
    linear = torch.nn.Linear(4, 4).double()

    class Field(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = linear

        def forward(self, t, x):
            return torch.tanh(self.linear(x)) - x

    return Field()


def gradients(f, x0, T=3.2, times=None, **options):
    options = {"rtol": 1e-4, "atol": 1e-6, **options}
    solution = gf.integrate(f, x0, T, step_size=0.1, times=times, **options)
    assert solution.status is gf.Status.SUCCESS
    out = solution.x if times is None else solution.xs
    weights = torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view_as(out)
    loss = (out.square() * weights).sum()
    return solution, torch.autograd.grad(loss, [x0, *f.parameters()])


@pytest.mark.parametrize("times", [None, [0.0, 0.8, 3.2]], ids=["end", "times"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("limit", [None, 80_000], ids=["checkpoint", "limited"])
def test_checkpointed_gradients_equal_direct(method, times, limit):
    f, x0 = field(), torch.randn(50, 4, dtype=torch.float64, requires_grad=True)
    _, want = gradients(f, x0, times=times, method=method, adjoint="direct")
    solution, got = gradients(
        f, x0, times=times, method=method, adjoint="checkpoint", memory_limit=limit
    )
    for name, g, w in zip(("x0", "weight", "bias"), got, want, strict=True):
        assert_close(name, g, w, tolerance=1e-12)
    assert solution.nfe_backward > 0


def test_more_memory_means_fewer_evaluations():
    f, x0 = field(), torch.randn(50, 4, dtype=torch.float64, requires_grad=True)
    work = [
        gradients(f, x0, T=6.4, method="rk4", memory_limit=limit)[0].nfe_backward
        for limit in (40_000, 48_000, 60_000, 10_000_000)
    ]
    assert work == sorted(work, reverse=True) and len(set(work)) == 4
    assert work[-1] == 64 * 4  # each step once more, and no oftener


def test_a_limit_too_small_names_the_least():
    f, x0 = field(), torch.randn(50, 4, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match=r"`memory_limit` must be at least (\d+) bytes") as caught:
        gradients(f, x0, method="rk4", memory_limit=100)
    least = int(str(caught.value).split("at least ")[1].split()[0])
    gradients(f, x0, method="rk4", memory_limit=least)


@pytest.mark.parametrize("method", [*METHODS, "adaptive_heun", "explicit_adams"])
@pytest.mark.parametrize(
    "times", [[0.05, 0.15, 0.17, 3.17], [0.01, 0.02]], ids=["many", "first step"]
)
def test_a_limit_where_steps_pass_the_times(method, times):
    f, x0 = field(), torch.randn(50, 4, dtype=torch.float64, requires_grad=True)
    options = {"T": 3.2, "times": times, "method": method, "end": "interp"}
    want, want_grads = gradients(f, x0, adjoint="direct", **options)
    got, got_grads = gradients(f, x0, adjoint="checkpoint", memory_limit=200_000, **options)
    assert_close("xs", got.xs, want.xs, tolerance=1e-12)
    assert got.stats == want.stats
    for name, g, w in zip(("x0", "weight", "bias"), got_grads, want_grads, strict=True):
        assert_close(name, g, w, tolerance=1e-12)


def kept_bytes(solve):
    """Of the tensors that autograd keeps of a solve, each counted once."""
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        solution = solve()
    del solution
    return sum(kept.values())


def least_limit(solve):
    """What the message names, once one byte is too few."""
    with pytest.raises(ValueError, match=r"`memory_limit` must be at least (\d+) bytes") as caught:
        solve(1)
    return int(str(caught.value).split("at least ")[1].split()[0])


def test_output_times_count_within_the_limit():
    f, x0 = field(), torch.randn(50, 4, dtype=torch.float64, requires_grad=True)
    times = [0.2 * k for k in range(1, 17)]

    def solve(limit, times=times):
        return gf.integrate(f, x0, 3.2, step_size=0.1, times=times, memory_limit=limit)

    once, least = least_limit(lambda limit: solve(limit, None)), least_limit(solve)
    # Sixteen parts: fifteen states between them, and one within each instead of one in all
    assert least == once + (15 + 15) * x0.numel() * 8
    assert kept_bytes(lambda: solve(least)) <= least
    _, got = gradients(f, x0, times=times, method="rk4", memory_limit=least)
    _, want = gradients(f, x0, times=times, method="rk4", adjoint="direct")
    for name, g, w in zip(("x0", "weight", "bias"), got, want, strict=True):
        assert_close(name, g, w, tolerance=1e-12)


@pytest.mark.parametrize("make", [gf.solvers.ExplicitAdams, gf.solvers.ImplicitAdams])
def test_the_history_counts_within_the_limit(make):
    f, x0 = field(), torch.randn(50, 4, dtype=torch.float64, requires_grad=True)

    def solve(limit):
        return gf.integrate(
            f, x0, 3.0, method=make(max_order=12), step_size=0.006, memory_limit=limit
        )

    least = least_limit(solve)
    for limit in (least, 2 * least):
        assert kept_bytes(lambda limit=limit: solve(limit)) <= limit


# Of x' = −sin x, in states: what travels between steps, and what a step saves beside it
WORKING_SETS = {
    "euler": (1, 0),  # its own state is all that the sine saves
    "rk4": (1, 3),
    "dopri5": (2, 6),  # with the slope; the state after the step has the last one
    "bosh3": (2, 3),
    "adaptive_heun": (2, 1),
    "explicit_adams": (4, 3),  # three slopes; a step from where the history was as long starts it
    "implicit_adams": (4, 3),
}
# Beside what a step saves: its result, gradients, what operators work with
BESIDE = 13


@pytest.mark.parametrize("method", WORKING_SETS)
def test_the_working_set_of_a_step_counts_within_the_limit(method):
    x0 = torch.randn(50, 40, dtype=torch.float64, requires_grad=True)

    def solve(limit):
        return gf.integrate(
            lambda t, x: -x.sin(), x0, 1.0, method=method, step_size=0.1, rtol=1e-2, atol=1e-2,
            memory_limit=limit,
        )  # fmt: skip

    state = x0.numel() * x0.element_size()
    travels, saved = WORKING_SETS[method]
    spacing = 8 if "adams" in method else 0  # of its history, which travels as well
    least = least_limit(solve)
    # One state beside the first is kept of so few steps
    assert least == (BESIDE + 1) * (travels * state + spacing) + saved * state
    solve(least).x.sum().backward()
    with Live(x0) as live:
        solve(least).x.sum().backward()
    assert (travels + saved) * state < live.most <= least


class Live(TorchDispatchMode):
    """The most bytes that were alive at a time of what was made in here."""

    def __init__(self, *known):
        super().__init__()
        self.most, self.live = 0, {}
        self.known = {t.untyped_storage().data_ptr() for t in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for t in tree_leaves(found):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self.known:
                storage = t.untyped_storage()
                self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.live = {k: held for k, held in self.live.items() if not held[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.live.values()))
        return found


@pytest.mark.parametrize("method", ["dopri5", "explicit_adams"])
def test_slopes_of_steps_that_run_again_are_let_go_within_a_limit(method):
    x0 = torch.randn(50, 4, dtype=torch.float64, requires_grad=True)
    slopes = []

    def f(t, x):
        slopes.append(StorageWeakRef((y := -x.sin()).untyped_storage()))
        return y

    def solve(limit):
        return gf.integrate(
            f, x0, 4.0, method=method, step_size=0.1, rtol=1e-9, atol=1e-9, memory_limit=limit
        )

    solution = solve(least_limit(solve))
    assert solution.stats.accepted > 30
    # Three slopes at most with each state that is kept, of which there is one beside the first
    assert sum(not slope.expired() for slope in slopes) <= 10
    solution.x.sum().backward()


@pytest.mark.parametrize(("steps", "limit"), [(3000, 10**6), (51, "least"), (1000, "least")])
def test_as_many_steps_as_one_likes_within_a_limit(steps, limit):
    x0 = torch.ones(3, dtype=torch.float64, requires_grad=True)

    def solve(limit):
        return gf.integrate(
            lambda t, x: -x, x0, 1.0, method="euler", step_size=1 / steps, memory_limit=limit
        )

    solution = solve(least_limit(solve) if limit == "least" else limit)
    (dx,) = torch.autograd.grad(solution.x.sum(), x0)
    assert_close("dx0", dx, torch.full_like(x0, (1 - 1 / steps) ** steps), tolerance=1e-12)
    assert solution.nfe_backward <= 51 * steps


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_a_solve_that_gives_up_within_a_limit_is_differentiable(method):
    f, x0 = field(), torch.randn(50, 4, dtype=torch.float64, requires_grad=True)
    found = []
    for limit in (None, 10**6):
        solution = gf.integrate(
            f, x0, 3.2, method=method, step_size=0.1, rtol=1e-6, atol=1e-6, max_steps=7,
            times=[0.1, 3.2], memory_limit=limit,
        )  # fmt: skip
        assert solution.status is gf.Status.MAX_STEPS and 0.1 < solution.t < 3.2
        assert solution.xs[1].isnan().all()
        loss = solution.x.square().sum() + solution.xs[0].sum()
        found.append((solution.t, torch.autograd.grad(loss, [x0, *f.parameters()])))
    assert found[0][0] == found[1][0]
    for got, want in zip(found[1][1], found[0][1], strict=True):
        assert_close("gradient", got, want, tolerance=1e-12)


@pytest.mark.parametrize("places", [1, 2, 3, 5, 40])
@pytest.mark.parametrize("n", [2, 3, 7, 20, 64])
def test_the_schedule_runs_no_step_more_often_than_it_must(n, places):
    def runs(n, places):  # of the step that runs most often, beside its own differentiation
        if n == 1:
            return 1
        k = first_part(n, places)
        assert 1 <= k < n
        return max(1 + runs(k, places), runs(n - k, max(places - 1, 1)))

    if places == 1:  # each step from the start: as many runs as steps
        assert runs(n, places) == n
        return
    least = 1
    while comb(places + least, places) < n:
        least += 1
    assert runs(n, places) <= least + 1


@pytest.mark.parametrize("method", METHODS)
def test_the_continuous_adjoint_converges_to_the_exact_gradient(method):
    f, x0 = field(), torch.randn(20, 4, dtype=torch.float64, requires_grad=True)
    tight = {"rtol": 1e-7, "atol": 1e-9}
    _, want = gradients(f, x0, times=[0.75, 3.2], method="dopri5", adjoint="direct", **tight)
    options = ContinuousOptions(method="dopri5", **tight)
    solution, got = gradients(
        f, x0, times=[0.75, 3.2], method=method, adjoint="continuous", adjoint_options=options,
        end="interp", **tight,
    )  # fmt: skip
    for g, w in zip(got, want, strict=True):
        assert_close("gradient", g, w, tolerance=1e-3 if method == "rk4" else 1e-5)
    assert solution.nfe_backward > solution.stats.nfe


def test_the_continuous_adjoint_reaches_all_that_a_diffusion_holds():
    graph = random_graph("random", 12)
    layer = gf.nn.AttentionDiffusion(6, heads=2, source=True).double()
    x0 = torch.randn(12, 6, dtype=torch.float64, requires_grad=True)
    from grand_fast.nn.terms import NonlinearDiffusion

    torch.nn.init.constant_(layer.scale.beta, 0.3)
    wanted = [x0, *layer.parameters()]
    grads = []
    for adjoint in ("direct", "continuous"):
        term = NonlinearDiffusion(layer, graph, x0)
        x = gf.integrate(term, x0, 2.0, method="dopri5", rtol=1e-9, atol=1e-11, adjoint=adjoint).x
        grads.append(torch.autograd.grad(x.square().sum(), wanted))
    for name, exact, got in zip(["x0", *dict(layer.named_parameters())], *grads, strict=True):
        if name == "key.bias":  # cancels in the softmax
            assert float(got.abs().max()) < 1e-12
        else:
            assert_close(name, got, exact, tolerance=1e-6)


def test_a_function_must_name_its_tensors_for_the_continuous_adjoint():
    w = torch.ones(3, requires_grad=True)
    x0 = torch.ones(3)
    with pytest.raises(NotImplementedError, match="'continuous' needs the tensors"):
        gf.integrate(lambda t, x: -w * x, x0, 1.0, adjoint="continuous")
    options = ContinuousOptions(params=[w])
    x = gf.integrate(
        lambda t, x: -w * x, x0, 1.0, step_size=0.1, adjoint="continuous", adjoint_options=options
    ).x
    (dw,) = torch.autograd.grad(x.sum(), w)
    assert_close("dw", dw, -torch.exp(torch.tensor(-1.0)).expand(3), tolerance=1e-3)


def test_a_field_that_nothing_differentiates_has_a_continuous_adjoint():
    x0 = torch.ones(3, requires_grad=True)
    options = ContinuousOptions(params=())
    x = gf.integrate(
        lambda t, x: torch.ones_like(x), x0, 1.0, adjoint="continuous", adjoint_options=options
    ).x
    (dx,) = torch.autograd.grad(x.sum(), x0)
    assert_close("dx0", dx, torch.ones(3))


def test_a_continuous_adjoint_that_fails_says_where():
    x0 = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    options = ContinuousOptions(method="dopri5", params=())
    x = gf.integrate(  # √x has no slope at 0
        lambda t, x: x.sqrt(), x0, 2.0, adjoint="continuous", adjoint_options=options
    ).x
    with pytest.raises(SolveError, match="'continuous': NON_FINITE at t = 2: .*'checkpoint'"):
        x.sum().backward()


@pytest.mark.parametrize(("options", "text"), [
    ({"method": "rk9"}, "`adjoint_options.method` must be one of euler.*got 'rk9'"),
    ({"method": "uniformisation"}, "`adjoint_options.method` must be one of euler"),
    ({"step_size": -1.0}, "`adjoint_options.step_size`.*above 0, got -1"),
])  # fmt: skip
def test_bad_options_of_the_continuous_adjoint(options, text):
    options = ContinuousOptions(params=(), **options)
    with pytest.raises(ValueError, match=text):  # before backward
        gf.integrate(
            lambda t, x: -x, torch.ones(3), 1.0, adjoint="continuous", adjoint_options=options
        )


@pytest.mark.parametrize("limit", [None, 80_000], ids=["checkpoint", "limited"])
def test_steps_that_run_again_keep_no_more_than_they_must(limit):
    f, seen = field(), []

    def told(t, x):
        seen.append(recompute_limit() < math.inf)
        return f(t, x)

    x0 = torch.randn(50, 4, dtype=torch.float64, requires_grad=True)
    options = {"method": "rk4", "step_size": 0.1, "adjoint": "checkpoint", "memory_limit": limit}
    gf.integrate(told, x0, 6.4, **options).x.sum().backward()
    backward = seen[-64 * 4 :]
    assert len(seen) > len(backward) and all(backward) and recompute_limit() == math.inf


def test_recompute_blocks_keep_no_projections(monkeypatch):
    operator = import_module("grand_fast.ops._projected_attention")
    monkeypatch.setattr(operator, "_ALWAYS_KEPT", 0)
    layer = AttentionDiffusion(4, 256, 2, alpha=1.0)
    graph, x = random_graph("loops", 60), torch.randn(60, 4)
    sizes = []

    def pack(t):
        sizes.append(t.untyped_storage().nbytes())
        return t

    largest = []
    for block in (nullcontext, recompute):
        sizes.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), block():
            layer(x, graph)
        largest.append(max(sizes))
    projections, weight = (4 * 2 * 256 * n for n in (60, 4))
    assert largest == [projections, weight]


@pytest.mark.parametrize(("share", "is_kept"), [(0.9, False), (1.0, True)])
def test_recompute_blocks_keep_projections_that_are_small_beside_the_state(share, is_kept):
    layer = AttentionDiffusion(8, 4, 2, alpha=1.0)
    graph, x = random_graph("loops", 60), torch.randn(60, 8)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t), recompute(share):
        layer(x, graph)
    assert is_kept == any(t.shape == (60, 8) and t is not x and t.stride(1) for t in saved)
