"""For which GPUs, shapes and types tests compile: those that they share are compiled once."""

import torch

from bench.core.problem import PAPER_SHAPES
from bench.gpu_report.compile import MODELLED, TARGETS

# Each type in half of the cases: neighbours have the other one.
TYPES = (torch.float32, torch.bfloat16)
OTHERS = [arch for arch in TARGETS if arch not in MODELLED]
# Elsewhere those whose registers or tiles differ most: one head, many, an odd width
DIFFERENT = [s for s in PAPER_SHAPES if s.heads in (1, 8) or s.channels == 162]
CASES = [
    (arch, shape, TYPES[(i + j) % 2])
    for archs, shapes in ((MODELLED, PAPER_SHAPES), (OTHERS, DIFFERENT))
    for i, arch in enumerate(archs)
    for j, shape in enumerate(shapes)
] + [("sm_90", PAPER_SHAPES[0], torch.float16)]  # differs from bfloat16 by one conversion
