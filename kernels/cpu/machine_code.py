"""LLVM IR → machine code in this process, kept on disk in the user's cache folder.

LLVM is driven directly rather than through Numba's decorators: a kernel then compiles in tenths of
a second, loads in milliseconds, and runs on plain threads (see `cpu/rows.py`).
"""

import contextlib
import ctypes
import hashlib
import os
import stat
import tempfile
import threading
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import llvmlite
import llvmlite.binding as llvm

KernelFunction = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)  # releases the GIL

_lock = threading.Lock()
_engines: list[llvm.ExecutionEngine] = []  # machine code lives as long as its engine
_DIGEST_BYTES = 32


def compile_kernel(name: str, source: str) -> Callable[[int, int], None]:
    """The function `name` of the LLVM IR `source`, from the cache if it was compiled before."""
    with _lock:
        machine = _target_machine()
        folder = _cache_folder()
        path = None if folder is None else folder / f"{name}-{_key(source, machine)}.o"
        code = None if path is None else _read(path)
        if code is None:
            code = _compile(source, machine)
            if path is not None:
                _write(path, code)
        engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
        engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        engine.finalize_object()
        _engines.append(engine)
        return KernelFunction(engine.get_function_address(name))


def _target_machine() -> llvm.TargetMachine:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=_host_features(),
        opt=3,
        jit=True,
    )


def has_wide_registers() -> bool:
    """Whether the machine has 32 vector registers of 512 bits."""
    return "+avx512f" in _host_features().split(",")


@lru_cache
def _host_features() -> str:
    return str(llvm.get_host_cpu_features().flatten())


def _compile(source: str, machine: llvm.TargetMachine) -> bytes:
    module = llvm.parse_assembly(source)
    module.verify()
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    # The kernels are vectorised and unrolled as they are written.
    options.loop_vectorization = options.slp_vectorization = options.loop_unrolling = False
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    return bytes(machine.emit_object(module))


def _key(source: str, machine: llvm.TargetMachine) -> str:
    parts = (
        source,
        llvmlite.__version__,
        str(llvm.llvm_version_info),
        machine.triple,
        llvm.get_host_cpu_name(),
        _host_features(),
    )
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _cache_folder() -> Path | None:
    """Where machine code is kept; None where there is no place for it."""
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # no HOME, and a user whom the system does not know, as in containers
        return _temporary_folder()
    return base / "grand_fast" / "kernels"


def _temporary_folder() -> Path | None:
    """A folder of this user alone where everyone may make some: what lies there will be run."""
    try:
        folder = Path(tempfile.gettempdir()) / f"grand_fast-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except (OSError, AttributeError):  # Windows has no getuid
        return None
    is_ours = found.st_uid == os.getuid() and stat.S_IMODE(found.st_mode) & 0o077 == 0
    return folder if is_ours and stat.S_ISDIR(found.st_mode) else None


def _read(path: Path) -> bytes | None:
    try:
        data = path.read_bytes()
    except OSError:
        return None
    digest, code = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
    return code if hashlib.sha256(code).digest() == digest else None


def _write(path: Path, code: bytes) -> None:
    """Written beside its place and renamed: another process sees all of it or nothing."""
    part = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            part = file.name
            file.write(hashlib.sha256(code).digest() + code)
        os.replace(part, path)
        part = None
    except OSError:
        pass  # a cache that cannot be written costs time at the next start, nothing else
    finally:
        if part is not None:
            with contextlib.suppress(OSError):
                os.unlink(part)


def _new_lock() -> None:
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)  # another thread of the parent may have held it
