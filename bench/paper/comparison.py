"""Accuracies of several runs beside the paper's: their arithmetic, and how they are printed."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from bench.core.tables import Row
from bench.paper.published import MeanStd


@dataclass(frozen=True)
class Comparison:
    """One model on one data set; accuracies in percent, None where there is none."""

    dataset: str
    model: str
    paper: MeanStd | None
    ours: MeanStd | None
    runs: int

    @property
    def difference(self) -> float | None:
        """Ours less the paper's, in points."""
        return self.ours[0] - self.paper[0] if self.ours and self.paper else None

    @property
    def reached(self) -> bool | None:
        """Whether ours is above the paper's mean less one of its standard deviations."""
        return None if self.difference is None else self.difference >= -self.paper[1]

    def cells(self) -> list[str]:
        """A line of the table."""
        difference = "" if self.difference is None else f"{self.difference:+.1f}"
        verdict = {None: "", True: "yes", False: "no"}[self.reached]
        return [self.model, text(self.paper), text(self.ours), difference, verdict,
                str(self.runs or "")]  # fmt: skip


HEAD = ["", "paper", "ours", "difference", "within one std or above", "runs"]


def mean_std(accuracies: Iterable[float]) -> MeanStd | None:
    """Mean and population standard deviation, in percent; None of no values."""
    values = 100.0 * np.array(list(accuracies))
    return (float(values.mean()), float(values.std())) if values.size else None


def having(runs: Iterable[Row], **values: object) -> list[Row]:
    """Those of the runs that have these values."""
    return [run for run in runs if all(run[key] == value for key, value in values.items())]


def accuracies(runs: Iterable[Row]) -> list[float]:
    """Test accuracies, as shares; a run that failed before its first epoch has none."""
    return [run["test_accuracy"] for run in runs if run["test_accuracy"] is not None]


def text(value: MeanStd | None) -> str:
    """As the paper writes it."""
    return "" if value is None else f"{value[0]:.1f} ± {value[1]:.1f}"


def compare(
    dataset: str, model: str, published: dict[str, MeanStd], runs: Iterable[Row]
) -> Comparison:
    """The runs of this model on this data set, beside its published accuracy."""
    values = accuracies(having(runs, dataset=dataset, model=model))
    return Comparison(dataset, model, published.get(model), mean_std(values), len(values))
