"""The training loop and its checkpoints, on a graph of two groups that is learnt in seconds."""

import json

import pytest
import torch

from grand_fast.data import NodeData, Split
from grand_fast.graph import Graph
from grand_fast.nn import GRAND
from grand_fast.solvers import Status
from grand_fast.train import CONFIG_FILE, WEIGHTS_FILE, Fit, fit, load_checkpoint, save_checkpoint

N = 60
MODEL = {
    "in_channels": 5,
    "hidden_channels": 8,
    "out_channels": 2,
    "variant": "nl",
    "heads": 2,
    "T": 2.0,
    "source": True,
}


@pytest.fixture(autouse=True)
def one_thread():
    """On graphs this small, threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def groups():
    """Two rings of 30 nodes; the features say little, the edges all."""
    ids = torch.arange(N)
    half = N // 2
    ring = ids // half * half + (ids + 1) % half
    edge_index = torch.cat([torch.stack([ids, ring]), torch.stack([ring, ids])], dim=1)
    y = ids // half
    x = 0.7 * torch.randn(N, 5) + y[:, None]
    split = Split(ids[::6], ids[1::6], torch.cat([ids[k::6] for k in (2, 3, 4, 5)]))
    return NodeData("groups", x, y, edge_index), Graph.from_edge_index(edge_index, N), split


def train(model, groups, epochs=30, **more) -> Fit:
    data, graph, split = groups
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return fit(model, data, graph, split, epochs=epochs, **({"lr": 0.05} | more))


@pytest.mark.parametrize("variant", ["l", "nl", "laplacian"])
def test_training_learns(groups, variant):
    run = train(GRAND(**(MODEL | {"variant": variant})), groups)
    assert run.stopped is None
    assert len(run.history) == 30
    assert run.test_accuracy > 0.9
    assert run.history[-1].loss < run.history[0].loss
    assert all(epoch.nfe == 8 for epoch in run.history)  # two steps of four stages
    assert run.seconds_per_epoch > 0


def test_best_weights_are_those_of_the_best_epoch(groups):
    data, graph, split = groups
    model = GRAND(**MODEL)
    # Absurd steps at a rate that spoils the weights again
    run = train(model, groups, lr=0.5)
    accuracies = [epoch.val_accuracy for epoch in run.history]
    assert run.best.val_accuracy == max(accuracies)
    guess = model(data.x, graph).argmax(1)
    assert float((guess == data.y)[split.val].double().mean()) == run.best.val_accuracy
    assert float((guess == data.y)[split.test].double().mean()) == run.test_accuracy
    assert not model.training


def test_equal_seeds_give_equal_runs(groups):
    torch.manual_seed(3)
    first = train(GRAND(**MODEL), groups, epochs=3)
    torch.manual_seed(3)
    second = train(GRAND(**MODEL), groups, epochs=3)
    assert [epoch.loss for epoch in first.history] == [epoch.loss for epoch in second.history]


@pytest.mark.parametrize("optimizer", ["adam", "adamax", "rmsprop"])
def test_optimizers(groups, optimizer):
    run = train(GRAND(**MODEL), groups, epochs=2, optimizer=optimizer, weight_decay=0.01)
    assert len(run.history) == 2


class Interrupting(GRAND):
    """Presses Ctrl-C in a given forward pass; training and evaluation take turns."""

    def __init__(self, at, **options):
        super().__init__(**options)
        self.left = at

    def forward(self, x, graph_or_edge_index):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return super().forward(x, graph_or_edge_index)


@pytest.mark.parametrize("at", [4, 5])
def test_interrupt_keeps_the_best_weights(groups, at):
    model = Interrupting(at, **MODEL)
    run = train(model, groups)
    assert run.stopped == "interrupted"
    assert len(run.history) == 2
    assert all(torch.equal(w, run.weights[name]) for name, w in model.state_dict().items())


def test_interrupt_before_the_first_epoch_ends(groups):
    run = train(Interrupting(1, **MODEL), groups)
    assert (run.stopped, run.history, run.weights) == ("interrupted", [], {})


def test_failed_solve_stops_with_advice(groups):
    model = GRAND(**(MODEL | {"T": 4000.0, "step_size": 40.0, "method": "euler"}))
    run = train(model, groups, label="seed 0")
    assert run.stopped.startswith("seed 0, epoch 0: NON_FINITE at t = 4000 or before: ")
    assert Status.NON_FINITE.value in run.stopped


def test_a_solve_that_may_take_no_more_evaluations_stops_with_advice(groups):
    run = train(GRAND(**(MODEL | {"method": "dopri5", "T": 20.0, "max_nfe": 20})), groups)
    assert "MAX_STEPS at t = " in run.stopped and "max_nfe" in run.stopped
    assert run.history == []


def test_a_failed_continuous_adjoint_stops(groups, monkeypatch):
    model = GRAND(**(MODEL | {"adjoint": "continuous", "adjoint_method": "dopri5"}))
    real = GRAND.forward

    def forward(self, *arguments):
        logits = real(self, *arguments)
        logits.register_hook(lambda grad: grad * float("nan"))  # backward starts from NaN
        return logits

    monkeypatch.setattr(GRAND, "forward", forward)
    run = train(model, groups)
    assert "adjoint 'continuous': NON_FINITE" in run.stopped
    assert "adjoint='checkpoint'" in run.stopped


@pytest.mark.parametrize("adjoint", ["direct", "checkpoint", "continuous"])
def test_evaluations_of_backward_are_noted(groups, adjoint):
    run = train(GRAND(**(MODEL | {"adjoint": adjoint})), groups, epochs=1)
    backward = {"direct": 0, "checkpoint": 8, "continuous": 8}
    assert run.history[0].nfe_backward == backward[adjoint]


def test_loss_that_is_not_finite_stops(groups):
    model = GRAND(**MODEL)
    with torch.no_grad():
        model.decoder.bias[0] = float("nan")
    assert "the loss is nan" in train(model, groups).stopped


def test_checkpoint_gives_the_same_logits(groups, tmp_path):
    data, graph, _ = groups
    model = GRAND(**MODEL)
    run = train(model, groups, epochs=3)
    path = save_checkpoint(tmp_path / "new" / "folder", run.weights, {"model": MODEL})
    assert path == tmp_path / "new" / "folder" / WEIGHTS_FILE
    loaded = load_checkpoint(path.parent)
    assert torch.equal(loaded(data.x, graph), model(data.x, graph))
    assert not loaded.training
    assert {file.name for file in path.parent.iterdir()} == {WEIGHTS_FILE, CONFIG_FILE}


def test_checkpoint_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"must hold {CONFIG_FILE}, got {tmp_path}"):
        load_checkpoint(tmp_path)
    save_checkpoint(tmp_path, GRAND(**MODEL).state_dict(), {"model": MODEL})
    weights = (tmp_path / WEIGHTS_FILE).read_bytes()
    (tmp_path / WEIGHTS_FILE).write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match=f"{tmp_path} does not hold a model"):
        load_checkpoint(tmp_path)
    (tmp_path / WEIGHTS_FILE).write_bytes(weights)
    (tmp_path / CONFIG_FILE).write_text(json.dumps({"model": MODEL | {"hidden_channels": 9}}))
    with pytest.raises(ValueError, match="does not hold a model"):
        load_checkpoint(tmp_path)
