"""`error_ratio`: the error of an adaptive step over its tolerance, in one pass."""

from collections.abc import Sequence

import torch
from torch import Tensor

from grand_fast.ops._input_types import widest_terms
from grand_fast.ops.backends import Backend, choose, launchers, transforms_active
from grand_fast.ops.checks import check_tensor, message
from grand_fast.ops.stage_update import check_terms

_OP = "error_ratio"


def error_ratio(
    terms: Sequence[tuple[float, Tensor]],
    x: Tensor,
    y: Tensor,
    *,
    rtol: float,
    atol: float,
    backend: Backend = "auto",
) -> Tensor:
    """The error estimate of a Runge–Kutta step over what the tolerances allow.

    `r = √(mean_i (e_i / (atol + rtol max(|x_i|, |y_i|)))²)` with `e = Σ_s c_s f_s`

    Args:
        terms: pairs `(c_s, f_s)`, at least one, of a finite float and a floating tensor, all alike.
        x, y: the state before and after the step, like each `f_s`.
        rtol, atol: at least 0, not both 0.
        backend: `"auto"` goes by the device of the tensors.

    Returns:
        `r`, a scalar on that device in float32 or wider; not finite if an error is not. An empty
        state gives 0.

    Not differentiable: a step's length carries no gradient. Nothing of the state's size is stored.
    Reference: GRAND (Chamberlain et al. 2021), equation 39.
    """
    if isinstance(terms, list | tuple):
        *terms, (_, x), (_, y) = widest_terms([*terms, (1.0, x), (1.0, y)])
    scales, tensors = check_terms(_OP, terms)
    for name, value in (("x", x), ("y", y)):
        check_tensor(_OP, name, value, letters="of the first term", sizes=tuple(tensors[0].shape),
                     like=tensors[0])  # fmt: skip
    if not (rtol >= 0 and atol >= 0 and rtol + atol > 0):
        got = f"{rtol} and {atol}"
        raise ValueError(message(_OP, "rtol, atol", "must be at least 0 and not both 0", got))
    if x.numel() == 0:
        return x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))
    # A compiler merges plain operations; there is no operator for it to call, or torch.func to map
    name = choose(_OP, backend, x)
    if torch.compiler.is_compiling() or transforms_active():
        name = "reference"
    ratio: Tensor = launchers(_OP, name).error_ratio_fwd(
        [t.detach().contiguous() for t in tensors], scales, x.detach().contiguous(),
        y.detach().contiguous(), rtol=rtol, atol=atol,
    )  # fmt: skip
    return ratio
