"""The two scales of a diffusion: `alpha` of the diffusion itself, `beta` of the source."""

from typing import Literal

import torch
from torch import Tensor, nn


class DiffusionScale(nn.Module):
    """`alpha` and `beta` of `f = alpha (A x − x) + beta x0`.

    Args:
        alpha: `"learned"` is the sigmoid of a parameter that starts at 0; a float fixes it.
        source: learn a `beta` that starts at 0; else there is no source and `beta` is None.
        channels: learn one of each for every channel, `[channels]`; by default scalars.
    """

    def __init__(
        self,
        alpha: float | Literal["learned"] = "learned",
        *,
        source: bool = False,
        channels: int | None = None,
    ) -> None:
        super().__init__()
        learned = alpha == "learned"
        if not learned and (isinstance(alpha, bool) or not isinstance(alpha, int | float)):
            raise TypeError(f"diffusion: `alpha` must be a float or 'learned', got {alpha!r}.")
        shape = () if channels is None else (channels,)
        self._fixed_alpha = None if learned else float(alpha)
        self.alpha_logit = nn.Parameter(torch.zeros(shape)) if learned else None
        self.beta = nn.Parameter(torch.zeros(shape)) if source else None

    @property
    def alpha(self) -> Tensor | float:
        """The diffusivity scale."""
        if self.alpha_logit is not None:
            return torch.sigmoid(self.alpha_logit)
        assert self._fixed_alpha is not None
        return self._fixed_alpha

    def source(self, x0: Tensor | None) -> Tensor | None:
        """`beta x0`, like `x0`; None where there is none."""
        if self.beta is None or x0 is None:
            return None
        return (self.beta * x0).to(x0.dtype)

    def reset_parameters(self) -> None:
        """`alpha = 1/2` if learned, `beta = 0`."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def extra_repr(self) -> str:
        """The choices, for `print(model)`."""
        alpha = "learned" if self._fixed_alpha is None else self._fixed_alpha
        return f"alpha={alpha}, source={self.beta is not None}"
