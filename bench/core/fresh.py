"""One measurement in a process of its own: peak memory, and the first call.

Within one process neither can be had twice: pages are reused, and kernels stay compiled.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from bench.core import graphs, machine
from bench.core.harness import timed
from bench.core.problem import MODES, Competitor, Mode, Problem, Shape, runner

# Enough to compile and load everything, too little to leave pages to be reused.
TINY_NODES = 300


def run(task: str, values: dict[str, Any], *, cache: str | None = None) -> dict[str, float]:
    """Run a task below in a fresh process and return what it measured.

    Args:
        task: a name in `TASKS`.
        values: its arguments; a `Shape` among them is passed on.
        cache: the folder of compiled kernels, instead of the user's.

    Raises:
        RuntimeError: the process failed; its last line of output.
    """
    plain = {k: asdict(v) if isinstance(v, Shape) else v for k, v in values.items()}
    environment = os.environ | ({"XDG_CACHE_HOME": cache} if cache else {})
    result = subprocess.run(
        [sys.executable, "-m", "bench.core.fresh", task, json.dumps(plain)],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
    )
    if result.returncode:
        last = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
        raise RuntimeError(last)
    measured: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return measured


def first_call(shape: Shape) -> dict[str, float]:
    """Seconds of the first forward+backward of `attention_diffusion`, on a tiny graph."""
    module = import_module("bench.ops.bench_attention_diffusion")
    problem = module.setup(graphs.load("random", nodes=TINY_NODES), shape)
    call = runner(module.ours(problem), problem, "forward+backward")
    return {"seconds": timed(call)}


def peak_memory(
    op: str, competitor: str, mode: Mode, shape: Shape, graph: str, nodes: int | None
) -> dict[str, float]:
    """Bytes above inputs and graph at the peak of one call."""
    module = import_module(f"bench.ops.bench_{op}")
    chosen: Competitor = next(c for c in module.COMPETITORS if c.name == competitor)
    tiny = module.setup(graphs.load("random", nodes=TINY_NODES), shape)
    for each in MODES:
        runner(chosen.make(tiny), tiny, each)()
    problem: Problem = module.setup(graphs.load(graph, nodes=nodes), shape)
    return _peak(runner(chosen.make(problem), problem, mode))


def tuned_peak_memory(dataset: str, competitor: str, mode: Mode) -> dict[str, float]:
    """The same of one evaluation in a tuned configuration."""
    tuned = import_module("bench.tuned.competitors")
    configuration = tuned.BY_DATASET[dataset]
    make = tuned.COMPETITORS[competitor]
    tiny = tuned.setup(configuration, graphs.load("random", nodes=TINY_NODES))
    for each in MODES:
        runner(make(tiny), tiny, each)()
    problem = tuned.setup(configuration, tuned.load_graph(configuration))
    return _peak(runner(make(problem), problem, mode))


def solve_peak_memory(
    solver: str, steps: int, shape: Shape, graph: str, nodes: int | None,
    memory_limit: int | None = None,
) -> dict[str, float]:  # fmt: skip
    """The same of a solve, forward+backward; `memory_limit` as in `integrate`."""
    solves = import_module("bench.solvers.problem")
    make = solves.SOLVERS[solver].make
    if memory_limit is not None:
        make = solves.ours("checkpoint", memory_limit)
    tiny = solves.setup(graphs.load("random", nodes=TINY_NODES), shape)
    runner(solves.SOLVERS[solver].make(tiny, steps), tiny, "forward+backward")()
    problem = solves.setup(graphs.load(graph, nodes=nodes), shape)
    return _peak(runner(make(problem, steps), problem, "forward+backward"))


def model_peak_memory(dataset: str, variant: str, competitor: str) -> dict[str, float]:
    """The same of an epoch of training a whole model."""
    models = import_module("bench.models.epoch")
    problem = models.setup(dataset, variant)
    make = models.competitors(problem)[competitor]
    tiny = models.tiny(dataset, problem.preset)
    models.epoch(tiny, make(tiny))()
    return _peak(models.epoch(problem, make(problem)))


def step_peak_memory(
    solver: str, method: str, size: list[int], differentiated: bool
) -> dict[str, float]:
    """The same of a solve in which f is a copy of the state, of this size."""
    step = import_module("bench.solvers.step")

    def call(x: torch.Tensor) -> None:
        with torch.set_grad_enabled(differentiated):
            y = step.solve(solver, method, x, step.Copies())
        if differentiated:
            torch.autograd.grad(y, x, torch.ones_like(y))

    call(torch.randn(size[0], 1, requires_grad=differentiated))
    x = torch.randn(size, requires_grad=differentiated)
    return _peak(lambda: call(x))


def _peak(call: Callable[[], object]) -> dict[str, float]:
    machine.give_back_memory()  # or pages freed by `make` would be reused, and not be counted
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    call()
    peak = _status("VmHWM")
    return {"bytes": peak - before, "process_bytes": peak}


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


TASKS = {
    "first_call": first_call,
    "peak_memory": peak_memory,
    "tuned_peak_memory": tuned_peak_memory,
    "solve_peak_memory": solve_peak_memory,
    "model_peak_memory": model_peak_memory,
    "step_peak_memory": step_peak_memory,
}


def _main() -> None:
    parser = argparse.ArgumentParser(prog="bench.core.fresh")
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("values", type=json.loads)
    options = parser.parse_args()
    values = options.values
    if "shape" in values:
        values["shape"] = Shape(**values["shape"])
    print(json.dumps(TASKS[options.task](**values)))


if __name__ == "__main__":
    _main()
