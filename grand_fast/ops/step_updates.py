"""The combinations of one Runge–Kutta step, whose backward writes each gradient once.

`y_r = Σ_s c_rs z_s` over the state and the slopes so far. Left to autograd, each combination writes
`c_rs dy_r` for every `z_s`, which are then added up one by one: some 85 states moved in a step of
DOPRI5, several of them held. Here each keeps its `dy_r`, and the first that took `z_s`, the last of
them to be differentiated, gives `Σ_r c_rs dy_r` in one pass: 35 states.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from grand_fast.ops.backends import choose, is_batched, launchers, transforms_active
from grand_fast.ops.stage_update import check_terms, stage_update

_OP = "stage_update"


class _Ledger:
    """What the combinations of a step share; it holds gradients, and those while they are due.

    columns: per tensor `z_s` its rows and coefficients `(r, c_rs)`, in the order of the rows.
    """

    def __init__(self) -> None:
        self.columns: list[list[tuple[int, float]]] = []
        self.rows = 0
        self.dys: dict[int, Tensor] = {}
        self.pass_id = -1

    def enter(self, row: int, dy: Tensor | None) -> None:
        """Of a pass that was left before its end, nothing may count."""
        pass_id: int = torch._C._current_graph_task_id()
        if pass_id != self.pass_id:
            self.dys.clear()
            self.pass_id = pass_id
        if dy is not None:
            self.dys[row] = dy.contiguous()

    def gradient(self, column: int, backend: str) -> Tensor | None:
        """`Σ_r c_rs dy_r` over the rows `r` that have a gradient; None where none has."""
        found = [(c, self.dys[r]) for r, c in self.columns[column] if r in self.dys]
        if not found:
            return None
        if len(found) == 1 and found[0][0] == 1.0:
            return found[0][1]
        scales, dys = zip(*found, strict=True)
        total: Tensor = launchers(_OP, backend).stage_update_fwd(dys, scales)
        return total


class StepUpdates:
    """`stage_update` for the combinations of one step, called in the order of its stages."""

    def __init__(self) -> None:
        self._ledger = _Ledger()
        self._seen: list[Tensor] = []  # here, not in the ledger, which backward keeps
        self._token: Tensor | None = None

    def __call__(self, terms: Sequence[tuple[float, Tensor]]) -> Tensor:
        """`Σ_s c_s z_s`, as `stage_update`."""
        dtypes = {z.dtype for _, z in terms}
        if (
            torch.compiler.is_compiling()
            or transforms_active()
            or not torch.is_grad_enabled()
            or len(dtypes) > 1  # under autocast, which `stage_update` knows
        ):
            return stage_update(terms)
        scales, tensors = check_terms(_OP, terms)
        ledger = self._ledger
        columns, owned = [], []
        for scale, z in zip(scales, tensors, strict=True):
            column = next((i for i, seen in enumerate(self._seen) if seen is z), None)
            owned.append(column is None)
            if column is None:
                column = len(self._seen)
                self._seen.append(z)
                ledger.columns.append([])
            ledger.columns[column].append((ledger.rows, scale))
            columns.append(column)
        place = (ledger, ledger.rows, tuple(zip(columns, owned, strict=True)))
        ledger.rows += 1
        y: Tensor
        y, self._token = _StepUpdateFunction.apply(
            choose(_OP, "auto", tensors[0]), place, scales, self._token, *tensors
        )
        return y


class _StepUpdateFunction(Function):
    """One combination. An empty token from each to the next has them differentiated in turn."""

    @staticmethod
    def forward(
        ctx: Any, name: str, place: Any, scales: Any, token: Tensor | None, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.name, ctx.place, ctx.scales = name, place, scales
        ctx.set_materialize_grads(False)
        y = launchers(_OP, name).stage_update_fwd([t.contiguous() for t in tensors], scales)
        return y, y.new_empty(0)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, of_token: Any) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[4:]
        # Gradients that are differentiated themselves, or batches of them: by plain products
        if torch.is_grad_enabled() or (dy is not None and is_batched(dy)):
            grads = [
                dy * c if n and dy is not None else None
                for c, n in zip(ctx.scales, needed, strict=True)
            ]
            return None, None, None, None, *grads
        ledger, row, columns = ctx.place
        ledger.enter(row, dy)
        grads = [
            ledger.gradient(column, ctx.name) if n and is_owned else None
            for (column, is_owned), n in zip(columns, needed, strict=True)
        ]
        if row == 0:
            ledger.dys.clear()
        return None, None, None, None, *grads

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, None]:
        moving = [(c, t) for c, t in zip(ctx.scales, tangents[4:], strict=True) if t is not None]
        return stage_update(moving), None
