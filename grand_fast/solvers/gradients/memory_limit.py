"""Binomial checkpointing: a solve of any length in the memory of a few states.

Of n steps a first part is run and only its last state kept; the rest is treated likewise with one
state less. Backward first consumes the rest, then runs the first part anew, all of them free again.
With s states and each step run at most r times beside the first, C(s + r, s) steps are possible.
Reference: Griewank, Walther, Algorithm 799: revolve (2000).
"""

from bisect import bisect
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from math import comb
from typing import Any

import torch
from torch import Tensor

from grand_fast.ops.calls import recompute
from grand_fast.solvers.checks import OptionValueError
from grand_fast.solvers.gradients.checkpoint import Take, run_again
from grand_fast.solvers.gradients.room import Saved
from grand_fast.solvers.solution import Stats, Status
from grand_fast.solvers.solver import Carry
from grand_fast.solvers.time_loop import Problem, Result

# Measured with GRAND-nl, whose operator projects queries and keys again: 10 to 12, of which some is
# memory that is kept for the next result.
_WORK_STATES = 13
# Beside the first. More would take too long, and more of Python's stack than there is.
_MOST_RUNS = 50
State = tuple[Tensor, Carry]
Advance = Callable[[Tensor, Carry], State]


def first_part(n: int, states: int) -> int:
    """How many of `n > 1` steps come first, of which `states ≥ 1` are kept."""
    if states == 1:
        return n - 1
    runs = 1
    while comb(states + runs, states) < n:
        runs += 1
    # What the rest can be, and the first part, if no step is to run more often.
    rest, first = comb(states + runs - 1, states - 1), comb(states + runs - 1, states)
    return min(max(n - rest, 1), first, n - 1)


def least_states(n: int) -> int:
    """Places with which `n` steps need not run more than `_MOST_RUNS` times each."""
    states = 0
    while comb(states + _MOST_RUNS, states) < n:
        states += 1
    return states


def run(steps: Sequence[Advance], state: State, states: int) -> State:
    """All steps, differentiably, with at most `states` kept beside the first."""
    while len(steps) > 1:
        k = first_part(len(steps), states)
        state = _kept(steps[:k], state, states)
        steps, states = steps[k:], max(states - 1, 1)
    return _kept(steps, state, states)


def _kept(steps: Sequence[Advance], state: State, states: int) -> State:
    """Only `state` is kept; the steps run again in backward."""

    def again(x: Tensor, *carry: Tensor) -> State:
        if len(steps) == 1:
            return steps[0](x, carry)
        return run(steps, (x, carry), states)

    # Tensor by tensor: what a tuple holds stays even where all of this runs within another part.
    x, carry = state
    result: State = run_again(again, x, *carry)
    return result


def state_bytes(state: State) -> int:
    """Bytes of a state and what travels with it."""
    return sum(t.numel() * t.element_size() for t in (state[0], *state[1]))


def kept_bytes(step: Take, state: State) -> int:
    """Bytes that autograd keeps of one step: what backward holds while it works on it."""
    saved = Saved(own=(state[0], *state[1]))
    x = state[0].detach().requires_grad_()
    with torch.enable_grad(), recompute(), saved.hooks:
        result = step(x, state[1])
    del result
    return saved.bytes


def states_within(limit: int, work: int, size: int, parts: Sequence[int], more: int = 0) -> int:
    """States that each part of a solve may keep beside its first, all within `limit` bytes.

    work:  bytes that the backward of a step takes.
    size:  of a state.
    parts: steps of each part between output times, whose states stay whatever happens.
    more:  states that stay beside those.

    Raises:
        ValueError: too few fit; the least limit.
    """
    given_out, longer = len(parts) - 1 + more, sum(steps > 1 for steps in parts)
    states = (limit - work) // max(1, size) - given_out
    wanted = longer * least_states(max(parts, default=0))
    if states < wanted:
        least = work + (given_out + wanted) * size
        raise OptionValueError(
            f"integrate: `memory_limit` must be at least {least} bytes for this state, method and "
            f"output times, got {limit}. One step's backward takes {work}."
        )
    return states // max(1, longer)


def checkpoint_within(problem: Problem, limit: int) -> Result:
    """The solve with at most `limit` bytes kept for backward.

    A dry run without a graph comes first. A state between the ends of a step is computed by that
    step once more.
    """
    stats, status, reached, ends, size, work = _dry_run(problem)
    index = {t: i for i, t in enumerate(ends)}
    # The last end of a step before each time that is none
    before = {t: ends[bisect(ends, t) - 1] for t in reached if t not in index}
    stays = {before.get(t, t) for t in reached}
    if status is not Status.SUCCESS:
        # The last state that counts is no output, and differentiable all the same.
        stays.add(ends[-1])
    parts = list(pairwise(sorted(stays)))
    lengths = [index[end] - index[begin] for begin, end in parts]
    states = states_within(limit, work, size, lengths, len(before))
    state: State = problem.x0, problem.solver.start(problem.term, reached[0], problem.x0)
    at = {reached[0]: state}
    advance = [_advance(problem, t, end - t) for t, end in pairwise(ends)]
    for begin, end in parts:
        at[end] = state = run(advance[index[begin] : index[end]], state, states)

    def state_at(t: float) -> Tensor:
        if t in index:
            return at[t][0]
        i = index[before[t]]
        x, carry = at[ends[i]]
        within: Tensor = run_again(partial(_within, problem, t, ends[i], ends[i + 1]), x, *carry)
        return within

    found = [state_at(t) for t in reached]
    if status is not Status.SUCCESS:
        return Result(found, state[0], ends[-1], stats, status)
    return Result(found, found[-1], reached[-1], stats, status)


def _dry_run(problem: Problem) -> tuple[Stats, Status, list[float], list[float], int, int]:
    """What a solve without a graph tells, its states let go.

    Its work and status; the output times reached; the ends of the steps that count, the first of
    them the initial time; bytes of the largest state between steps, which a method with a history
    makes grow; and bytes that the backward of a step takes.
    """
    ends: list[float] = []
    steps: list[tuple[Take, State]] = []  # the first, and that from the largest state if another

    def take(step: Take, x: Tensor, carry: Carry) -> Any:
        if not steps or state_bytes((x, carry)) > state_bytes(steps[-1][1]):
            steps[1:] = [(step, (x, carry))]
        return step(x, carry)

    heard = problem.callbacks.accept

    def accept(t: float, x: Tensor, tau: float) -> None:
        ends.append(t)
        if heard:
            heard(t, x, tau)

    with torch.no_grad():
        result = problem.solve(take, callbacks=problem.callbacks._replace(accept=accept))
    size = max((state_bytes(state) for _, state in steps), default=0)
    # While a step is differentiated its result, its gradients in and out, the state that runs on
    # to it, and what the operators work with are there as well.
    work = max((kept_bytes(*step) for step in steps), default=0) + _WORK_STATES * size
    reached = problem.stops[: len(result.found)]
    return result.stats, result.status, reached, [*ends, result.t], size, work


def _advance(problem: Problem, t: float, tau: float) -> Advance:
    def advance(x: Tensor, carry: Carry) -> State:
        step = problem.solver.step(problem.term, t, x, tau, carry)
        return step.x, step.carry

    return advance


def _within(
    problem: Problem, t: float, start: float, end: float, x: Tensor, *carry: Tensor
) -> Tensor:
    """The state at `t`, within the step from `start` to `end`."""
    tau = end - start
    step = problem.solver.step(problem.term, start, x, tau, carry)
    return problem.solver.interpolate(x, step, tau, (t - start) / tau)
