"""The picture of a training run."""

import io
from pathlib import Path

from grand_fast.training.checkpoint import write_whole
from grand_fast.training.trainer import Fit


def draw_training_curves(run: Fit, path: Path, *, title: str) -> None:
    """Write a PNG of losses and validation accuracy over epochs, the best epoch marked."""
    # The figure alone, without pyplot: needs no display and leaves a user's backend as it is
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    epochs = range(len(run.history))
    losses.plot(epochs, [epoch.loss for epoch in run.history], label="training")
    losses.plot(epochs, [epoch.val_loss for epoch in run.history], label="validation")
    losses.set(xlabel="epoch", ylabel="cross entropy")
    losses.legend()
    accuracies.plot(epochs, [epoch.val_accuracy for epoch in run.history], color="C1")
    accuracies.plot(
        run.best_epoch,
        run.best.val_accuracy,
        "o",
        color="C3",
        label=f"kept: epoch {run.best_epoch}, test accuracy {run.test_accuracy:.3f}",
    )
    accuracies.set(xlabel="epoch", ylabel="validation accuracy")
    accuracies.legend(loc="lower right")
    figure.suptitle(title)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    write_whole(path, picture.getvalue())
