"""Triton compiles its kernels or interprets them; which, a process is told before it starts."""

import os
from pathlib import Path

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_TESTS = Path(__file__).parent


def skip_module(file: str) -> None:
    """Leave out a module that needs the other of the two."""
    command = f"pytest {Path(file).relative_to(_TESTS.parents[1])}"
    needed = "interpreter, in a process of its own: TRITON_INTERPRET=1"
    if INTERPRETED:
        needed = "compiler: unset TRITON_INTERPRET and run"
    pytest.skip(f"needs Triton's {needed} {command}", allow_module_level=True)
