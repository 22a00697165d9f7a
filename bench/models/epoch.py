"""One epoch of training, forward, backward and a step of the optimiser: ours and the released."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.core import fresh, graphs, machine
from bench.core.configurations import ARXIV, BY_DATASET, load_graph
from bench.core.problem import OURS
from bench.core.setting import Setting, grand, setting
from bench.models.released import TUNED_ADJOINT, Continuous, ReleasedModel
from grand_fast import Graph
from grand_fast.data.datasets import NodeData, Split
from grand_fast.data.features import is_sparse
from grand_fast.nn import GRAND
from grand_fast.nn.encoder import csr_pair
from grand_fast.training.configurations import FOLDER, configuration
from grand_fast.training.configurations import RELEASED as RELEASED_VALUES
from grand_fast.training.presets import Preset
from grand_fast.training.trainer import make_optimizer

OURS_CONTINUOUS = f"{OURS}, continuous adjoint"
RELEASED = "released, as tuned"
RELEASED_DIRECT = "released, through the solver"
TINY_CLASSES = 3
ARXIV_FEATURES, ARXIV_CLASSES = 128, 40
# At these tolerances two solvers give the same state, and logits that differ by rounding.
TIGHT = 1e-5
SAME = 1e-3  # of the logits' norm
# At tuned tolerances, some 1e-4 a step, they differ by as much as the solves do from the solution.
NEAR = 5e-2


@dataclass(frozen=True, eq=False)
class Problem:
    """A configuration on its data, and the model that every competitor copies."""

    dataset: str
    preset: Preset
    here: Setting
    model: GRAND


def setup(dataset: str, variant: str) -> Problem:
    """The tuned configuration on its real data, all edges; ogbn-arxiv under random features."""
    tuned = configuration(dataset, variant, FOLDER if dataset == ARXIV else RELEASED_VALUES)
    preset = replace(tuned, early_stop=1.0, use_labels=False,
                     attention_quantile=None, attention_threshold=None)  # fmt: skip
    if dataset == ARXIV:
        here = _random(load_graph(BY_DATASET[ARXIV]), ARXIV_FEATURES, ARXIV_CLASSES)
    else:
        here = setting(dataset, preset, seed=0)
    return _problem(dataset, preset, here)


def tiny(dataset: str, preset: Preset) -> Problem:
    """The same on a small random graph: compiles what the real one runs."""
    here = _random(graphs.load("random", nodes=fresh.TINY_NODES), 8, TINY_CLASSES)
    return _problem(dataset, preset, here)


def competitors(problem: Problem) -> dict[str, Callable[[Problem], nn.Module]]:
    """By name, how to make the model; all start from the weights of `problem.model`."""
    if problem.dataset not in TUNED_ADJOINT:
        return {OURS: _ours}
    tuned = TUNED_ADJOINT[problem.dataset]
    made = {OURS: _ours, RELEASED: lambda p: ReleasedModel(p.model, p.here.graph, tuned)}
    if tuned is not None:
        made[OURS_CONTINUOUS] = lambda p: _continuous(p, tuned)
        made[RELEASED_DIRECT] = lambda p: ReleasedModel(p.model, p.here.graph, None)
    return made


def epoch(problem: Problem, model: nn.Module) -> Callable[[], None]:
    """A call that trains `model` for one epoch, at a learning rate of 0, so that all are alike."""
    preset, here = problem.preset, problem.here
    steps = make_optimizer(preset.optimizer, model.parameters(), lr=0.0,
                           weight_decay=preset.weight_decay)  # fmt: skip
    x, wanted = _features(problem, model), here.data.y[here.split.train]

    def call() -> None:
        model.train()
        steps.zero_grad()
        logits = model(x, here.graph)
        functional.cross_entropy(logits[here.split.train], wanted).backward()
        steps.step()

    return call


def check_same(problem: Problem, name: str) -> float:
    """Compare the logits with ours; the relative difference at the tuned tolerances.

    Raises:
        AssertionError: they differ at tight tolerances, or by more than `NEAR` at the tuned ones.
    """
    tight = replace(problem.preset, tol_scale=None, rtol=TIGHT, atol=TIGHT)
    for what, preset, allowed in (("tight", tight, SAME), ("tuned", problem.preset, NEAR)):
        model = grand(problem.here.data, preset)
        model.load_state_dict(problem.model.state_dict())
        same = replace(problem, preset=preset, model=model)
        ours, other = (_logits(make(same), same) for make in
                       (_ours, competitors(problem)[name]))  # fmt: skip
        difference = float((other - ours).norm() / ours.norm())
        if not difference <= allowed:
            raise AssertionError(
                f"{problem.dataset} {problem.preset.variant}, {name}: logits at {what} tolerances "
                f"differ from ours by {difference:.2g} of their norm, more than {allowed:g}"
            )
    return difference


def require_memory(problem: Problem, name: str) -> None:
    """Refuse what keeps every evaluation's edges and does not fit.

    Raises:
        machine.DoesNotFitError: bytes needed and available.
    """
    model = competitors(problem)[name](problem)
    if not isinstance(model, ReleasedModel):
        return
    _logits(model, problem)  # counts the evaluations
    kept = model.nfe if model.adjoint is None else 1
    preset, graph = problem.preset, problem.here.graph
    # Of each edge: its rows of query, key and state, and a few numbers a head.
    per_edge = preset.hidden + 8 * preset.heads
    if preset.variant == "nl":
        per_edge += 2 * preset.attention_channels
    needed = 4 * (kept + 2) * (graph.num_edges * per_edge + 6 * graph.num_nodes * preset.hidden)
    machine.require_memory(f"{problem.dataset} {preset.variant}, {name}", needed)


def evaluations(model: nn.Module, problem: Problem) -> tuple[int, int]:
    """Evaluations of f in the forward and the backward pass of one epoch."""
    epoch(problem, model)()
    if isinstance(model, ReleasedModel):
        return model.nfe, model.nfe_backward
    assert isinstance(model, GRAND) and model.stats is not None
    return model.stats.nfe, model.nfe_backward or 0


def peak_memory(dataset: str, variant: str, competitor: str) -> dict[str, float]:
    """Bytes above model and data at the peak of an epoch; in a fresh process."""
    problem = setup(dataset, variant)
    make = competitors(problem)[competitor]
    small = tiny(dataset, problem.preset)
    epoch(small, make(small))()
    return fresh.peak(epoch(problem, make(problem)))


def _problem(dataset: str, preset: Preset, here: Setting) -> Problem:
    torch.manual_seed(0)
    graphs.prepare(here.graph)
    if is_sparse(here.data.x):
        csr_pair(here.data.x)
    return Problem(dataset, preset, here, grand(here.data, preset))


def _ours(problem: Problem) -> GRAND:
    return copy.deepcopy(problem.model)


def _continuous(problem: Problem, tuned: Continuous) -> GRAND:
    model = copy.deepcopy(problem.model)
    model.adjoint, model.adjoint_method = "continuous", tuned.method
    model.tol_scale_adjoint = tuned.tol_scale
    return model


def _logits(model: nn.Module, problem: Problem) -> Tensor:
    with torch.no_grad():
        return model.eval()(_features(problem, model), problem.here.graph)


def _features(problem: Problem, model: nn.Module) -> Tensor:
    """Dense for the released code, as it reads them."""
    x = problem.here.data.x
    return x if isinstance(model, GRAND) else x.to_dense()


def _random(graph: Graph, features: int, classes: int) -> Setting:
    """Random features and classes on a graph, all of whose nodes are for training."""
    n, draws = graph.num_nodes, torch.Generator().manual_seed(0)
    y = torch.randint(classes, (n,), generator=draws)
    y[0] = classes - 1  # or a class could be missing
    x = torch.randn(n, features, generator=draws)
    nodes = torch.arange(n)
    data = NodeData("random", x, y, graph.edge_index())
    return Setting(data, graph, Split(nodes, nodes, nodes))
