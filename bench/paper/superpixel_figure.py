"""The picture of figure 4: superpixels, the weights of their edges, the image after diffusion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from numpy.typing import NDArray

from grand_fast.data.datasets import NodeData
from grand_fast.training.checkpoint import write_file

WIDEST = 3.0  # points, of the edge with the largest weight


@dataclass(frozen=True)
class Diffused:
    """What a model makes of the image: weights `[E]` of its edges, and the state `[N]` at T."""

    name: str
    a: NDArray[np.float32]
    state: NDArray[np.float32]


def draw_superpixels(
    segments: NDArray[np.int64], data: NodeData, found: Sequence[Diffused], path: Path
) -> None:
    """A row for each model: before, edges by weight (colour and width), after."""
    figure = Figure(figsize=(13.5, 4.8 * len(found)), layout="constrained")
    grid = figure.subplots(len(found), 3, squeeze=False)
    grey = data.x[:, 0].numpy()
    ends = _centres(segments)[data.edge_index.T.numpy()]  # [E, 2 ends, x and y]
    for axes, model in zip(grid, found, strict=True):
        axes[0].imshow(grey[segments], cmap="gray", vmin=0, vmax=1)
        axes[0].set_title("superpixels")
        axes[1].imshow(grey[segments], cmap="gray", vmin=0, vmax=1, alpha=0.35)
        order = np.argsort(model.a)  # the heaviest on top
        widths = WIDEST * model.a[order] / model.a.max()
        lines = LineCollection(list(ends[order]), array=model.a[order], cmap="viridis",
                               linewidths=widths)  # fmt: skip
        axes[1].add_collection(lines)
        axes[1].set_title(f"{model.name}: weights of the edges at t = 0")
        figure.colorbar(lines, ax=axes[1], shrink=0.8)
        axes[2].imshow(model.state[segments], cmap="gray", vmin=0, vmax=1)
        axes[2].set_title(f"{model.name}: after diffusion")
        for axis in axes:
            axis.set_axis_off()
    drawn = BytesIO()
    figure.savefig(drawn, dpi=60, format="png")
    write_file(path, drawn.getvalue())


def _centres(segments: NDArray[np.int64]) -> NDArray[np.float64]:
    """Mean column and row of each superpixel, `[N, 2]`."""
    rows, columns = np.indices(segments.shape)
    sizes = np.bincount(segments.ravel())
    sums = [np.bincount(segments.ravel(), weights=axis.ravel()) for axis in (columns, rows)]
    return np.stack(sums, axis=1) / sizes[:, None]
