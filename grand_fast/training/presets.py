"""The options of a training run: `Preset`, the schema of the command line and of TOML files.

Those of the solve and of the attention are declared with them; each says how it is read and what it
does, so that `grand-fast train --help` prints what stands there.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields
from functools import partial
from typing import Any, Literal, get_type_hints

from grand_fast.data.datasets import COMPONENTS, SPLITS, NodeData
from grand_fast.nn import GRAND, Attention
from grand_fast.nn.grand import LAPLACIANS, VARIANTS
from grand_fast.solvers import Solve
from grand_fast.solvers.options import option
from grand_fast.training.loop import fit
from grand_fast.training.option_types import NONE, parser_of
from grand_fast.training.trainer import CRITERIA, OPTIMIZERS

_data = partial(option, group="data")
_model = partial(option, group="model")
_solver = partial(option, group="solver")
_training = partial(option, group="training")
_RANDOM = ("split", "random")
_THINNED = ("variant", "nl-rw", "l")


@dataclass(frozen=True, kw_only=True)
class _Data:
    split: str = _data("random", "planetoid: that of Cora, CiteSeer and PubMed; public: the one "
        "that comes with the data; random: drawn by seed", choices=SPLITS)  # fmt: skip
    labels_per_class: int = _data(20, "training nodes of each class in a random split", low=1,
        needs=_RANDOM)  # fmt: skip
    development: int = _data(1500, "nodes for training and validation in a random split", low=1,
        needs=_RANDOM)  # fmt: skip
    component: str | None = _data(None, "largest: only the largest connected component; all: the "
        "whole graph; by default largest with random splits alone", choices=COMPONENTS)  # fmt: skip
    row_normalize: bool = _data(False, "divide the features of a node by their sum")
    neighbours: int = _data(10, "of each image in the graph of digits", low=1)
    self_loops: float | None = _data(1.0, "weight of the loop appended to each node, or none for "
        "no loops", low=0)  # fmt: skip
    rewiring: Literal["ppr", "heat"] | None = _data(None, "replace the edges by those of a "
        "diffusion: personalised PageRank or heat kernel (Klicpera et al. 2019)")  # fmt: skip
    rewiring_top_k: int | None = _data(None, "edges kept of each node, the strongest", low=1)
    rewiring_threshold: float | None = _data(None, "or smallest strength of a kept edge", above=0)
    rewiring_alpha: float = _data(0.15, "teleport probability of ppr", above=0, below=1)
    rewiring_t: float = _data(5.0, "diffusion time of heat", above=0)

    variant: str = _model("nl", "attention from x(0) (l), from each x(t) (nl), also on a graph "
        "thinned by it (nl-rw), with a learned share of random walk (mixed), or none (laplacian)",
        choices=VARIANTS)  # fmt: skip
    hidden: int = _model(64, "channels of the state", low=1)


@dataclass(frozen=True, kw_only=True)
class _Model:
    laplacian: str = _model("random_walk", "weights of variants laplacian and mixed",
        choices=LAPLACIANS, needs=("variant", "laplacian", "mixed"))  # fmt: skip
    attention_threshold: float | None = _model(None, "of nl-rw and l: keep edges whose attention "
        "at x(0) is above this", low=0, below=1, needs=_THINNED)  # fmt: skip
    attention_quantile: float | None = _model(None, "of nl-rw and l: in training keep edges above "
        "this quantile of it", low=0, below=1, needs=_THINNED)  # fmt: skip
    source: bool = _model(True, "x(0) feeds the diffusion, by a learned beta")
    augment: int = _model(0, "zero channels appended to x(0)", low=0)
    batch_norm: bool = _model(False, "batch normalisation of x(0)")
    encoder_channels: int | None = _model(None, "of a hidden layer in the encoder", low=1)
    mlp: bool = _model(False, "two more linear layers in the encoder")
    fc_out: bool = _model(False, "a linear layer after the diffusion")
    degree_scaling: bool = _model(False, "diffuse D^(-1/2) times what is encoded, and decode "
        "D^(1/2) times the result: with equal attention, the normalisation of GCN")  # fmt: skip
    decoder: bool = _model(True, "a linear layer from the state to the classes; without it "
        "the state itself is the prediction, and hidden the number of classes")  # fmt: skip
    use_labels: bool = _model(False, "training labels are input too: half of them while "
        "training on the other half, all of them for prediction")  # fmt: skip
    dropout: float = _model(0.1, "before the decoder, and between layers of the encoder", low=0,
        below=1)  # fmt: skip
    input_dropout: float = _model(0.5, "before the encoder", low=0, below=1)


@dataclass(frozen=True, kw_only=True)
class _Training:
    kinetic: float = _solver(0.0, "weight of the kinetic energy in the loss", low=0)
    jacobian: float = _solver(0.0, "weight of the squared Jacobian in the loss", low=0)
    early_stop: float = _solver(1.0, "evaluate every step up to X times T and take the time that "
        "is best in validation; 1 evaluates T alone", low=1)  # fmt: skip

    entropy: float = _training(0.0, "weight in the loss of the mean entropy of all predictions, "
        "which makes them decided where no label is known (Grandvalet and Bengio 2004)",
        low=0)  # fmt: skip
    entropy_warmup: int = _training(0, "epochs in which that weight rises, linearly, before it is "
        "whole", low=0)  # fmt: skip
    epochs: int = _training(100, "gradient steps, at most", low=1)
    patience: int | None = _training(None, "stop after as many epochs that were not better in "
        "validation", low=1)  # fmt: skip
    select: str = _training("accuracy", "of validation, chooses the epoch", choices=CRITERIA)
    optimizer: str = _training("adam", "any of torch.optim", choices=tuple(OPTIMIZERS))
    lr: float = _training(0.01, "learning rate", above=0)
    weight_decay: float = _training(5e-3, "of the optimizer", low=0)


def _changed(kind: type, name: str, default: Any) -> Any:
    """An option of `kind` with another default."""
    (metadata,) = (f.metadata for f in fields(kind) if f.name == name)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Preset(_Training, Solve, _Model, Attention, _Data):
    """Options of the data, the model, its attention and solve, and the training."""

    heads: int = _changed(Attention, "heads", 4)
    attention_channels: int | None = _changed(Attention, "attention_channels", 64)
    T: float = _changed(Solve, "T", 4.0)

    @property
    def penalties(self) -> dict[str, float]:
        """Weights of the regularisers that count."""
        given = {"kinetic": self.kinetic, "jacobian": self.jacobian}
        return {name: weight for name, weight in given.items() if weight > 0}

    def keywords_of(self, function: Callable[..., Any]) -> dict[str, Any]:
        """The options that `function` takes by keyword alone."""
        parameters = inspect.signature(function).parameters.values()
        taken = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
        return {name: value for name, value in self.options().items() if name in taken}

    def options(self) -> dict[str, Any]:
        """What a command line or a file may set, as run files hold it."""
        return {name: getattr(self, name) for name in OPTIONS}


def _options() -> dict[str, Field[Any]]:
    found = {f.name: f for f in fields(Preset) if "help" in f.metadata}
    names = list(found)
    # Where the files of runs have had it from the first
    names.insert(names.index("use_labels"), names.pop(names.index("constant_init")))
    return {name: found[name] for name in names}


OPTIONS = _options()
PARSERS = {
    name: parser_of(hint, OPTIONS[name].metadata)
    for name, hint in get_type_hints(Preset).items()
    if name in OPTIONS
}  # of the text of each


def preset(values: Mapping[str, Any]) -> Preset:
    """The defaults with `values` in place of theirs; the word none sets one to None."""
    given: dict[str, Any] = {name: None if v == NONE else v for name, v in values.items()}
    return Preset(**given)


def model_config(data: NodeData, preset: Preset) -> dict[str, Any]:
    """The arguments of `GRAND` for a graph with these features and classes."""
    return {
        "in_channels": data.x.shape[1],
        "hidden_channels": preset.hidden,
        "out_channels": data.num_classes,
        "label_channels": data.num_classes if preset.use_labels else 0,
        "regularizers": list(preset.penalties),
        **preset.keywords_of(GRAND),
    }


def training_config(preset: Preset) -> dict[str, Any]:
    """The options of `fit`, with the penalties that have a weight."""
    return preset.keywords_of(fit) | {"penalties": preset.penalties}
