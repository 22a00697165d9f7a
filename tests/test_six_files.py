"""One operator, one name, six files."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OPERATORS = sorted(
    p.parent.name
    for p in (ROOT / "kernels").glob("*/__init__.py")
    if p.parent.name not in ("cpu", "gpu")  # the engines
)


def test_the_operators_are_found():
    assert {"attention_diffusion", "csr_diffusion", "edge_attention"} <= set(OPERATORS)


@pytest.mark.parametrize("op", OPERATORS)
def test_six_files(op):
    for path in (
        f"kernels/{op}/reference.py",
        f"kernels/{op}/gpu.py",
        f"kernels/{op}/cpu.py",
        f"grand_fast/ops/{op}.py",
        f"tests/ops/test_{op}.py",
        f"bench/ops/bench_{op}.py",
    ):
        assert (ROOT / path).is_file(), path


@pytest.mark.parametrize("op", OPERATORS)
def test_launchers_have_the_same_names_and_arguments(op):
    import inspect
    import sys

    from grand_fast.ops.backends import launchers

    cpu = launchers(op, "cpu")
    reference = launchers(op, "reference")
    names = [n for n in (f"{op}_fwd", f"{op}_bwd") if hasattr(cpu, n)]
    assert names[0] == f"{op}_fwd"
    want = list(inspect.signature(getattr(reference, names[0])).parameters)
    assert list(inspect.signature(getattr(cpu, names[0])).parameters) == want
    assert callable(reference.cost)
    if sys.platform == "linux":
        gpu = launchers(op, "gpu")
        for name in names:
            of_gpu, of_cpu = (
                list(inspect.signature(getattr(m, name)).parameters) for m in (gpu, cpu)
            )
            assert of_gpu == of_cpu
