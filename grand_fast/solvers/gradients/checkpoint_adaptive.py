"""Checkpoints of an adaptive solve: the state of each step alone, not its slope too."""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import get_device_states, set_device_states

from grand_fast.ops.backends import outside_transforms
from grand_fast.ops.calls import recompute
from grand_fast.solvers.gradients.checkpoint import autocast_of
from grand_fast.solvers.gradients.room import Room
from grand_fast.solvers.methods.embedded_pairs import EmbeddedRungeKutta
from grand_fast.solvers.solver import Carry, Step
from grand_fast.solvers.term import AbstractTerm

# Of a state, what an evaluation may keep: one step's stages at a time take six such shares.
_SHARE_KEPT = 1 / 4


class _EnoughError(Exception):
    """All that was saved has been had again."""


class _Part(NamedTuple):
    again: Callable[[Tensor, list[Any]], Any]  # of the state, and of what the part before it gave
    random: tuple[Any, ...]
    saved: int  # tensors, up to its end


class _Region:
    """From the slope at a state to the next state: what it saves for backward is had by running it.

    That slope is also the last of the step before. Run again here, with the stages that use it, it
    need not be kept, and the step before runs no evaluation more for it.
    """

    def __init__(self, x: Tensor) -> None:
        self.x = x.detach().requires_grad_(x.requires_grad)
        self.autocast = autocast_of(x)
        self.parts: list[_Part] = []
        self.saved = 0
        self.found: dict[int, Tensor] = {}

    @_disable_dynamo  # as torch's checkpoint is: what it compiled would save other tensors
    def run(
        self, place: int, function: Callable[..., Any], again: Callable[..., Any], x: Tensor,
        *before: Any,
    ) -> Any:  # fmt: skip
        """Part `place`, instead of one that ran there before; of an attempt that did not count.

        `again` runs in backward, and saves the same.
        """
        self.parts = self.parts[:place]
        self.saved = self.parts[-1].saved if self.parts else 0
        random = torch.get_rng_state(), *get_device_states(x)
        self.parts.append(_Part(again, random, 0))
        with recompute(), saved_tensors_hooks(self._pack, self._unpack):
            result = function(x, *before)
        self.parts[-1] = self.parts[-1]._replace(saved=self.saved)
        return result

    def _pack(self, t: Tensor) -> int:
        self.saved += 1
        return self.saved - 1

    def _unpack(self, i: int) -> Tensor:
        """Held no longer than until it is asked for, once: memory falls as backward goes on."""
        if i not in self.found:
            self.found = self._again()
        return self.found.pop(i)

    @_disable_dynamo
    def _again(self) -> dict[int, Tensor]:
        found: dict[int, Tensor] = {}

        def pack(t: Tensor) -> Tensor:
            found[len(found)] = t.detach()
            if len(found) == self.saved:
                raise _EnoughError
            return t.detach()

        with (
            suppress(_EnoughError), outside_transforms(), torch.enable_grad(), self.autocast,
            recompute(_SHARE_KEPT), saved_tensors_hooks(pack, lambda t: t),
        ):  # fmt: skip
            before: list[Any] = []  # which a part empties as it uses it
            for part in self.parts:
                cpu, devices, states = part.random
                with torch.random.fork_rng(devices):
                    torch.set_rng_state(cpu)
                    set_device_states(devices, states)
                    before.append(part.again(self.x, before))
        if len(found) != self.saved:
            raise RuntimeError(
                "integrate: `term` must do the same whenever it is called with the same state, "
                f"and saved {len(found)} tensors instead of {self.saved}."
            )
        return found


class CheckpointedPair(EmbeddedRungeKutta):
    """The steps of one solve by a pair whose last slope is the next step's first.

    While `room` is left they keep what they save.
    """

    def __init__(self, solver: EmbeddedRungeKutta, room: Room | None = None) -> None:
        super().__init__(
            solver.pair, rtol=solver.rtol, atol=solver.atol, norm=solver.norm, parts=solver.parts
        )
        self.rest, self.constant = solver.rest, solver.constant
        self._plain = solver  # for the regions, which would keep the slopes that are held here
        self._here = self._ahead = (torch.empty(0), _Region(torch.empty(0)))
        self._room = room

    def start(self, term: AbstractTerm, t: float, x: Tensor) -> Carry:
        """The slope at the start."""
        if self._room and self._room.is_left(x):
            return self._plain.start(term, t, x)
        self._ahead = self._enter(term, t, x)
        return (self._ahead[0],)

    def step(self, term: AbstractTerm, t: float, x: Tensor, tau: float, carry: Carry) -> Step:
        """As without checkpoints; a step that did not count is forgotten by the next attempt."""
        if self._room and self._room.is_left(x):
            return self._room.take(x, self._plain.step, term, t, x, tau, carry)
        if carry[0] is self._ahead[0]:
            self._here = self._ahead
        elif carry[0] is not self._here[0]:  # the last slope of a step that kept what it saved
            self._here = carry[0], _begun(x, carry[0])
        first = partial(_stages, self._plain, term, t, tau)
        again = partial(_stages_again, self._plain, term, t, tau)
        y, slopes = self._here[1].run(1, first, again, x, carry[0])
        self._ahead = self._enter(term, t + tau, y)
        return self.taken(x, y, tau, [*slopes, self._ahead[0]])

    def _enter(self, term: AbstractTerm, t: float, x: Tensor) -> tuple[Tensor, _Region]:
        region, term = _Region(x), self.rest or term
        return region.run(0, partial(term.vf, t), partial(_slope, term, t), x), region


def _begun(x: Tensor, slope: Tensor) -> _Region:
    """A region whose first slope is known."""
    region, known = _Region(x), slope.detach().requires_grad_(slope.requires_grad)
    region.run(0, lambda x: slope, lambda x, before: known, x)
    return region


def _slope(term: AbstractTerm, t: float, x: Tensor, before: list[Tensor]) -> Tensor:
    return term.vf(t, x)


def _stages(
    solver: EmbeddedRungeKutta, term: AbstractTerm, t: float, tau: float, x: Tensor, slope: Tensor
) -> tuple[Tensor, list[Tensor]]:
    return solver.stages(term, t, x, tau, (slope,))


def _stages_again(
    solver: EmbeddedRungeKutta,
    term: AbstractTerm,
    t: float,
    tau: float,
    x: Tensor,
    slopes: list[Tensor],
) -> None:
    solver.stages_again(term, t, x, tau, slopes)
