"""The figures of an experiment: means and deviations over its seeds, and what they are of."""

import json
from dataclasses import replace

import pytest
import torch

from grand_fast import cli
from grand_fast.training.experiment import Experiment, Results, summary
from grand_fast.training.history import Epoch
from grand_fast.training.trainer import Fit
from tests._command_line import QUICK, own_folder  # noqa: F401  # a fixture
from tests._small_run import SMALL

EPOCH = Epoch(1.0, 0.5, 0.75, 4, 6, 0.1, 2**60, 3.0)


def fit(accuracy, *epochs):
    return Fit(list(epochs or (EPOCH,)), 0, None, {}, accuracy)


@pytest.fixture
def experiment(tmp_path):
    return Experiment("mine", SMALL, 3, torch.device("cpu"), tmp_path)


def test_the_deviation_is_that_of_the_population(experiment):
    """As the paper's released code reports it; that of a sample would be 0.2."""
    results = Results([fit(a) for a in (0.5, 0.7, 0.9)], [0.25, 0.75], 10)
    content = summary(experiment, results)
    assert content["test_accuracy"] == [0.5, 0.7, 0.9]
    assert content["mean"] == pytest.approx(0.7)
    assert content["std"] == pytest.approx((2 * 0.2**2 / 3) ** 0.5, rel=1e-12)
    spread = content["label_spreading"]
    assert (spread["mean"], spread["std"]) == (0.5, 0.25)


def test_one_seed_deviates_by_nothing(experiment):
    content = summary(experiment, Results([fit(0.5)]))
    assert (content["mean"], content["std"], content["label_spreading"]) == (0.5, 0.0, None)


def test_the_other_figures(experiment):
    slow = replace(EPOCH, seconds=9.0, nfe=5, val_accuracy=0.5)
    fast = replace(EPOCH, seconds=0.3)
    results = Results([fit(0.5, EPOCH, fast, slow), fit(0.5, fast)], parameters=10,
                      classes=("cat", "dog"))  # fmt: skip
    content = summary(experiment, results)
    assert content["seconds_per_epoch"] == 0.3  # the median of medians
    assert content["peak_memory_bytes"] == 2**60
    assert (content["nfe_forward"], content["nfe_backward"]) == (4, 6)
    assert (content["val_accuracy"], content["best_time"]) == ([0.75, 0.75], [3.0, 3.0])
    assert (content["parameters"], content["classes"]) == (10, ["cat", "dog"])
    assert content["options"]["hidden"] == SMALL.hidden


def test_what_is_printed_is_what_is_written(capsys):
    assert cli.main(["train", *QUICK, "--seeds", "2", "--json", "summary.json"]) == 0
    with open("summary.json") as stream:
        content = json.load(stream)
    first, second = content["test_accuracy"]
    assert first != second  # or this would test nothing
    assert content["mean"] == pytest.approx((first + second) / 2)
    assert content["std"] == pytest.approx(abs(first - second) / 2)
    spread = content["label_spreading"]
    assert (
        f"test accuracy {(first + second) / 2:.4f} ± {abs(first - second) / 2:.4f} (2 seeds); "
        "label spreading on the same graph and labels: "
        f"{spread['mean']:.4f} ± {spread['std']:.4f}\n"
    ) in capsys.readouterr().out
