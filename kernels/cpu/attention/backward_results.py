"""What the passes of the edge attention's backward write (see `cpu/attention/backward.py`)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from grand_fast.kernels.cpu.gathered_sums import finish_field_gradient
from grand_fast.kernels.cpu.memory import empty
from grand_fast.kernels.cpu.rows import Shares, Work, sum_pieces
from grand_fast.kernels.weighting import Upstream


class StateGradient:
    """`dx` of a diffusion, and `dalpha` if needed, of a pass over the CSR of Aᵀ."""

    def __init__(self, upstream: Upstream, work: Work, *, needs_dalpha: bool) -> None:
        assert upstream.x is not None
        n, d = upstream.x.shape
        dtype = upstream.x.dtype
        self._upstream, self._work = upstream, work
        self._shares = Shares(work.turn.numel(), d, dtype) if needs_dalpha else None
        self._partial: Tensor | None = None
        self.dx = empty(n, d, dtype=dtype)
        self.names = {"dx", "dalpha"} if needs_dalpha else {"dx"}

    def arguments(self) -> dict[str, Any]:
        """What the kernel of whole rows is given."""
        scale = self.dx.new_tensor([self._upstream.x_scale])
        named = {"dx": self.dx, "x_scale": scale}
        return named if self._shares is None else named | {"dalpha": self._shares.tensor}

    def piece_arguments(self) -> dict[str, Any]:
        """What the kernel of pieces is given."""
        pieces = self._work.piece_begin.numel()
        self._partial = empty(pieces, self.dx.shape[1], dtype=self.dx.dtype)
        return {"partial": self._partial}

    def finish(self) -> dict[str, Tensor]:
        """After the kernels: add up, and return what there is."""
        u = self._upstream
        assert u.df is not None and u.x is not None and u.alpha is not None
        found = {"dx": self.dx}
        if self._shares is not None:
            found["dalpha"] = self._shares.total()
        if self._partial is not None:
            finish_field_gradient(
                self.dx, found.get("dalpha"), self._partial, self._work, df=u.df, x=u.x,
                alpha=u.alpha, x_scale=u.x_scale,
            )  # fmt: skip
        return found


class Results:
    """What a pass writes, by name.

    own:   sums over the edges of rows, `[N, …]`; of long rows piece by piece.
    edges: tables `[E, …]`, slot order of `A`: on the view of `A` alone.
    state: of a diffusion, on the view of `Aᵀ` alone.
    """

    def __init__(
        self, own: dict[str, Tensor], edges: dict[str, Tensor], state: StateGradient | None = None
    ) -> None:
        self.own, self.edges, self.state = own, edges, state
        self._partial: dict[str, Tensor] = {}

    @property
    def names(self) -> frozenset[str]:
        """All of them."""
        return frozenset(self.own.keys() | self.edges | (self.state.names if self.state else set()))

    def arguments(self) -> dict[str, Any]:
        """What the kernel of whole rows is given."""
        return self.own | self.edges | (self.state.arguments() if self.state else {})

    def piece_arguments(self, work: Work) -> dict[str, Any]:
        """What the kernel of pieces is given."""
        n = work.piece_begin.numel()
        self._partial = {
            name: empty(n, *t.shape[1:], dtype=t.dtype) for name, t in self.own.items()
        }
        return self._partial | self.edges | (self.state.piece_arguments() if self.state else {})

    def finish(self, work: Work) -> dict[str, Tensor]:
        """After the kernels: add up, and return all."""
        for name, partial in self._partial.items():
            self.own[name][work.hub_rows] = sum_pieces(partial, work)
        return self.own | self.edges | (self.state.finish() if self.state else {})
