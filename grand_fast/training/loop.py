"""Training: the loop over epochs, which a killed process may take up again."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from grand_fast.data.datasets import NodeData, Split, accuracy
from grand_fast.graph import Graph
from grand_fast.nn import GRAND
from grand_fast.training.history import Epoch
from grand_fast.training.option_types import BadOptionError
from grand_fast.training.trainer import CRITERIA, Fit, Trainer, make_optimizer

STATE_SHARE = 0.02  # of the time, which writing the state may take


def fit(
    model: GRAND,
    data: NodeData,
    graph: Graph,
    split: Split,
    *,
    epochs: int,
    lr: float,
    weight_decay: float = 0.0,
    optimizer: str = "adam",
    label: str = "",
    patience: int | None = None,
    early_stop: float = 1.0,
    penalties: Mapping[str, float] | None = None,
    entropy: float = 0.0,
    entropy_warmup: int = 0,
    use_labels: bool = False,
    select: str = "accuracy",
    state: Path | None = None,
    resume: bool = True,
    on_epoch: Callable[[int, Epoch], None] | None = None,
) -> Fit:
    """Train on cross entropy and keep the weights of the best validation epoch in memory.

    Args:
        model: trained in place; on return it holds the best weights.
        data, graph: on the device of `model`; the graph with the self-loops it is to have.
        split: node ids; the labels of those of the test set are read for `test_accuracy` alone.
        epochs: full-graph gradient steps, at most.
        optimizer, lr, weight_decay: `optimizer` names a class of `torch.optim`, in any case.
        label: of the progress bar, which shows on terminals only.
        patience: stop after as many epochs that were not better than the best in validation.
        early_stop: `k`, at least 1: evaluation integrates to `k T` and takes, of all steps, the
            time that is best in validation; 1 evaluates `T` alone.
        penalties: weights, by which the means over the nodes of the model's `regularizers` are
            added to the loss.
        entropy: weight by which the mean over all nodes of the entropy of their predictions is
            added to the loss; at least 0. It reads no labels, and makes predictions decided where
            none is known (Grandvalet and Bengio 2004).
        entropy_warmup: epochs in which that weight rises linearly before it is whole.
        use_labels: labels are input too, of a model with `label_channels` classes. In training a
            random half of the training labels, the loss being that of the other half; in
            evaluation all training labels, and never those of validation or test.
        select: what is best in validation: the highest `"accuracy"`, of equals that with the lowest
            loss; or the lowest `"loss"`, which few validation nodes tell more reliably apart
            (Shchur et al. 2018).
        state: a file for all that the training needs to go on, written after the first epoch, then
            as often as 2 % of the time allow (about every second), and at the end. If it is there,
            the training continues from it, to the bit as if it had never stopped. The caller
            deletes it.
        resume: False begins anew even so.
        on_epoch: is told the index of each epoch that ends, and what was measured; first of those
            that the state brings.

    Returns:
        The best epoch and the history. An interrupt (Ctrl-C) or a failed solve does not raise:
        `Fit.stopped` tells, and the best weights so far are there.

    Raises:
        BadOptionError: options that do not fit the model, or a state that does not.
    """
    if select not in CRITERIA:
        raise BadOptionError(f"fit: `select` must be one of {', '.join(CRITERIA)}, got {select!r}.")
    if entropy < 0 or entropy_warmup < 0:
        raise BadOptionError(
            f"fit: `entropy` and `entropy_warmup` must be at least 0, got {entropy} and "
            f"{entropy_warmup}."
        )
    for name in penalties or {}:
        if name not in model.solve.regularizers:
            raise BadOptionError(
                f"fit: `penalties` must be among the model's regularizers "
                f"{tuple(model.solve.regularizers)}, got {name!r}. Build it with "
                f"regularizers=({name!r},)."
            )
    trainer = Trainer(
        model, data, graph, Split(*(ids.to(data.x.device) for ids in split.parts.values())),
        make_optimizer(optimizer, model.parameters(), lr=lr, weight_decay=weight_decay), early_stop,
        penalties or {}, entropy, entropy_warmup, use_labels, select,
    )  # fmt: skip
    result = Fit()
    if state is not None and resume and state.exists():
        result = trainer.resume(state)
    first, due = len(result.history), time.monotonic()
    if on_epoch is not None:
        for index, epoch in enumerate(result.history):
            on_epoch(index, epoch)
    bar = tqdm(
        desc=f"{label} (compiling)", total=epochs, initial=first, unit="epoch", disable=None
    )  # fmt: skip
    try:
        for index in range(first, epochs):
            if patience is not None and index - 1 - result.best_epoch >= patience:
                break
            result.stopped = trainer.epoch(result)
            if result.stopped is not None:
                result.stopped = f"{label}, epoch {index}: {result.stopped}"
                break
            if on_epoch is not None:
                on_epoch(index, result.history[-1])
            if state is not None and (start := time.monotonic()) >= due:
                trainer.save(state, result)
                end = time.monotonic()
                due = end + (end - start) / STATE_SHARE
            _show(bar, label, result)
    except KeyboardInterrupt:
        result.stopped = "interrupted"
    finally:
        bar.close()
    if state is not None and result.stopped is None:
        trainer.save(state, result)
    if result.guess is not None:
        result.test_accuracy = accuracy(result.guess, data.y.cpu(), split.test.cpu())
        model.load_state_dict(result.weights)
    model.eval()
    return result


def _show(bar: Any, label: str, result: Fit) -> None:
    last = result.history[-1]
    bar.update()
    bar.set_description(label, refresh=False)
    bar.set_postfix(
        loss=f"{last.loss:.3f}",
        val=f"{last.val_accuracy:.3f}",
        best=f"{result.best.val_accuracy:.3f}",
        nfe=last.nfe,
        s=f"{last.seconds:.2f}",
    )
