import weakref

import pytest
import torch

import grand_fast as gf
from grand_fast.solvers import METHODS, AbstractTerm, ContinuousOptions
from grand_fast.testing import assert_close


@pytest.mark.parametrize(
    ("T", "step_size", "steps"),
    [(1.0, None, 1), (1.0, 1.0, 1), (1.0, 0.1, 10), (0.3, 0.1, 3), (1.1, 0.1, 11), (2.5, 1.0, 3),
     (0.5, 1.0, 1), (0.0, 0.1, 0), (18.2948, 1.0, 19)],
)  # fmt: skip
def test_steps_end_exactly_at_the_end_time(T, step_size, steps):
    seen = []

    def f(t, x):
        seen.append(t)
        return torch.ones_like(x)

    x0 = torch.zeros(1, dtype=torch.float64)
    solution = gf.integrate(f, x0, T, method="euler", step_size=step_size)
    assert solution.stats == gf.Stats(nfe=steps, accepted=steps, rejected=0)
    assert len(seen) == steps
    assert_close("x(T)", solution.x, torch.full((1,), T, dtype=torch.float64), tolerance=1e-15)


# Those that a plain function is enough for
GENERAL = [name for name, make in METHODS.items() if not make(1e-6, 1e-6).wants_matrix]


@pytest.mark.parametrize("method", GENERAL)
def test_checkpoint_gradients_equal_direct(method):
    w = torch.nn.Linear(4, 4).double()
    x0 = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    grads = []
    for adjoint in ("direct", "checkpoint"):
        solution = gf.integrate(
            lambda t, x: torch.tanh(w(x)) - x, x0, 2.3, method=method, step_size=0.5,
            adjoint=adjoint, rtol=1e-5, atol=1e-5,
        )  # fmt: skip
        grads.append(torch.autograd.grad(solution.x.square().sum(), [x0, *w.parameters()]))
    for direct, checkpointed in zip(*grads, strict=True):
        assert_close("gradient", checkpointed, direct, tolerance=1e-14)


