"""Data sets: those that are built in or published, and the files of a user."""

from grand_fast.data.datasets import DATASETS, NodeData, Split, load

__all__ = ["DATASETS", "NodeData", "Split", "load"]
