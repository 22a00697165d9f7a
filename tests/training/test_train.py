"""The training loop, on a graph of two groups that is learnt in seconds."""

import math
from dataclasses import replace

import pytest
import torch

from grand_fast.data.datasets import NodeData, accuracy
from grand_fast.graph import Graph
from grand_fast.nn import GRAND
from grand_fast.nn.grand import VARIANTS
from grand_fast.solvers import Status
from grand_fast.training.loop import fit
from grand_fast.training.trainer import OPTIMIZERS, Fit
from tests._small_run import N, two_rings

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL = {
    "in_channels": 5,
    "hidden_channels": 8,
    "out_channels": 2,
    "variant": "nl",
    "heads": 2,
    "T": 2.0,
    "source": True,
}


@pytest.fixture
def groups():
    """Two rings of 30 nodes; the features say little, the edges all."""
    data = two_rings()
    noise = data.x - data.y[:, None]
    data = replace(data, x=0.7 * noise + data.y[:, None])
    return data, Graph.from_edge_index(data.edge_index, N), data.public_split


def train(model, groups, epochs=30, **more) -> Fit:
    data, graph, split = groups
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return fit(model, data, graph, split, epochs=epochs, **({"lr": 0.05} | more))


@pytest.mark.parametrize("variant", VARIANTS)
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


def test_the_epoch_of_the_lowest_loss_may_be_chosen(groups):
    data, graph, split = groups
    model = GRAND(**MODEL)
    run = train(model, groups, lr=0.5, select="loss")
    losses = [epoch.val_loss for epoch in run.history]
    assert run.best_epoch == losses.index(min(losses))
    accuracies = [epoch.val_accuracy for epoch in run.history]
    assert run.best_epoch != accuracies.index(max(accuracies))  # or this would test nothing
    assert torch.equal(model(data.x, graph).argmax(1), run.guess)


def test_equal_seeds_give_equal_runs(groups):
    torch.manual_seed(3)
    first = train(GRAND(**MODEL), groups, epochs=3)
    torch.manual_seed(3)
    second = train(GRAND(**MODEL), groups, epochs=3)
    assert [epoch.loss for epoch in first.history] == [epoch.loss for epoch in second.history]


@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if name != "muon"])
def test_optimizers(groups, optimizer):
    decay = 0.0 if optimizer in ("rprop", "lbfgs") else 0.01
    model = GRAND(**MODEL)
    before = {name: w.clone() for name, w in model.state_dict().items()}
    name = optimizer.upper()
    run = train(model, groups, epochs=3, optimizer=name, weight_decay=decay)
    assert len(run.history) == 3
    assert all(math.isfinite(epoch.loss) for epoch in run.history)
    assert any(not torch.equal(w, before[name]) for name, w in run.weights.items())
    assert len({epoch.loss for epoch in run.history}) == 3


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"optimizer": "adamm"}, "`optimizer` must be one of adadelta, .*, got 'adamm'"),
        ({"optimizer": "rprop", "weight_decay": 0.1}, "must be 0 with Rprop, which has none"),
        ({"optimizer": "muon"}, "must take this model and these options, got Muon: "),
        ({"entropy": -1.0}, r"`entropy` and `entropy_warmup` must be at least 0, got -1.0 and 0"),
        ({"penalties": {"kinetic": 1.0}}, r"must be among the model's regularizers \(\), got 'kin"),
    ],
)
def test_options_that_do_not_fit(groups, options, text):
    with pytest.raises(ValueError, match=f"^fit: .*{text}"):
        train(GRAND(**MODEL), groups, **options)


def test_patience_stops_that_many_epochs_after_the_best(groups):
    run = train(GRAND(**MODEL), groups, epochs=200, patience=4, lr=0.2)
    assert run.stopped is None
    assert 5 <= len(run.history) == run.best_epoch + 5 < 200


def test_early_stopping_takes_the_best_time(groups):
    data, graph, split = groups
    model = GRAND(**MODEL)
    run = train(model, groups, epochs=3, early_stop=2.5)
    assert all(epoch.nfe == 8 for epoch in run.history)  # training goes to T
    found = model.trajectory(data.x, graph, 5.0)
    assert [t for t, _ in found] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    guesses = {t: logits.argmax(1) for t, logits in found}
    assert run.best.val_accuracy == max(accuracy(g, data.y, split.val) for g in guesses.values())
    assert torch.equal(run.guess, guesses[run.best.time])
    assert run.test_accuracy == accuracy(guesses[run.best.time], data.y, split.test)


def test_without_early_stopping_the_time_is_the_end(groups):
    assert {epoch.time for epoch in train(GRAND(**MODEL), groups, epochs=2).history} == {2.0}


