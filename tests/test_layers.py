"""The rules of the layers: who may import whom, how long files are, what they are called."""

import ast
import functools
import graphlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Each may import itself and what stands before it. Command line: what lies in `grand_fast/` itself.
LAYERS = ("kernels", "graph", "ops", "solvers", "nn", "terms", "data", "training", "compat",
          "command line", "bench")  # fmt: skip
# These may import of the package nothing but: solvers see terms alone, no graph and no kernel.
ONLY = {"kernels": {"kernels"}, "graph": {"graph", "kernels"}, "solvers": {"solvers", "ops"}}
# Used by all. `testing` only by tests and bench.
BASE = {"grand_fast", "grand_fast._version", "grand_fast.testing"}

# Of bench: `core` is used by `peers`, both by the suites, these by none but the command line and:
BENCH = ("core", "peers")
SUITES_USED_BY = {
    "gpu": {"ops", "gpu_report"},  # the operators' problems and peers; launches, and their model
    "solvers": {"ops"},  # the problem whose operator is f
}

LONGEST = 300
SHORTEST, FEW = 60, 5
# Names that a short file may have: those which others find it by. A module of the public interface
# (`__all__`, the README, the recipes), an operator's reference and benchmark, a suite, and Python's
# and pytest's own.
GIVEN_NAMES = ("__init__.py", "__main__.py", "reference.py", "suite.py", "bench_*.py", "test_*.py")
PUBLIC = {"grand_fast/_version.py", "grand_fast/checkpoint.py", "grand_fast/nn/attention.py",
          "kernels/csr.py", "kernels/gpu/attention/backward.py"}  # fmt: skip

# Files of `kernels/gpu/attention` without one of their name in `kernels/cpu/attention`: what is
# computed there alone.
GPU_ALONE = {"online_softmax"}


def files():
    """Of the package and of bench; the kernels where they are, not through the link."""
    for folder in ("kernels", "grand_fast", "bench"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if not path.is_relative_to(ROOT / "grand_fast" / "kernels"):
                yield path


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "kernels":
        parts = ("grand_fast", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in files()}


@functools.cache
def imported(path):
    """What a file names in its imports, wherever they stand."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def used(module):
    """The modules of ours that one imports."""
    found = set()
    for name in imported(MODULES[module]):
        while name and name not in MODULES:
            name = name.rpartition(".")[0]
        found.add(name)
    return found - {"", module}


def layer_of(module):
    first, _, rest = module.partition(".")
    second = rest.split(".")[0]
    return "bench" if first == "bench" else second if second in LAYERS else "command line"


def test_no_import_runs_upwards():
    wrong = []
    for module, path in MODULES.items():
        layer = layer_of(module)
        may = ONLY.get(layer, set(LAYERS[: LAYERS.index(layer) + 1]))
        if module not in BASE:
            wrong += [(module, m) for m in used(module) - BASE if layer_of(m) not in may]
        if layer != "bench" and "grand_fast.testing" in used(module):
            wrong.append((module, "grand_fast.testing"))
        roots = {name.split(".")[0] for name in imported(path)}
        wrong += [(module, root) for root in roots & {"kernels", "tests"}]
    assert not wrong


def test_suites_of_bench_know_what_lies_below_them():
    wrong = []
    for module in MODULES:
        folder = module.removeprefix("bench.").split(".")[0]
        may = {*BENCH, folder, *SUITES_USED_BY.get(folder, ())}
        if folder in BENCH:
            may = set(BENCH[: BENCH.index(folder) + 1])
        elif folder == "__main__":
            may = {"core"}
        if module.startswith("bench."):
            others = [other for other in used(module) if other.startswith("bench.")]
            wrong += [(module, other) for other in others if other.split(".")[1] not in may]
    assert not wrong


def test_there_is_no_circle():
    graph = {module: used(module) - {"grand_fast"} for module in MODULES}
    list(graphlib.TopologicalSorter(graph).static_order())  # CycleError names them


def test_engines_import_their_compiler_alone():
    wrong = []
    for module, path in MODULES.items():
        of_gpu = path.name == "gpu.py" or path.is_relative_to(ROOT / "kernels" / "gpu")
        of_cpu = layer_of(module) == "kernels" and not of_gpu and path.name != "reference.py"
        may = {"triton"} if of_gpu else {"numba", "llvmlite"} if of_cpu else set()
        if layer_of(module) != "bench":
            roots = {name.split(".")[0] for name in imported(path)}
            wrong += [(module, c) for c in roots & {"triton", "numba", "llvmlite"} - may]
    assert not wrong


def test_only_the_dispatcher_names_backends():
    wrong = []
    for module, path in MODULES.items():
        if layer_of(module) not in ("kernels", "bench") and path.name != "backends.py":
            wrong += [(module, n) for n in imported(path) if n.endswith((".gpu", ".cpu"))]
    assert not wrong


def test_what_has_an_underscore_stays_in_its_folder():
    wrong = []
    for module, path in MODULES.items():
        parts = path.relative_to(ROOT).parent.parts
        folder = ".".join(("grand_fast", *parts) if parts[0] == "kernels" else parts)
        for name in imported(path):
            owner, private, _ = name.partition("._")
            is_ours = owner.split(".")[0] in ("grand_fast", "bench") and not name.endswith("__")
            if owner in MODULES and MODULES[owner].name != "__init__.py":
                owner = owner.rpartition(".")[0]  # a private name of a module: its folder's
            if is_ours and private and owner != folder:
                wrong.append((module, name))
    assert not wrong


def lines(path):
    return len(path.read_text().splitlines())


def test_no_file_is_long():
    long = {str(p.relative_to(ROOT)): lines(p) for p in files() if lines(p) > LONGEST}
    assert not long


def test_few_files_are_short():
    short = {str(p.relative_to(ROOT)): lines(p) for p in files() if lines(p) < SHORTEST}
    short = {n: s for n, s in short.items() if not any(Path(n).match(g) for g in GIVEN_NAMES)}
    short = {n: size for n, size in short.items() if n not in PUBLIC}
    assert len(short) <= FEW, short


def test_both_engines_call_a_thing_the_same():
    cpu, gpu = (
        {path.stem for path in (ROOT / "kernels" / engine / "attention").glob("*.py")}
        for engine in ("cpu", "gpu")
    )
    assert {"normalizer", "scores"} <= cpu & gpu
    assert gpu - cpu <= GPU_ALONE, gpu - cpu - GPU_ALONE


def test_the_bare_name_is_refused():
    spec = importlib.util.spec_from_file_location("kernels", ROOT / "kernels" / "__init__.py")
    with pytest.raises(ImportError, match="grand_fast.kernels"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_importing_the_package_loads_no_backend():
    heavy = ("triton", "llvmlite", "torch_geometric", "sklearn", "matplotlib", "scipy")
    code = f"import sys, grand_fast; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
