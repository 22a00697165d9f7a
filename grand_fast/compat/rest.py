"""What an attention layer itself returns, computed when somebody reads it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from grand_fast.compat.active import paused
from grand_fast.compat.deferred import AbstractRecipe, defer
from grand_fast.compat.projections import projections
from grand_fast.compat.state import State

# Of an item: its shape, with N and E for the numbers of nodes and edges; of several, theirs; None
Kind = tuple[str | int, ...] | list[Any] | None


def kind_of(item: Any, sizes: dict[int, str]) -> Kind:
    """What is known of an item without its values; `sizes` names those that are N and E.

    Raises:
        TypeError: it is nothing that can be put off.
    """
    if item is None:
        return None
    if isinstance(item, Tensor) and item.is_floating_point():
        return tuple(sizes.get(n, n) for n in item.shape)
    if isinstance(item, tuple | list):
        return [kind_of(part, sizes) for part in item]
    raise TypeError(f"it returns a {type(item).__name__}")


class Rest:
    """The results of a layer's own forward, bit for bit, for whoever reads one.

    They come from one run, when the first is read, in the mode of autograd of the call.

    Args:
        state: what the layer held at the call.
        projected: its queries and keys, which nobody else holds.
    """

    def __init__(
        self,
        layer: nn.Module,
        forward: Callable[..., Any],
        x: Tensor,
        edge: Tensor,
        state: State,
        projected: tuple[Tensor, Tensor],
    ):
        self.layer, self.forward, self.x, self.edge = layer, forward, x, edge
        self.inputs = (x, *layer.parameters())
        self._versions = [(t, t._version) for t in (x, edge) if not t.is_inference()]
        self._state, self._projected = state, projected
        self._results: tuple[Any, ...] | None = None
        self._first: int | None = None  # version of the weights when they were new

    def can_run(self) -> bool:
        """Whether what they are computed from is as it was at the call."""
        if any(t._version != version for t, version in self._versions):
            return False
        try:
            if not State(self.layer).is_like(self._state, parameters=True):
                return False
        except TypeError:
            return False
        with torch.no_grad(), torch.autocast(self.x.device.type, enabled=False):
            again = projections(self.layer, self.x)  # what is written to `.data` has no version
        return all(
            torch.equal(_bits(a), _bits(b)) for a, b in zip(again, self._projected, strict=True)
        )

    def results(self, recipe: AbstractRecipe) -> tuple[Any, ...]:
        """All of them; a recipe of the same call knows the mode."""
        if self._results is None:
            with recipe.mode():
                self._results = self.run(self.x)
        return self._results

    def weights(self, recipe: AbstractRecipe) -> Tensor | None:
        """The weights, unless they can no longer be had as they were at the call."""
        if self._results is None and not self.can_run():
            return None
        found: Tensor = self.results(recipe)[0]
        version = None if found.is_inference() else found._version
        if self._first is None:
            self._first = version
        return found if version is not None and version == self._first else None

    def run(self, x: Tensor) -> tuple[Any, ...]:
        """All of them, anew, from the state or what autograd has kept of it.

        Raises:
            RuntimeError: the layer's input has been written to, or the layer is another.
        """
        if not self.can_run():
            raise RuntimeError(
                f"grand_fast.compat: a result of {type(self.layer).__name__} is computed when it "
                "is read, and the layer's input, or what it holds, has been changed since. "
                "Read it before, or leave the layer as it was: patch(attention=False)."
            )
        with paused():
            results = self.forward(self.layer, x, self.edge)
        return results if isinstance(results, tuple) else (results,)

    def stand_in(self, place: int, kind: Kind, sizes: dict[str, int]) -> Any:
        """For the result at a place: a deferred tensor, or a sequence."""
        if kind is None:
            return None
        item = _Item(self, place)
        if isinstance(kind, list):
            return _Several(item, len(kind))
        return defer(item, [sizes[n] if isinstance(n, str) else n for n in kind], self.x)


def _bits(t: Tensor) -> Tensor:
    return t.detach().view(torch.int64 if t.dtype == torch.float64 else torch.int32)


class _Item(AbstractRecipe):
    def __init__(self, rest: Rest, place: int) -> None:
        super().__init__()
        self.rest, self.place, self.inputs = rest, place, rest.inputs

    def compute(self, *inputs: Tensor | None) -> Any:
        return self.rest.run(inputs[0])[self.place]  # type: ignore[arg-type]

    def value(self) -> Any:
        return self.rest.results(self)[self.place]


class _Several(Sequence[Any]):
    """A tuple of results, made when one is read."""

    def __init__(self, item: _Item, length: int) -> None:
        self._item, self._length = item, length
        self._made: Any = None

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        if self._made is None:
            self._made = self._item.value()
        return self._made[index]
