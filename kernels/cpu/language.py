"""A small language in which the CPU kernels are written: vectors, arrays and loops → LLVM IR.

A kernel is built by ordinary Python code that runs once per shape: a Python `for` is unrolled,
`Kernel.loop` becomes a loop, and `+ − · /` on `Vec` and `Int` write instructions. A `Vec` has 16
lanes of float32 or 8 of float64; LLVM maps it to one zmm, two ymm, or several NEON registers, so
no compiler is needed at install. Loads and stores take the number of lanes they may touch: the
tail of a row of any length stays inside one masked instruction, and no array needs padding.

    k = Kernel("scale", torch.float32, torch.int32)
    x, y = k.matrix("x"), k.matrix("y")
    with k.tasks() as i:                       # every i in [0, n_tasks), shared by the threads
        y.row(i).store(x.row(i).load(5) * k.splat(2.0), 5)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import llvmlite.ir as ir
import torch

from grand_fast.kernels.cpu.values import (
    FORMATS,
    REGISTER_BYTES,
    Builder,
    Chunk,
    Floats,
    Int,
    Ints,
    Matrix,
    Variable,
    Vec,
    chunks,
)

__all__ = [
    "FORMATS",
    "REGISTER_BYTES",
    "Chunk",
    "Floats",
    "Int",
    "Ints",
    "Kernel",
    "Matrix",
    "Variable",
    "Vec",
    "chunks",
]

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_POINTER = ir.PointerType()


class Kernel(Builder):
    """A kernel under construction: `void name(const int64 *arguments, int64 thread)`.

    Asking for an argument (`matrix`, `vector`, `indices`, `longs`, `number`) declares it;
    `arguments` lists them as (name, "address" | "stride" | "number") for the launcher.
    """

    def __init__(self, name: str, dtype: torch.dtype, index: torch.dtype) -> None:
        super().__init__(name, dtype)
        self.name = name
        self.index = _I32 if index == torch.int32 else _I64
        self.arguments: list[tuple[str, str]] = []
        self._declared: dict[tuple[str, str], ir.Value] = {}
        signature = ir.FunctionType(ir.VoidType(), [_POINTER, _I64])
        self.function = ir.Function(self.module, signature, name)
        # `entry` loads arguments and holds variables; the program itself starts in `body`.
        self._entry = ir.IRBuilder(self.function.append_basic_block("entry"))
        self._body = self.function.append_basic_block("body")
        self.builder.position_at_end(self._body)
        self.thread = Int(self, self.function.args[1])

    def source(self) -> str:
        """The finished kernel as LLVM IR."""
        if not self.builder.block.is_terminated:
            self.builder.ret_void()
            self._entry.branch(self._body)
        return str(self.module)

    # Arguments

    def _argument(self, name: str, kind: str) -> ir.Value:
        key = (name, kind)
        if key not in self._declared:
            slot = ir.Constant(_I64, len(self.arguments))
            arguments = self.function.args[0]
            at = self._entry.gep(arguments, [slot], source_etype=_I64)
            type_ = _POINTER if kind == "address" else _I64
            self._declared[key] = self._entry.load(at, typ=type_)
            self.arguments.append(key)
        return self._declared[key]

    def matrix(self, name: str) -> Matrix:
        """A tensor `[rows, …]` with contiguous rows and any row stride."""
        stride = Int(self, self._argument(name, "stride"))
        return Matrix(Floats(self, self._argument(name, "address")), stride)

    def vector(self, name: str) -> Floats:
        """A contiguous float tensor."""
        return Floats(self, self._argument(name, "address"))

    def indices(self, name: str) -> Ints:
        """A contiguous tensor of the graph's index type."""
        return Ints(self, self._argument(name, "address"), self.index)

    def longs(self, name: str) -> Ints:
        """A contiguous int64 tensor."""
        return Ints(self, self._argument(name, "address"), _I64)

    def number(self, name: str) -> Int:
        """An integer."""
        return Int(self, self._argument(name, "number"))

    # Constants and variables

    def variable(self, value: Vec) -> Variable:
        """A vector that loops may change; LLVM keeps it in a register where it can."""
        return Variable(value, self._entry.alloca(self.vector_type))

    # Control flow

    @contextmanager
    def loop(self, start: Int | int, stop: Int | int, step: int = 1) -> Iterator[Int]:
        """`for i in range(start, stop, step)` in the running kernel."""
        b = self.builder
        start, stop = self.integer(start), self.integer(stop)
        before = b.block
        head, body, after = (b.append_basic_block(f"loop.{n}") for n in ("head", "body", "end"))
        b.branch(head)
        b.position_at_end(head)
        i = b.phi(_I64)
        i.add_incoming(start.value, before)
        b.cbranch(b.icmp_signed("<", i, stop.value), body, after)
        b.position_at_end(body)
        yield Int(self, i)
        i.add_incoming(b.add(i, ir.Constant(_I64, step)), b.block)
        b.branch(head)
        b.position_at_end(after)

    @contextmanager
    def when(self, condition: ir.Value) -> Iterator[None]:
        """`if condition:` in the running kernel."""
        with self.builder.if_then(condition):
            yield

    @contextmanager
    def tasks(self) -> Iterator[Int]:
        """Tasks 0 … n_tasks − 1, each given to the first thread that is free.

        Who runs a task never changes what it writes, so results do not depend on the threads.
        """
        b = self.builder
        counter = self._argument("counter", "address")
        n_tasks = self.number("n_tasks")
        head, body, after = (b.append_basic_block(f"task.{n}") for n in ("head", "body", "end"))
        b.branch(head)
        b.position_at_end(head)
        task = b.atomic_rmw("add", counter, ir.Constant(_I64, 1), "monotonic")
        b.cbranch(b.icmp_signed("<", task, n_tasks.value), body, after)
        b.position_at_end(body)
        yield Int(self, task)
        b.branch(head)
        b.position_at_end(after)
