"""Figure 4: an image as a graph of superpixels, under GRAND-nl and under a constant Laplacian."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.core.report import Report
from bench.core.tables import Column, Row, cell, print_rows
from bench.paper.figures import Diffused, draw_superpixels
from grand_fast import Graph
from grand_fast.data.datasets import NodeData, Split
from grand_fast.nn import GRAND
from grand_fast.nn.attention_diffusion import AttentionDiffusion
from grand_fast.training.loop import fit

# The paper's diffusion: 6 steps, as many layers.
T, STEP_SIZE = 4.8, 0.8
SUPERPIXELS = 800
COMPACTNESS = 0.1  # of a grey image in [0, 1]: superpixels follow its edges
TRAINING_SHARE = 0.5
ATTENTION_CHANNELS = 16
EPOCHS, LEARNING_RATE = 200, 0.05
COLUMNS: list[Column] = [
    ("", cell("model")),
    ("test accuracy, %", cell("test_accuracy", "{:.1f}", 100)),
    ("contrast of object and background kept", cell("contrast_kept", "{:.2f}")),
    ("step at their boundary kept", cell("boundary_kept", "{:.2f}")),
    ("attention across / within", cell("attention_across_over_within", "{:.2f}")),
]
VARIANTS = {"GRAND-nl": "nl", "constant Laplacian": "laplacian"}


@dataclass(frozen=True)
class Superpixels:
    """An image cut into superpixels.

    segments: `[height, width]`, the superpixel of each pixel.
    data: grey in [0, 1], `[N, 1]`; label 1 for the object; edges between neighbours, both ways.
    """

    segments: NDArray[np.int64]
    data: NodeData


def camera_image() -> NDArray[np.float64]:
    """The photographer that ships with scikit-image, grey in [0, 1].

    Raises:
        ValueError: scikit-image is not installed.
    """
    try:
        from skimage import data, img_as_float
    except ImportError as missing:
        raise ValueError(
            "superpixels: scikit-image is not installed. pip install 'grand-fast[bench]'"
        ) from missing
    image: NDArray[np.float64] = img_as_float(data.camera())
    return image


def cut(image: NDArray[np.float64], count: int) -> Superpixels:
    """About `count` superpixels (SLIC); the object is what is darker than Otsu's threshold."""
    from skimage.filters import threshold_otsu
    from skimage.graph import RAG
    from skimage.segmentation import slic

    segments = slic(image, n_segments=count, compactness=COMPACTNESS, channel_axis=None,
                    start_label=0)  # fmt: skip
    sizes = np.bincount(segments.ravel())
    grey = np.bincount(segments.ravel(), weights=image.ravel()) / sizes
    pairs = np.array(RAG(segments, connectivity=1).edges, dtype=np.int64).T
    edges = torch.from_numpy(np.concatenate([pairs, pairs[::-1]], axis=1))
    labels = torch.from_numpy((grey < threshold_otsu(image)).astype(np.int64))
    x = torch.from_numpy(grey.astype(np.float32))[:, None]
    return Superpixels(segments, NodeData("superpixels", x, labels, edges))


def diffuse(name: str, superpixels: Superpixels, *, epochs: int = EPOCHS) -> tuple[Diffused, Row]:
    """Train a model on half of the labels; its attention, what it makes of the image, and figures.

    The state is the grey itself, without an encoder, so that x(T) is an image.
    """
    data = superpixels.data
    torch.manual_seed(0)
    graph = Graph.from_edge_index(data.edge_index, data.num_nodes, self_loops=1.0)
    # alpha = 1 for both: learned, it could turn the diffusion off.
    model = GRAND(1, 1, 2, variant=VARIANTS[name], attention_channels=ATTENTION_CHANNELS, T=T,
                  method="euler", step_size=STEP_SIZE, alpha=1.0)  # fmt: skip
    model.encoder = torch.nn.Identity()
    run = fit(model, data, graph, _halves(data.num_nodes), epochs=epochs, lr=LEARNING_RATE,
              weight_decay=0.0, optimizer="adam", label=name)  # fmt: skip
    if run.stopped == "interrupted":
        raise KeyboardInterrupt
    edges = data.edge_index.shape[1]
    states: list[Tensor] = []  # what the decoder is given, which is at least 0 as the grey is
    model.decoder.register_forward_pre_hook(lambda _, given: states.append(given[0]))
    with torch.no_grad():
        model.eval()(data.x, graph)
        a = graph.random_walk_weights(data.x.dtype)
        if isinstance(model.field, AttentionDiffusion):
            a = model.field.attention(data.x, graph, mean_heads=True)
    a = a[:edges]  # without the loops, which come last
    crossing = data.y[data.edge_index[0]] != data.y[data.edge_index[1]]
    grey, after = data.x[:, 0], states[0][:, 0]
    row = {
        "model": name,
        "superpixels": data.num_nodes,
        "edges": edges,
        "test_accuracy": run.test_accuracy,
        "contrast_kept": _contrast(after, data.y) / _contrast(grey, data.y),
        "boundary_kept": _step(after, data, crossing) / _step(grey, data, crossing),
        "attention_across_over_within": float(a[crossing].mean() / a[~crossing].mean()),
    }
    return Diffused(name, a.numpy(), after.numpy()), row


def run(options: argparse.Namespace, report: Report, folder: Path) -> list[Row]:
    """Both models on the image; prints their figures, draws, and returns them."""
    superpixels = cut(camera_image(), SUPERPIXELS)
    found, rows = zip(*(diffuse(name, superpixels) for name in VARIANTS), strict=True)
    title = (f"superpixels (figure 4): T = {T}, {round(T / STEP_SIZE)} steps; the paper prints a "
             "picture, in which GRAND-nl keeps the image and the Laplacian does not")  # fmt: skip
    print_rows(title, rows, COLUMNS)
    draw_superpixels(superpixels.segments, superpixels.data, found, folder / "superpixels.png")
    return list(rows)


def _halves(n: int) -> Split:
    """Half of the nodes for training, the rest in equal parts for validation and test."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    first = round(TRAINING_SHARE * n)
    second = first + (n - first) // 2
    return Split(order[:first], order[first:second], order[second:])


def _step(grey: Tensor, data: NodeData, edges: Tensor) -> float:
    """Mean difference of grey between the ends of these edges."""
    sender, receiver = data.edge_index[:, edges]
    return float((grey[sender] - grey[receiver]).abs().mean())


def _contrast(grey: Tensor, labels: Tensor) -> float:
    """Difference of the mean grey of background and object."""
    return float((grey[labels == 0].mean() - grey[labels == 1].mean()).abs())
