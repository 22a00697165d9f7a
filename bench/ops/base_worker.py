"""The operators of one tree, run as they are asked for: half of `python -m bench ops --base`.

Run by its path with PYTHONPATH naming a tree that need not have this file: of that tree it uses
public names alone. Each line of standard input is a request in JSON, each line of standard output
its answer; in between it sleeps.

    python base_worker.py TREE GRAPH.npz THREADS
"""

import gc
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Case:
    """An operator with its inputs, the same numbers in every tree.

    Args:
        package: the tree's `grand_fast`.
        graph: its `Graph`; edges sorted by receiver, so that the order of its CSR is theirs.
        case: `op`, `channels`, `heads`, `attention_channels`, and `options` of the operator.
    """

    def __init__(self, package: ModuleType, graph: Any, case: dict[str, Any]) -> None:
        self._operator = getattr(package.ops, case["op"])
        self._graph, self._options = graph, dict(case["options"])
        self._generator = torch.Generator().manual_seed(0)
        self._inputs = self._make_inputs(case)
        self._d_out = self._normal(*self.forward().shape)

    def _make_inputs(self, case: dict[str, Any]) -> dict[str, Tensor]:
        n, sizes = self._graph.num_nodes, ("channels", "heads", "attention_channels")
        d, h, d_att = (case[name] for name in sizes)
        std = 1.5  # scores with a spread of 2: a softmax neither flat nor one-hot
        if case["op"] == "projected_attention_diffusion":
            self._options["heads"] = h
            weight = self._normal(2 * d_att, d, std=std / math.sqrt(d))
            return {"x": self._normal(n, d), "weight": weight,
                    "bias": self._normal(2 * d_att, std=0.1)}  # fmt: skip
        if case["op"] == "csr_diffusion":
            self._options["edge_order"] = "csr"
            degree = self._graph.rowptr.diff().long()
            a = torch.rand(self._graph.num_edges, generator=self._generator)
            return {"x": self._normal(n, d), "a": a / degree.repeat_interleave(degree)}
        q, k = (self._normal(n, h, d_att // h, std=std) for _ in range(2))
        if case["op"] == "edge_attention":
            self._options["edge_order"] = "csr"
            return {"q": q, "k": k}
        return {"x": self._normal(n, d), "q": q, "k": k}

    def _normal(self, *size: int, std: float = 1.0) -> Tensor:
        return torch.randn(*size, generator=self._generator) * std

    @torch.no_grad()
    def forward(self) -> Tensor:
        out: Tensor = self._operator(*self._inputs.values(), self._graph, **self._options)
        return out

    def forward_backward(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        leaves = [t.detach().requires_grad_() for t in self._inputs.values()]
        out = self._operator(*leaves, self._graph, **self._options)
        return out.detach(), torch.autograd.grad(out, leaves, self._d_out)

    def save(self, path: str) -> None:
        """What both modes compute, into a file."""
        out, grads = self.forward_backward()
        values: dict[str, Any] = {"out": self.forward(), "out of forward+backward": out}
        values |= {f"d{name}": grad for name, grad in zip(self._inputs, grads, strict=True)}
        np.savez(path, **values)

    def seconds(self, mode: str, pause: float) -> float:
        """Of a call after a call, or what the caches hold would depend on who ran before.

        Before each a pause, in seconds, in which the threads that spin come to rest.
        """
        call: Callable[[], object] = self.forward if mode == "forward" else self.forward_backward
        time.sleep(pause)
        call()
        time.sleep(pause)
        start = time.perf_counter()
        call()
        return time.perf_counter() - start


def answers(tree: Path, graph_file: str, requests: Iterator[str]) -> Iterator[dict[str, Any]]:
    """First whether the tree is what runs here, then the answer to each request."""
    case = None
    try:
        package, graph = _load(tree, graph_file)
    except Exception as error:
        yield _told(error)
        return
    yield {}
    for line in requests:
        request = json.loads(line)
        try:
            if request["do"] == "prepare":
                case = None  # gives back the last one's memory
                case = Case(package, graph, request["case"])
                case.save(request["path"])
                gc.collect()
                yield {}
            else:
                assert case is not None
                yield {"seconds": case.seconds(request["mode"], request["pause"])}
        except Exception as error:
            yield _told(error)


def _load(tree: Path, graph_file: str) -> tuple[ModuleType, Any]:
    import grand_fast
    import grand_fast.kernels

    for module in (grand_fast, grand_fast.kernels):
        found = Path(module.__file__ or "").resolve()
        if not found.is_relative_to(tree.resolve()):
            raise ImportError(f"{module.__name__} comes from {found.parent}, not from {tree}")
    with np.load(graph_file) as arrays:
        edge_index, num_nodes = torch.from_numpy(arrays["edge_index"]), int(arrays["num_nodes"])
    return grand_fast, grand_fast.Graph.from_edge_index(edge_index, num_nodes)


def _told(error: Exception) -> dict[str, str]:
    line = (str(error).splitlines() or [""])[0]
    return {"error": f"{type(error).__name__}: {line}"}


def _main() -> None:
    tree, graph_file, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    with os.fdopen(os.dup(1), "w") as stdout:
        os.dup2(2, 1)  # whatever else is printed must not come between the answers
        for answer in answers(Path(tree), graph_file, iter(sys.stdin.readline, "")):
            print(json.dumps(answer), file=stdout, flush=True)


if __name__ == "__main__":
    _main()
