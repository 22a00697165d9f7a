"""Jobs of the suite `paper`, one training run each: what to train, and working through them."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bench.core.harness import Budget
from bench.core.report import Progress
from bench.core.setting import grand, setting
from bench.core.tables import Row
from bench.paper.peers import PEERS, build
from bench.paper.store import IDENTITY, Store
from grand_fast.training.loop import fit
from grand_fast.training.presets import Preset, training_config


@dataclass(frozen=True)
class Job:
    """One training run.

    dataset: one of `grand_fast.data.DATASETS`.
    model: as the tables call it: "GRAND-l", …, or one of `PEERS`.
    seed: draws the weights, and the split where it is random.
    preset: of data, model and training.
    layers: convolutions of a peer.
    at: where in a figure it stands: T, a step size, K, number of layers.
    """

    dataset: str
    model: str
    seed: int
    preset: Preset
    layers: int = 2
    at: float | None = None

    def row(self) -> Row:
        """What it is, as it stands in JSON."""
        options = self.preset.options()
        if self.model in PEERS:
            options["layers"] = self.layers
        return {key: getattr(self, key) for key in IDENTITY} | {"options": options}

    def __str__(self) -> str:
        where = "" if self.at is None else f" at {self.at:g}"
        return f"{self.dataset} {self.model}{where} seed {self.seed}"


def work(jobs: Sequence[Job], store: Store, budget: Budget) -> list[Row]:
    """Run what `store` lacks until done or the budget is over; all that is finished, in order.

    A run that the budget interrupts goes on from its last epoch in the next call.

    Raises:
        KeyboardInterrupt: the user's own; nothing that was finished is lost.
    """
    missing = [job for job in jobs if store.find(job.row()) is None]
    progress = Progress()
    progress.start(len(missing))
    for job in missing:
        if budget.over:
            break
        progress.say(str(job))
        try:
            with budget:
                run = train(job, store.states)
        except KeyboardInterrupt:
            if not budget.over:
                raise
            break
        store.add(run)
        _state(job, store.states).unlink(missing_ok=True)
        progress.done()
    progress.close()
    found = [store.find(job.row()) for job in jobs]
    return [run for run in found if run is not None]


def train(job: Job, states: Path) -> Row:
    """Train, going on from the state below `states` if there is one; the caller deletes it.

    A solve that fails ends the run and is a result: `stopped` says why, `diverged` is True.

    Raises:
        KeyboardInterrupt: interrupted; the state is kept.
    """
    preset = job.preset
    here = setting(job.dataset, preset, job.seed)
    data = here.data
    states.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(job.seed)
    if job.model in PEERS:
        data = replace(data, x=data.x.to_dense())  # layers of PyG take dense features
        model: torch.nn.Module = build(job.model, data, preset, layers=job.layers)
    else:
        model = grand(data, preset)
    run = fit(model, data, here.graph, here.split, **training_config(preset), label=str(job),
              state=_state(job, states))  # fmt: skip
    if run.stopped == "interrupted":
        raise KeyboardInterrupt
    best = run.best if run.best_epoch >= 0 else None
    return job.row() | {
        "test_accuracy": run.test_accuracy if best else None,
        "val_accuracy": best.val_accuracy if best else None,
        "best_epoch": run.best_epoch,
        "best_time": best.time if best else None,
        "epochs": len(run.history),
        "seconds_per_epoch": run.seconds_per_epoch if run.history else None,
        "seconds": sum(epoch.seconds for epoch in run.history),
        "nfe_forward": best.nfe if best else None,
        "nfe_backward": best.nfe_backward if best else None,
        "alpha": _alpha(model),
        "parameters": sum(p.numel() for p in model.parameters()),
        "diverged": run.stopped is not None,
        "stopped": run.stopped,
    }


def _alpha(model: torch.nn.Module) -> float | None:
    """The learned scale of the diffusion, which decides what step sizes are stable."""
    field = getattr(model, "field", None)
    scale = getattr(field, "scale", field)
    alpha = None if scale is None else float(torch.as_tensor(scale.alpha).detach())
    return alpha if alpha is not None and math.isfinite(alpha) else None


def _state(job: Job, states: Path) -> Path:
    """A file for this very run: with other options the state would not fit."""
    text = json.dumps(job.row(), sort_keys=True)
    return states / hashlib.sha256(text.encode()).hexdigest()[:16]
