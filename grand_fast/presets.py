"""What `grand-fast train` uses where the command line says nothing: one preset a data set.

They start from the tuned values of the paper's released code, adapted to fixed Runge–Kutta steps
and scaled-dot softmax attention. Those of digits and Cora were then searched by hand, by validation
accuracy alone; the others were changed where a single try on validation accuracy said so.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Preset:
    """Options of the data, the model and the training.

    Attributes:
        split: `"planetoid"`, the published one on the whole graph, or `"random"`, drawn from the
            largest connected component by seed.
        labels_per_class, development: training nodes of each class, and nodes that training and
            validation share, in a random split.
        row_normalize: whether the features of a node are divided by their sum.
        neighbours: of each image in the graph of `digits`.
        self_loops: weight of the loop appended to each node, or None for no loops.
        hidden, heads, attention_channels: sizes of the state and of its attention.
        T, step_size: diffusion time, and step of methods with fixed steps.
        rtol, atol, tol_scale: tolerances of methods that choose their steps, see
            `grand_fast.integrate`.
        adjoint, tol_scale_adjoint, memory_limit: how the solve is differentiated, see
            `grand_fast.nn.GRAND`.
        source: whether `x(0)` feeds the diffusion.
        epochs, lr, weight_decay, optimizer: of the training.
    """

    split: str = "random"
    labels_per_class: int = 20
    development: int = 1500
    row_normalize: bool = False
    neighbours: int = 10
    self_loops: float | None = 1.0
    variant: str = "nl"
    method: str = "rk4"
    hidden: int = 64
    heads: int = 4
    attention_channels: int = 64
    T: float = 4.0
    step_size: float = 1.0
    rtol: float | None = None
    atol: float | None = None
    tol_scale: float | None = None
    adjoint: str = "checkpoint"
    tol_scale_adjoint: float | None = None
    memory_limit: int | None = None
    source: bool = True
    dropout: float = 0.1
    input_dropout: float = 0.5
    epochs: int = 100
    lr: float = 0.01
    weight_decay: float = 5e-3
    optimizer: str = "adam"


PRESETS: dict[str, Preset] = {
    "digits": Preset(
        labels_per_class=10, development=400, T=20.0, step_size=2.0, source=False, dropout=0.2,
        input_dropout=0.1, epochs=80, lr=0.03, weight_decay=0.001,
    ),
    "Cora": Preset(
        split="planetoid", row_normalize=True, hidden=80, heads=8, attention_channels=128, T=18.0,
        step_size=2.0, dropout=0.5, input_dropout=0.8, epochs=200, lr=0.005,
    ),
    "CiteSeer": Preset(
        split="planetoid", row_normalize=True, hidden=80, heads=8, attention_channels=32, T=18.0,
        step_size=2.0, dropout=0.5, input_dropout=0.8, epochs=200, lr=0.005,
    ),
    "PubMed": Preset(
        split="planetoid", row_normalize=True, hidden=128, heads=1, attention_channels=16, T=13.0,
        step_size=2.0, dropout=0.1, input_dropout=0.5,
    ),
    "CoauthorCS": Preset(
        development=5000, hidden=64, heads=4, attention_channels=32, T=3.0, self_loops=None,
        source=False, dropout=0.5, epochs=60, lr=0.005, weight_decay=0.0047, optimizer="rmsprop",
    ),
    "Computers": Preset(
        hidden=128, heads=4, attention_channels=64, T=3.25, source=False, input_dropout=0.6,
        lr=0.0035, weight_decay=0.0077,
    ),
    "Photo": Preset(
        hidden=64, heads=4, attention_channels=64, T=3.58, source=False, dropout=0.465,
        input_dropout=0.43, lr=0.0056, weight_decay=0.0047,
    ),
}  # fmt: skip


def preset(dataset: str, **given: object) -> Preset:
    """The preset of a data set with the options that are given (not None) in place of its own."""
    chosen = {name: value for name, value in given.items() if value is not None}
    return replace(PRESETS[dataset], **chosen)  # type: ignore[arg-type]
