"""Layers and models in PyG's style: parameters, without kernels or solver arithmetic."""

from grand_fast.nn.attention import Attention
from grand_fast.nn.attention_diffusion import AttentionDiffusion
from grand_fast.nn.grand import GRAND
from grand_fast.nn.grand_conv import GRANDConv

__all__ = ["GRAND", "Attention", "AttentionDiffusion", "GRANDConv"]
