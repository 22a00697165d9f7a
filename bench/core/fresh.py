"""One measurement in a process of its own: peak memory, and the first call.

Within one process neither can be had twice: pages are reused, and kernels stay compiled.
"""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.core import machine
from bench.core.report import Report

# Enough to compile and load everything, too little to leave pages to be reused.
TINY_NODES = 300

Measured = dict[str, Any]  # what JSON can hold, numbers as a rule, by name
Task = Callable[..., Measured]


def run(task: Task, *, cache: str | None = None, **values: object) -> Measured:
    """Call a function in a fresh process and return what it measured.

    Args:
        task: importable by its module and name; it returns numbers by name.
        cache: the folder of compiled kernels, instead of the user's.
        values: its arguments, which can be pickled.

    Raises:
        RuntimeError: the process failed; its last line of output.
    """
    result = subprocess.run(
        [sys.executable, "-m", "bench.core.fresh"],
        cwd=Path(__file__).parents[2],
        env=os.environ | ({"XDG_CACHE_HOME": cache} if cache else {}),
        input=pickle.dumps((task, values)),
        capture_output=True,
    )
    if result.returncode:
        lines = result.stderr.decode(errors="replace").strip().splitlines()
        raise RuntimeError((lines or [f"exit code {result.returncode}"])[-1])
    measured: Measured = json.loads(result.stdout.splitlines()[-1])
    return measured


def peaks(report: Report, what: str, task: Task, *, runs: int = 1, **given: Any) -> list[Measured]:
    """What so many fresh processes measure; nothing, and why in `report`, where one fails."""
    report.say(f"{what}, memory")
    try:
        return [run(task, **given) for _ in range(runs)]
    except RuntimeError as reason:
        report.skipped.append(f"memory of {what}: {reason}")
        return []


def peak(call: Callable[[], object]) -> Measured:
    """Bytes above those resident before, at the peak of a call, and of the whole process."""
    machine.give_back_memory()  # or pages freed before would be reused, and not be counted
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    call()
    highest = _status("VmHWM")
    return {"bytes": highest - before, "process_bytes": highest}


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


if __name__ == "__main__":
    _task, _values = pickle.load(sys.stdin.buffer)
    print(json.dumps(_task(**_values)))
