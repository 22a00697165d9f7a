"""Before and after the diffusion: layers of the encoder, and checks of what it is given."""

from numbers import Integral

import torch
from torch import Tensor, nn
from torch.nn import functional


class MLP(nn.Module):
    """Two residual layers, `x ← dropout(x + W relu(x) + b)`, after a dropout."""

    def __init__(self, channels: int, *, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(channels, channels) for _ in range(2)])
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """`[N, channels]` from the same."""
        x = functional.dropout(x, self.dropout, self.training)
        for layer in self.layers:
            x = functional.dropout(x + layer(torch.relu(x)), self.dropout, self.training)
        return x

    def reset_parameters(self) -> None:
        """Start again from random weights."""
        for layer in self.layers:
            layer.reset_parameters()  # type: ignore[operator]


def check_sizes(module: str, *, low: int = 0, **sizes: int) -> None:
    """Each is an int of at least `low`."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, Integral):  # of NumPy as well
            raise TypeError(f"{module}: `{name}` must be an int, got {type(size).__name__}.")
        if size < low:
            raise ValueError(f"{module}: `{name}` must be at least {low}, got {size}.")


def check_no_decoder(module: str, hidden: int, out: int, fc_out: bool) -> None:
    """Without a decoder the state holds the logits."""
    if hidden != out:
        raise ValueError(
            f"{module}: `hidden_channels` must be out_channels={out} with decoder=False, got "
            f"{hidden}: the state holds the logits. Did you mean encoder_channels={hidden} or "
            f"decoder=True?"
        )
    if fc_out:
        raise ValueError(
            f"{module}: `fc_out` must be False with decoder=False, got True: it is a layer before "
            f"the decoder."
        )


def check_labels(module: str, labels: Tensor | None, x: Tensor, channels: int) -> None:
    """There are labels `[N, channels]` just where the model has channels for them."""
    if labels is None:
        if channels:
            raise ValueError(
                f"{module}: `labels` must be given with label_channels={channels}, got None. Pass "
                f"one-hot rows, zeros where a label is unknown."
            )
        return
    if channels == 0:
        raise ValueError(
            f"{module}: `labels` must be None without label_channels, got a tensor. Build the "
            f"model with label_channels=number of classes."
        )
    if tuple(labels.shape) != (x.shape[0], channels):
        remedy = " Did you mean torch.nn.functional.one_hot(labels)?" if labels.dim() == 1 else ""
        raise ValueError(
            f"{module}: `labels` must have shape [N, label_channels] = [{x.shape[0]}, {channels}], "
            f"got {list(labels.shape)}.{remedy}"
        )
