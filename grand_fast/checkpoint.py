"""`load_checkpoint` under the name that runs have told."""

from grand_fast.training.checkpoint import load_checkpoint

__all__ = ["load_checkpoint"]
