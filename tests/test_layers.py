"""The import direction: kernels → ops → solvers → nn → command line and benchmarks."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted([*(ROOT / "kernels").rglob("*.py"), *(ROOT / "grand_fast").glob("*.py"),
                *(p for name in ("graph", "ops", "solvers", "nn")
                  for p in (ROOT / "grand_fast" / name).rglob("*.py"))])  # fmt: skip

# What each layer may import of grand_fast. solvers see terms alone: no graph, no kernel.
ALLOWED = {
    "kernels": {"kernels"},
    "graph": {"kernels", "graph"},
    "ops": {"kernels", "graph", "ops"},
    "solvers": {"ops", "solvers"},
    "nn": {"graph", "ops", "solvers", "nn"},
}
TOP = {"kernels", "graph", "ops", "solvers", "nn"}


def layer_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0] if parts[0] == "kernels" else parts[1]


def imported(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_arrows(path):
    tree = ast.parse(path.read_text())
    layer = layer_of(path)
    names = imported(tree)
    of_gpu = path.name == "gpu.py" or path.is_relative_to(ROOT / "kernels" / "gpu")
    assert not any(n.split(".")[0] in ("kernels", "bench", "tests") for n in names)
    if layer != "testing":
        assert not any(n.startswith("grand_fast.testing") for n in names)
    for name in names:
        parts = name.split(".")
        if parts[0] == "grand_fast" and len(parts) > 1 and layer in ALLOWED:
            assert parts[1] in ALLOWED[layer] or parts[1] not in TOP, f"{layer} imports {name}"
            if layer in ("kernels", "graph", "solvers"):
                assert parts[1] in ALLOWED[layer], f"{layer} imports {name}"
        if parts[0] == "triton":
            assert of_gpu, f"{path} imports Triton"
        if parts[0] in ("numba", "llvmlite"):
            assert layer == "kernels" and not of_gpu and path.name != "reference.py"


def test_what_has_an_underscore_stays_in_its_folder():
    bench = sorted((ROOT / "bench").rglob("*.py"))
    for path in [*FILES, *bench]:
        parts = path.relative_to(ROOT).parent.parts
        folder = ".".join(("grand_fast", *parts) if parts[0] == "kernels" else parts)
        for name in imported(ast.parse(path.read_text())):
            owner, private, _ = name.partition("._")
            if owner.split(".")[0] in ("grand_fast", "bench") and not name.endswith("__"):
                assert not private or owner == folder, f"{path}: {name}"


def test_only_the_dispatcher_names_backends():
    for path in FILES:
        if layer_of(path) == "kernels" or path.name == "backends.py":
            continue
        for name in imported(ast.parse(path.read_text())):
            assert not name.endswith((".gpu", ".cpu")), f"{path}: {name}"


def test_the_bare_name_is_refused():
    import importlib.util

    spec = importlib.util.spec_from_file_location("kernels", ROOT / "kernels" / "__init__.py")
    with pytest.raises(ImportError, match="grand_fast.kernels"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_importing_the_package_loads_no_backend():
    import subprocess
    import sys

    heavy = ("triton", "llvmlite", "torch_geometric", "sklearn", "matplotlib", "scipy")
    code = f"import sys, grand_fast; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
