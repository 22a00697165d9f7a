"""Terms of a differential equation on a graph, which add up to what `gf.integrate` integrates."""

from grand_fast.solvers import AbstractLinearTerm as LinearTerm
from grand_fast.solvers import AbstractTerm as Term
from grand_fast.solvers import Combination
from grand_fast.terms.diffusion import attention, blurring_sharpening, linear
from grand_fast.terms.pointwise import reaction, source
from grand_fast.terms.second_order import graphcon

__all__ = [
    "Combination", "LinearTerm", "Term", "attention", "blurring_sharpening", "graphcon", "linear",
    "reaction", "source",
]  # fmt: skip
