"""Layers and models in PyG's style: parameters, without kernels or solver arithmetic."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from grand_fast.nn.attention import Attention
from grand_fast.nn.attention_diffusion import AttentionDiffusion
from grand_fast.nn.grand import GRAND
from grand_fast.nn.grand_conv import GRANDConv

if TYPE_CHECKING:
    from grand_fast.nn.gat_conv import GATConv
    from grand_fast.nn.transformer_conv import TransformerConv

__all__ = [
    "GRAND", "Attention", "AttentionDiffusion", "GATConv", "GRANDConv", "TransformerConv",
]  # fmt: skip

# They are PyG's, whose import takes seconds
_OF_PYG = {"GATConv": "gat_conv", "TransformerConv": "transformer_conv"}


def __getattr__(name: str) -> Any:
    if name not in _OF_PYG:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_OF_PYG[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
