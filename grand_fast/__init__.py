"""grand-fast: graph neural diffusion (GRAND) on fused kernels.

Documentation: the README of the repository, and the docstring of each public name.
"""

from grand_fast import compat, nn, ops, terms
from grand_fast._version import __version__
from grand_fast.data.rewiring import diffusion_rewiring
from grand_fast.graph import Graph, graph_of
from grand_fast.ops.backends import backend
from grand_fast.solvers import (
    Solution,
    Solve,
    Stats,
    Status,
    integrate,
    odeint,
    odeint_adjoint,
    odeint_dense,
    odeint_event,
)

__all__ = [
    "Graph", "Solution", "Solve", "Stats", "Status", "__version__", "backend", "compat",
    "diffusion_rewiring", "graph_of", "integrate", "nn", "odeint", "odeint_adjoint", "odeint_dense",
    "odeint_event", "ops", "terms",
]  # fmt: skip
