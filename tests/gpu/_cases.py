"""For which GPUs, shapes and types tests compile: those that they share are compiled once."""

import torch

from bench.core.problem import Shape

_F32, _BF16, _F16 = torch.float32, torch.bfloat16, torch.float16
_MAIN, _MANY_HEADS, _ONE_HEAD = Shape(128, 4, 128), Shape(64, 8, 128), Shape(64, 1, 64)
_NARROW, _ODD, _WIDE = Shape(80, 8, 128), Shape(162, 2, 32), Shape(256, 4, 128)
# Every shape, every type, and every GPU with many heads or an odd width, whose registers and tiles
# differ most; and what others compile too: golden.json, the emulator, the report.
CASES = [
    ("sm_80", _MAIN, _F32),
    ("sm_80", _MANY_HEADS, _F32),
    ("sm_80", _ODD, _F32),
    ("sm_80", _WIDE, _F32),
    ("sm_80", _MAIN, _BF16),
    ("sm_80", _MAIN, _F16),  # differs from bfloat16 by one conversion
    ("sm_90", _MAIN, _F32),
    ("sm_90", _ONE_HEAD, _F32),
    ("sm_90", _NARROW, _BF16),
    ("sm_90", _WIDE, _BF16),
    ("sm_100", _MANY_HEADS, _F32),
    ("sm_120", _ODD, _BF16),
    ("gfx942", _MANY_HEADS, _F32),
    ("gfx942", _ONE_HEAD, _BF16),
]