def test_penalties_are_added_to_the_loss(groups):
    model = GRAND(**MODEL, regularizers=("kinetic",))
    plain = train(model, groups, epochs=1, lr=1e-30)
    weighted = train(model, groups, epochs=1, lr=1e-30, penalties={"kinetic": 3.0})
    model.train()(groups[0].x, groups[1])
    added = 3.0 * model.penalties["kinetic"].mean().item()
    assert added > 0
    assert weighted.history[0].loss == pytest.approx(plain.history[0].loss + added)


def test_a_penalty_is_made_small(groups):
    def kinetic(weight):
        torch.manual_seed(0)
        model = GRAND(**MODEL, regularizers=("kinetic",))
        train(model, groups, penalties={"kinetic": weight})
        model.train()
        model(groups[0].x, groups[1])
        return model.penalties["kinetic"].mean()

    assert kinetic(10.0) < 0.5 * kinetic(0.0)


def test_entropy_is_added_to_the_loss_by_and_by(groups):
    data, graph, split = groups
    model = GRAND(**MODEL | {"dropout": 0.0, "input_dropout": 0.0})
    options = {"epochs": 3, "lr": 1e-30}
    plain = train(model, groups, **options)
    risen = train(model, groups, **options, entropy=3.0, entropy_warmup=1)
    p = model.eval()(data.x, graph).softmax(1)
    added = -3.0 * (p * p.log()).sum(1).mean().item()
    assert added > 0.1
    for epoch, share in enumerate((0.5, 1.0, 1.0)):
        expected = plain.history[epoch].loss + share * added
        assert risen.history[epoch].loss == pytest.approx(expected, rel=1e-5)


class Recording(GRAND):
    """Keeps the labels that it is given."""

    def __init__(self, **options):
        super().__init__(**options)
        self.given = []

    def forward(self, x, graph_or_edge_index, labels=None):
        self.given.append((self.training, labels))
        return super().forward(x, graph_or_edge_index, labels)


def test_labels_as_input(groups):
    data, _, split = groups
    model = Recording(**MODEL, label_channels=2)
    train(model, groups, epochs=6, use_labels=True)
    one_hot = torch.nn.functional.one_hot(data.y).float()
    halves = []
    for is_training, labels in model.given:
        known = labels.sum(1).nonzero().flatten().tolist()
        assert torch.equal(labels[known], one_hot[known])
        assert labels.sum() == len(known)
        if is_training:
            assert len(known) == len(split.train) // 2 and set(known) < set(split.train.tolist())
            halves.append(tuple(known))
        else:
            assert known == split.train.tolist()
    assert len(halves) == 6 and len(set(halves)) > 1


def test_the_loss_is_of_labels_that_are_not_input(groups):
    """A model that reads its label input off gains nothing in training."""
    data, graph, split = groups

    class Reading(GRAND):
        def forward(self, x, graph_or_edge_index, labels=None):
            return super().forward(x, graph_or_edge_index, labels) * 0 + 100 * labels

    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = Reading(**MODEL, label_channels=2)
        run = fit(model, data, graph, split, epochs=1, lr=0.1, use_labels=True)
    assert run.history[0].loss == pytest.approx(math.log(2))
    assert run.history[0].val_loss == pytest.approx(math.log(2))


def test_labels_of_the_test_set_are_read_once_at_the_end(groups):
    """Other test labels: the same run but for the test accuracy."""
    data, graph, split = groups
    runs = []
    for y in (data.y, data.y.clone().index_fill_(0, split.test, 0)):
        torch.manual_seed(0)
        model = GRAND(**MODEL, label_channels=2)
        given = NodeData("groups", data.x, y, data.edge_index)
        runs.append(train(model, (given, graph, split), epochs=5, use_labels=True))
    a, b = runs
    assert all(torch.equal(w, b.weights[name]) for name, w in a.weights.items())
    assert [e.val_loss for e in a.history] == [e.val_loss for e in b.history]
    assert a.test_accuracy != b.test_accuracy


def test_on_epoch_is_told_of_each(groups):
    told = []
    run = train(GRAND(**MODEL), groups, epochs=3, on_epoch=lambda *args: told.append(args))
    assert told == list(enumerate(run.history))
    assert all(epoch.peak_memory_bytes > 2**20 for epoch in run.history)


class Interrupting(GRAND):
    """Presses Ctrl-C in a given forward pass; training and evaluation take turns."""

    def __init__(self, at, **options):
        super().__init__(**options)
        self.left = at

    def forward(self, x, graph_or_edge_index, labels=None):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return super().forward(x, graph_or_edge_index, labels)


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
