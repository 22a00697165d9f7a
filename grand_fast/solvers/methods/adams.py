"""Adams–Bashforth and Adams–Moulton, the paper's multistep methods."""

import warnings

import torch
from torch import Tensor

from grand_fast.solvers.methods.adams_history import AbstractAdams, moulton, predict, weighted
from grand_fast.solvers.solver import Carry
from grand_fast.solvers.term import AbstractTerm, Combination


class ExplicitAdams(AbstractAdams):
    """Adams–Bashforth of order 4, one evaluation a step.

    `x' = x + tau (55 f_n − 59 f_{n−1} + 37 f_{n−2} − 9 f_{n−3}) / 24`

    Args:
        max_order: None, or 4 to 12 for torchdiffeq's method of that name, whose order climbs to
            `max_order − 1`. Higher orders are stable for shorter steps only: on diffusion with
            `alpha = 1`, up to about 0.15 at order 4 and 0.0017 at order 11.

    Reference: GRAND (Chamberlain et al. 2021), section 3.3 and appendix F.
    """

    def __init__(self, *, max_order: int | None = None) -> None:
        super().__init__("ExplicitAdams", max_order)

    def _advance(
        self, term: AbstractTerm, t: float, x: Tensor, tau: float, history: Carry
    ) -> tuple[Tensor, Carry]:
        return predict(x, tau, history), history


class ImplicitAdams(AbstractAdams):
    """Adams–Moulton of order 4, solved by correcting the Adams–Bashforth step until it stands.

    `x' = x + tau (9 f(x') + 19 f_n − 5 f_{n−1} + f_{n−2}) / 24`

    Evaluates `f` once a step and once a correction. A step that `max_iters` corrections do not
    settle counts all the same: its order is no less, its stability is.

    Args:
        max_order: None, or 4 to 12 for torchdiffeq's method of that name, whose order climbs to
            `max_order`. It asks each element of the step for the tolerance, and drops its oldest
            evaluation, with a warning, where the corrections do not settle.
        max_iters: corrections at most, at least 1.
        rtol, atol: the corrections end when the largest change of an element is at most
            `atol + rtol max|x'|`.

    Reference: GRAND (Chamberlain et al. 2021), section 3.3 and appendix F.
    """

    def __init__(
        self,
        *,
        max_order: int | None = None,
        max_iters: int = 4,
        rtol: float | Tensor = 1e-7,
        atol: float | Tensor = 1e-9,
    ) -> None:
        super().__init__("ImplicitAdams", max_order)
        if isinstance(max_iters, bool) or not isinstance(max_iters, int):
            got = type(max_iters).__name__
            raise TypeError(f"ImplicitAdams: `max_iters` must be an int, got {got}.")
        if max_iters < 1:
            raise ValueError(f"ImplicitAdams: `max_iters` must be at least 1, got {max_iters}.")
        self.max_iters, self.rtol, self.atol = max_iters, rtol, atol

    def _advance(
        self, term: AbstractTerm, t: float, x: Tensor, tau: float, history: Carry
    ) -> tuple[Tensor, Carry]:
        own, *weights = moulton(min(len(history) + 1, self.top))
        base = Combination([(1.0, weighted(x, tau, weights, history))])
        new = predict(x, tau, history)
        for _ in range(self.max_iters):
            old, new = new, term.axpy(t + tau, new, base, tau * own)
            if self._is_settled(x, old, new):
                return new, history
        if not self.ramps:
            return new, history
        warnings.warn(
            f"implicit_adams: {self.max_iters} corrections of a step did not meet the tolerance. "
            "Try a smaller step_size.",
            stacklevel=2,
        )
        return new, history[:-1]

    @torch.no_grad()
    def _is_settled(self, x: Tensor, old: Tensor, new: Tensor) -> bool:
        """Whether the last correction changed little; reads one value from the device."""
        if x.numel() == 0:
            return True
        change = (new - old).abs_()
        if self.ramps:
            size = torch.maximum((old - x).abs_(), (new - x).abs_())
            return bool((change < size.mul_(self.rtol).add_(self.atol)).all())
        allowed = self.atol + self.rtol * torch.linalg.vector_norm(new, ord=torch.inf)
        return bool(change.max() <= allowed)
