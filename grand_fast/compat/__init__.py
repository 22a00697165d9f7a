"""Other people's GRAND code on our kernels: `grand-fast run SCRIPT`, and `patch` in code."""

from grand_fast.compat.accelerate import accelerate
from grand_fast.compat.options import Report
from grand_fast.compat.patching import Patch, patch
from grand_fast.compat.stand_ins import stand_ins

__all__ = ["Patch", "Report", "accelerate", "patch", "stand_ins"]
