"""What a vector field notes as it is evaluated: a solve is of one field, whatever it notes."""

from typing import Any

import torch
from torch import Tensor, nn


class Buffers:
    """The buffers of a module in training, as they are when a solve begins.

    The vectors of a spectral norm, for one, are others after each call. Every evaluation but the
    first, also those that run again in backward, finds them as the first did, and leaves them as it
    did: `with buffers: …`. The solve is then of one function, and changes them once.
    """

    def __init__(self, module: nn.Module) -> None:
        self._start: list[tuple[dict[str, Any], str, Tensor]] = []
        self._left: list[tuple[dict[str, Any], str, Tensor]] = []
        self._is_first = True
        if torch.compiler.is_compiling():
            return
        for owner in module.modules():
            if owner._buffers and owner.training:
                known = owner._buffers.items()
                self._start += [(owner._buffers, n, b.clone()) for n, b in known if b is not None]

    def __enter__(self) -> None:
        if not self._start:
            return
        if self._is_first:
            self._is_first = False
            return
        for buffers, name, start in self._start:
            self._left.append((buffers, name, buffers[name]))
            buffers[name] = start.clone()

    def __exit__(self, *_: object) -> None:
        while self._left:
            buffers, name, left = self._left.pop()
            buffers[name] = left
