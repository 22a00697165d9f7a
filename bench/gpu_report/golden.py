"""The metrics of every kernel as they should be, in golden.json, and what makes one worse."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton

from bench.core.problem import Shape
from bench.gpu_report.compile import MODELLED
from bench.gpu_report.launches import family, passes
from bench.gpu_report.metrics import Metrics, compiled
from grand_fast.testing import random_graph

PATH = Path(__file__).with_name("golden.json")
UPDATE = "python -m bench gpu-report --update-golden"
# Widths that divide a warp's and those that do not; chunks wider than one warp; one head; halves.
CASES = [
    (Shape(128, 4, 128), torch.float32),
    (Shape(64, 8, 128), torch.float32),
    (Shape(162, 2, 32), torch.float32),
    (Shape(256, 4, 128), torch.float32),
    (Shape(64, 1, 64), torch.float32),
    (Shape(128, 4, 128), torch.bfloat16),
]
_FAMILY_CASE = CASES[0]  # has the kernels of other weightings too

Golden = dict[str, Any]


# Which way a metric gets worse (more, +1, or less, −1), and how far it may, also as a share of what
# it was. What is not here (multiply-adds) says how, not how well.
_RULES = {
    "registers": (+1, 4, 0.0),  # what counts of them is in `warps`
    "spills": (+1, 0, 0.0),
    "shared": (+1, 0, 0.0),
    "warps": (-1, 0, 0.0),
    "wide_percent": (-1, 0.5, 0.0),
    "instructions": (+1, 0, 0.02),
    "shuffles": (+1, 0, 0.0),
    "mufu": (+1, 0.01, 0.0),
    "barriers": (+1, 0, 0.0),
    "bytes_in_flight": (-1, 0, 0.1),
}


@dataclass(frozen=True)
class Difference:
    """Sentences, each naming the kernel, its case and the two values."""

    worse: list[str]
    better: list[str]


def case_name(arch: str, shape: Shape, dtype: torch.dtype) -> str:
    """As golden.json has it: `sm_80 128/4/128 float32`."""
    return f"{arch} {shape} {str(dtype).removeprefix('torch.')}"


def measure(arch: str, shape: Shape, dtype: torch.dtype) -> dict[str, Metrics]:
    """The metrics of each kernel of all operators, by its label, on a graph with hubs."""
    graph = random_graph("hub", 17)
    launches = [launch for some in passes(graph, shape, dtype).values() for launch in some]
    if (shape, dtype) == _FAMILY_CASE:
        launches += family(graph, shape, dtype)
    return {name: kernel.metrics for name, kernel in compiled(launches, arch).items()}


def every_case() -> Iterator[tuple[str, dict[str, Metrics]]]:
    """Each case of golden.json, by its name, as the kernels are now."""
    for arch in MODELLED:
        for shape, dtype in CASES:
            yield case_name(arch, shape, dtype), measure(arch, shape, dtype)


def load() -> Golden:
    """golden.json; of no version and without kernels if it is not there."""
    if not PATH.is_file():
        return {"triton": None, "kernels": {}}
    golden: Golden = json.loads(PATH.read_text(encoding="utf-8"))
    return golden


def is_of_this_compiler(golden: Golden) -> bool:
    """Another version of Triton makes other code of the same kernels."""
    return bool(golden["triton"] == triton.__version__)


def save(found: Mapping[str, Mapping[str, Metrics]]) -> None:
    """Write golden.json, a line per kernel, so that a change shows as one."""
    cases = []
    for case, kernels in found.items():
        lines = [f"   {json.dumps(n)}: {json.dumps(asdict(m))}" for n, m in kernels.items()]
        cases.append(f"  {json.dumps(case)}: {{\n" + ",\n".join(lines) + "\n  }")
    head = f'{{\n "triton": {json.dumps(triton.__version__)},\n "kernels": {{\n'
    PATH.write_text(head + ",\n".join(cases) + "\n }\n}\n", encoding="utf-8")


def missing(case: str, now: Mapping[str, Metrics], golden: Golden) -> list[str]:
    """Kernels that only one of both has: golden.json is then out of date."""
    known = golden["kernels"].get(case, {})
    gone = [f"{case} {name}: no longer launched" for name in sorted(known.keys() - now.keys())]
    return gone + [f"{case} {name}: new" for name in sorted(now.keys() - known.keys())]


def compare(case: str, now: Mapping[str, Metrics], golden: Golden) -> Difference:
    """What is worse and what is better than golden.json has it, of the kernels that both have."""
    difference = Difference([], [])
    known = golden["kernels"].get(case, {})
    for name in sorted(now.keys() & known.keys()):
        for metric, (worse, slack, share) in _RULES.items():
            value, old = getattr(now[name], metric), known[name][metric]
            text = f"{case} {name}: {metric} {old:g} → {value:g}"
            step = worse * (value - old)
            if step > slack + share * old:
                difference.worse.append(text)
            elif step < 0:
                difference.better.append(text)
    return difference
