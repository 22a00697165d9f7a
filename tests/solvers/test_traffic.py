"""How many numbers a step reads and writes, gathers left out: counted at the launchers."""

import pytest
import torch

import grand_fast as gf
from grand_fast.nn import AttentionDiffusion
from grand_fast.nn.terms import LinearDiffusion, NonlinearDiffusion
from grand_fast.ops.backends import launchers
from grand_fast.testing import random_graph

N, D = 40, 8


class Traffic:
    """Tensors of the state's size that the launchers were given and gave.

    Every launcher here reads each tensor it is given once and writes what it returns once: see the
    bytes at the top of its file.
    """

    def __init__(self, monkeypatch):
        self.reads = self.writes = 0
        for op, name in (
            ("stage_update", "stage_update_fwd"),
            ("error_ratio", "error_ratio_fwd"),
            ("csr_diffusion", "csr_diffusion_fwd"),
            ("attention_diffusion", "attention_diffusion_fwd"),
        ):
            module = launchers(op, "cpu")
            monkeypatch.setattr(module, name, self._counted(getattr(module, name)))

    def _counted(self, launch):
        def wrapper(*args, **kwargs):
            result = launch(*args, **kwargs)
            # q and k are f's own, whatever solver asks for it: projections, not the step.
            given = [value for key, value in kwargs.items() if key not in ("q", "k", "csr")]
            first = args if "csr" not in kwargs else args[:1]
            self.reads += len(states((first, given)))
            self.writes += len(states(result))
            return result

        return wrapper

    @property
    def total(self):
        return self.reads + self.writes


def states(value):
    """Addresses of the tensors of the state's size within.

    A set: x of f, which the combination may hold too, is the same row at the same moment.
    """
    if isinstance(value, torch.Tensor):
        return {value.data_ptr()} if value.numel() == N * D else set()
    if isinstance(value, tuple | list):
        return set().union(*map(states, value))
    return set()


def terms():
    graph = random_graph("loops", N)
    a = torch.rand(graph.num_edges)
    linear = LinearDiffusion(a, graph, alpha=1.0, beta=None, x0=None)
    nonlinear = NonlinearDiffusion(AttentionDiffusion(D, D, 2, alpha=1.0), graph, None)
    return {"linear": linear, "nonlinear": nonlinear}


# As measured for torchdiffeq: 54 and 8 in f for RK4, some 250 for an attempt of DOPRI5. What each
# of ours reads, x of f included, and writes:
#   rk4          1+1, 2+1, 2+1, 3+1
#   rk4_classic  1+1, 2+1, 2+1, 4+1 (f's x is y4, which the sum holds too)
FUSED = {"euler": 2, "midpoint": 5, "rk4": 12, "rk4_classic": 13}


@pytest.mark.parametrize("kind", ["linear", "nonlinear"])
@pytest.mark.parametrize("method", FUSED)
def test_a_fixed_step_moves_no_more_than_its_stage_values(method, kind, monkeypatch):
    term = terms()[kind]
    x = torch.randn(N, D)
    traffic = Traffic(monkeypatch)
    with torch.no_grad():
        gf.integrate(term, x, 1.0, method=method)
    assert traffic.total == FUSED[method]
    assert FUSED["rk4"] <= 14 and FUSED["rk4_classic"] <= 14


@pytest.mark.parametrize("kind", ["linear", "nonlinear"])
def test_an_attempt_of_dopri5_stays_within_60_states(kind, monkeypatch):
    term = terms()[kind]
    x = torch.randn(N, D)
    moved = []
    for T in (0.01, 0.02):
        traffic = Traffic(monkeypatch)
        with torch.no_grad():
            solution = gf.integrate(
                term, x, T, method="dopri5", rtol=0.1, atol=0.1, first_step=0.01
            )
        moved.append((traffic.total, solution.stats.accepted))
        monkeypatch.undo()
    assert [accepted for _, accepted in moved] == [1, 2]
    attempt = moved[1][0] - moved[0][0]
    # f six times: 2 each; stages 3, 4, 5, 6, 7 and 7; the error estimate reads 8.
    assert attempt == 6 * 2 + 32 + 8
    assert attempt <= 60


def test_a_plain_function_costs_one_more_pass_a_stage(monkeypatch):
    x = torch.randn(N, D)
    traffic = Traffic(monkeypatch)
    with torch.no_grad():
        gf.integrate(lambda t, y: -y, x, 1.0, method="rk4")
    # without what f itself reads and writes
    assert traffic.total == FUSED["rk4"] + 4