def test_checkpoint_keeps_one_state_a_step():
    a = torch.randn(20, 20)
    steps, kept = 6, {}

    for adjoint in ("direct", "checkpoint"):
        saved = {}

        def pack(t, saved=saved):
            saved[t.untyped_storage().data_ptr()] = t.numel()
            return t

        x0 = torch.randn(20, 8, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            gf.integrate(
                lambda t, x: torch.tanh(a @ x), x0, float(steps), step_size=1.0, adjoint=adjoint
            )
        kept[adjoint] = sum(saved.values()) / x0.numel()
    assert kept["checkpoint"] <= steps
    assert kept["direct"] > 3 * steps


def test_a_term_may_fuse_its_update():
    class Fused(AbstractTerm):
        calls = 0

        def vf(self, t, x):
            raise AssertionError("the solver must call axpy")

        def axpy(self, t, x, base, tau):
            self.calls += 1
            return base.evaluate() - tau * x

    term = Fused()
    x0 = torch.ones(3, dtype=torch.float64)
    got = gf.integrate(term, x0, 1.0, step_size=0.25, method="rk4").x
    want = gf.integrate(lambda t, x: -x, x0, 1.0, step_size=0.25, method="rk4").x
    assert term.calls == 16
    assert_close("x(T)", got, want, tolerance=1e-15)


@pytest.mark.parametrize("end", ["clamp", "interp"])
def test_no_more_slopes_are_kept_than_a_step_has(end):
    """Those of the step before, or of one that was rejected, make room for those of the next."""
    slopes, most = [], 0

    def f(t, x):
        nonlocal most
        slopes.append(weakref.ref(y := -x))
        most = max(most, sum(slope() is not None for slope in slopes))
        return y

    with torch.no_grad():
        solution = gf.integrate(
            f, torch.ones(3, dtype=torch.float64), 4.0, method="dopri5", first_step=3.0,
            times=[0.5, 2.0, 4.0], end=end,
        )  # fmt: skip
    assert solution.stats.accepted > 3 and solution.stats.rejected > 0
    assert most == 7 + 1  # and the first of all


@pytest.mark.parametrize("method", ["rk4", "dopri5", "implicit_adams"])
@pytest.mark.parametrize(("f", "error", "text"), [
    (lambda t, x: 1.0, TypeError, "`term` must return f as a Tensor, got float"),
    (lambda t, x: x[:1], ValueError, r"`term` must return f like x.*\[3, 2\], got.*\[1, 2\]"),
    (lambda t, x: x.double(), ValueError, "`term` must return f like x.*float32.*got.*float64"),
])  # fmt: skip
def test_a_field_unlike_the_state_is_named(f, error, text, method):
    with pytest.raises(error, match=text):
        gf.integrate(f, torch.ones(3, 2), 1.0, method=method)


@pytest.mark.parametrize("method", ["rk4", "dopri5", "explicit_adams"])
def test_a_function_under_autocast(method):
    linear = torch.nn.Linear(4, 4)
    x0 = torch.randn(5, 4, requires_grad=True)
    options = {"method": method, "step_size": 0.25, "rtol": 1e-2, "atol": 1e-2}
    want = gf.integrate(lambda t, x: linear(x), x0, 1.0, **options).x
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = gf.integrate(lambda t, x: linear(x), x0, 1.0, **options).x
    got.sum().backward()
    assert got.dtype == torch.float32 and x0.grad.isfinite().all()
    assert_close("x(T)", got, want, tolerance=2e-2)


def test_initial_state_is_never_changed():
    for method in GENERAL:
        x0 = torch.randn(3)
        before = x0.clone()
        gf.integrate(lambda t, x: -x, x0, 1.0, step_size=0.5, method=method)
        assert torch.equal(x0, before)


def test_status_says_what_to_try():
    x0 = torch.ones(3)
    solution = gf.integrate(lambda t, x: x * float("inf"), x0, 1.0)
    assert solution.status is gf.Status.NON_FINITE
    with pytest.raises(RuntimeError, match="NON_FINITE.*smaller step_size"):
        solution.check()
    fine = gf.integrate(lambda t, x: -x, x0, 1.0)
    assert fine.check() is fine and fine.status is gf.Status.SUCCESS


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    x0 = torch.ones(3, requires_grad=True)
    with mode():
        x = gf.integrate(lambda t, x: -x, x0, 1.0, step_size=0.1).x
    assert not x.requires_grad


BAD = {
    "method": (ValueError, "got 'rk5'", {"method": "rk5"}),
    "adjoint": (ValueError, "direct, checkpoint, continuous", {"adjoint": "exact"}),
    "T negative": (ValueError, "`T`.*at least 0, got -1", {"T": -1.0}),
    "T nan": (ValueError, "`T` must be finite", {"T": float("nan")}),
    "T type": (TypeError, "`T` must be a float, got str", {"T": "1"}),
    "step 0": (ValueError, "`step_size`.*above 0, got 0", {"step_size": 0.0}),
    "method type": (ValueError, "`method` must be one of euler.*got None", {"method": None}),
    "limit type": (TypeError, "`memory_limit` must be an int or None, got float",
                   {"memory_limit": 1e9}),
    "limit 0": (ValueError, "`memory_limit` must be at least 1, got 0", {"memory_limit": 0}),
    "steps type": (TypeError, "`max_steps` must be an int or None, got str", {"max_steps": "9"}),
    "nfe": (ValueError, "`max_nfe` must be at least 1, got -1", {"max_nfe": -1}),
    "x0": (TypeError, "`x0`.*floating.*int64", {"x0": torch.ones(3).long()}),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    error, text, options = BAD[case]
    options = {"x0": torch.ones(3), "T": 1.0, **options}
    with pytest.raises(error, match=text) as caught:
        gf.integrate(lambda t, x: -x, options.pop("x0"), options.pop("T"), **options)
    assert str(caught.value).startswith("integrate: ")


@pytest.mark.parametrize(("options", "text"), [
    ({"adjoint_method": "nonsense"}, "`adjoint_method` must be one of euler, .*got 'nonsense'"),
    ({"adjoint_options": ContinuousOptions(), "adjoint_method": "rk4"}, "must come without"),
    ({"adjoint_options": ContinuousOptions(), "tol_scale_adjoint": 2.0}, "must come without"),
])  # fmt: skip
def test_options_of_the_adjoint_that_say_two_things(options, text):
    with pytest.raises(ValueError, match=text):
        gf.integrate(lambda t, x: -x, torch.ones(3), 1.0, adjoint="continuous", **options)
