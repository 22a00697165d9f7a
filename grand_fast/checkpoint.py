"""`load_checkpoint` by the name that the messages of runs give."""

from grand_fast.training.checkpoint import load_checkpoint

__all__ = ["load_checkpoint"]
