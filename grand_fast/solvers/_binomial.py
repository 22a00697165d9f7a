"""Binomial checkpointing: a solve of any length in the memory of a few states.

Of n steps a first part is run and only its last state kept; the rest is treated likewise with one
place less. Backward first consumes the rest, then runs the first part anew, all places free again.
With s places and each step run at most r times beside the first, C(s + r, s) steps are possible.
Reference: Griewank, Walther, Algorithm 799: revolve (2000).
"""

from collections.abc import Callable, Sequence
from math import comb

import torch
from torch import Tensor

from grand_fast.ops._lean import lean
from grand_fast.solvers._adjoint import ADJOINTS, run_again
from grand_fast.solvers._loop import Callbacks
from grand_fast.solvers._problem import Problem, Result
from grand_fast.solvers._solution import Status
from grand_fast.solvers._solver import Carry

# Measured with GRAND-nl, whose operator projects queries and keys again: 10 to 12, of which some is
# memory that is kept for the next result.
_WORK_STATES = 13
State = tuple[Tensor, Carry]
Advance = Callable[[Tensor, Carry], State]


def first_part(n: int, places: int) -> int:
    """How many of `n > 1` steps come first, with `places ≥ 1` for states."""
    if places == 1:
        return n - 1
    runs = 1
    while comb(places + runs, places) < n:
        runs += 1
    # What the rest can be, and the first part, if no step is to run more often.
    rest, first = comb(places + runs - 1, places - 1), comb(places + runs - 1, places)
    return min(max(n - rest, 1), first, n - 1)


def run(steps: Sequence[Advance], state: State, places: int) -> State:
    """All steps, differentiably, with at most `places` states kept beside the first."""
    if not torch.is_grad_enabled():
        for step in steps:
            state = step(*state)
        return state
    if len(steps) == 1:
        return _kept(steps, state, places)
    k = first_part(len(steps), places)
    state = _kept(steps[:k], state, places)
    return run(steps[k:], state, max(places - 1, 1))


def _kept(steps: Sequence[Advance], state: State, places: int) -> State:
    """Only `state` is kept; the steps run again in backward."""

    def again(x: Tensor, carry: Carry) -> State:
        if len(steps) == 1:
            return steps[0](x, carry)
        return run(steps, (x, carry), places)

    result: State = run_again(again, *state)
    return result


def kept_bytes(step: Advance, state: State) -> int:
    """Bytes that autograd keeps of one step: what backward holds while it works on it."""
    kept: dict[int, int] = {}
    own = {t.untyped_storage().data_ptr() for t in (state[0], *state[1])}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        # Leaves that want gradients are there anyway.
        if not (t.is_leaf and t.requires_grad) and storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    x = state[0].detach().requires_grad_()
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
    with torch.enable_grad(), lean(), hooks:
        result = step(x, state[1])
    del result
    return sum(kept.values())


def places_within(limit: int, step: Advance, state: State) -> int:
    """States that may be kept so that they and one step's backward stay within `limit` bytes.

    Raises:
        ValueError: not even one fits; the least limit.
    """
    size = sum(t.numel() * t.element_size() for t in (state[0], *state[1]))
    # While a step is differentiated its result, its gradients in and out, the state that runs on
    # to it, and what the operators work with are there as well.
    work = kept_bytes(step, state) + _WORK_STATES * size
    places = (limit - work) // max(1, size)
    if places < 1:
        raise ValueError(
            f"integrate: `memory_limit` must be at least {work + size} bytes for this state and "
            f"method, got {limit}. One step's backward takes {work}."
        )
    return places


def limited(problem: Problem, limit: int) -> Result:
    """The solve with at most `limit` bytes kept for backward.

    The steps of an adaptive method are found by a solve without a graph, and then taken again.
    Every output time must end a step.
    """
    stops, x = problem.stops, problem.x0
    result, ends = _ends(problem)
    if result.status is not Status.SUCCESS:
        return result
    if not set(stops) <= set(ends):
        raise ValueError(
            "integrate: `memory_limit` must come with `times` at the ends of steps, got others. "
            "Use end='clamp', or times that are multiples of step_size."
        )
    carry = problem.solver.start(problem.term, stops[0], x)
    grid = dict(zip(ends, range(len(ends)), strict=True))
    advance = [_advance(problem, t, end - t) for t, end in zip(ends, ends[1:], strict=False)]
    found = [x]
    if advance:
        # States that are given out stay whatever happens.
        places = places_within(limit, advance[0], (x, carry)) - (len(stops) - 2)
        for begin, end in zip(stops, stops[1:], strict=False):
            part = advance[grid[begin] : grid[end]]
            x, carry = run(part, (x, carry), max(1, places // (len(stops) - 1)))
            found.append(x)
    return result._replace(found=found, x=x)


def _ends(problem: Problem) -> tuple[Result, list[float]]:
    """A solve without a graph that keeps no state; the ends of its steps."""
    ends: list[float] = []

    def keep(t: float, x: Tensor, tau: float) -> None:
        ends.append(t)

    with torch.no_grad():
        result = problem.march(ADJOINTS["direct"], callbacks=Callbacks(accept=keep))
    return result, [*ends, result.t]


def _advance(problem: Problem, t: float, tau: float) -> Advance:
    def advance(x: Tensor, carry: Carry) -> State:
        step = problem.solver.step(problem.term, t, x, tau, carry)
        return step.x, step.carry

    return advance
