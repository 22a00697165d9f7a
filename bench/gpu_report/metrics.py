"""What the machine code of one launch says about itself: exact, and the same on every machine."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from bench.gpu_report import sass
from bench.gpu_report.compile import Launch, Resources, compile_launch, disassembly, resources
from bench.gpu_report.hardware import GPUS, resident_programs

FP = r"[FH]FMA|[FH]MUL|[FH]ADD"
_WIDE = 16  # bytes: 128 bits a lane


@dataclass(frozen=True)
class Metrics:
    """Of one compiled kernel; counts are per edge slot, of all its gather loops together.

    An edge slot is a place for an edge in a turn of the loop: the last turn of a piece leaves some
    empty. A row swept twice has two loops, and an edge of it a slot in each.

    spills: instructions that move a spilled register. shared: bytes per program. warps: resident in
    a multiprocessor. wide_percent: of the bytes that the loops load, those in loads of 128 bits;
    column indices are narrow. barriers: per turn. bytes_in_flight: per warp, the most of any loop.
    """

    registers: int
    spills: int
    shared: int
    warps: int
    wide_percent: float
    instructions: float
    fp: float
    shuffles: float
    mufu: float
    barriers: float
    bytes_in_flight: int


@dataclass(frozen=True)
class Kernel:
    """The machine code of a launch for one target: its gather loops, and the rest."""

    launch: Launch
    arch: str
    used: Resources
    code: list[sass.Instruction]

    @cached_property
    def loops(self) -> list[list[sass.Instruction]]:
        """The innermost loops that load from global memory; all of it if there is none.

        Of two that exclude each other in a program, the longer one: the other is for cut rows.
        """
        return [self.code[s.start : s.stop] for s in self._counted] or [self.code]

    @cached_property
    def rest(self) -> list[sass.Instruction]:
        """What a program does once: outside of loops, on its longest way through those counted."""
        if not self._spans:
            return []
        inside = {at for span in self._spans for at in span}
        path = sass.longest_path(self.code, self._counted)
        return [self.code[at] for at in path if at not in inside]

    @property
    def _counted(self) -> list[range]:
        is_one = self.launch.kwargs.get("IS_ONE_SWEEP")
        return [max(self._spans, key=len)] if is_one else self._spans

    @cached_property
    def _spans(self) -> list[range]:
        spans = sass.innermost_loops(self.code)
        return [s for s in spans if any(self.code[at].is_load for at in s)]

    @property
    def metrics(self) -> Metrics:
        """Its exact counts."""
        loops, warps = self.loops, self.used.warps
        body = [instruction for loop in loops for instruction in loop]

        def per_slot(number: float) -> float:
            return round(number * warps / self.launch.slots, 3)

        loaded = sass.load_bytes(body)
        wide = sass.load_bytes(body, at_least=_WIDE)
        return Metrics(
            registers=self.used.registers,
            spills=sass.count(self.code, "LDL|STL"),
            shared=self.used.shared,
            warps=resident_programs(self.used, GPUS[self.arch]) * warps,
            wide_percent=round(100 * wide / loaded, 1) if loaded else 100.0,
            instructions=per_slot(len(body)),
            fp=per_slot(sass.count(body, FP)),
            shuffles=per_slot(sass.count(body, "SHFL")),
            mufu=per_slot(sass.count(body, "MUFU")),
            barriers=float(sass.count(body, r"BAR\.|SYNCS")),
            bytes_in_flight=max(sass.bytes_in_flight(loop) for loop in loops),
        )


def label(launch: Launch) -> str:
    """Name of the kernel and its switches that are on: `csr_diffusion_fwd (scaled, slot)`."""
    given, name = launch.arguments, launch.name.removeprefix("_").removesuffix("_kernel")
    on: list[str] = []
    if (weighting := given.get("weighting")) is not None:  # in what it differs from the paper's
        function = weighting.function.value
        on += [function] if function != "identity" else []
        on += ["squareplus"] if weighting.top is not None else []
        on += ["edge weight"] if weighting.edge_weight is not None else []
    on += [given["source"]] if "source" in given else []
    if (field := given.get("field")) is not None:
        on += (["dx"] if "bwd" in name else []) + (["scaled"] if field.alpha is not None else [])
    optional = ("edge_key", "edge_value", "dw", "slot")
    on += [text for text in optional if given.get(f"{text}_ptr") is not None]
    on += [
        name.split("_", 1)[1].lower()
        for name, value in launch.kwargs.items()
        if name.startswith(("HAS_", "IS_", "USE_")) and value is True
    ]
    return f"{name} ({', '.join(on)})" if on else name


def compiled(launches: Iterable[Launch], arch: str) -> dict[str, Kernel]:
    """The first launch of each label, in order."""
    kernels: dict[str, Kernel] = {}
    for launch in launches:
        if label(launch) not in kernels:
            kernels[label(launch)] = machine_code(launch, arch)
    return kernels


def machine_code(launch: Launch, arch: str) -> Kernel:
    """Compile a launch for an NVIDIA target, and read what came out."""
    compiled = compile_launch(launch, arch)
    return Kernel(launch, arch, resources(compiled), sass.parse(disassembly(compiled)))
