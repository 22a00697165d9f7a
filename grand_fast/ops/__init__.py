"""Differentiable operators: check → choose a backend → autograd."""

from grand_fast.ops.attention_diffusion import attention_diffusion
from grand_fast.ops.attention_product import attention_product
from grand_fast.ops.csr_diffusion import csr_diffusion
from grand_fast.ops.edge_attention import edge_attention
from grand_fast.ops.edge_softmax import edge_softmax
from grand_fast.ops.error_ratio import error_ratio
from grand_fast.ops.projected_attention_diffusion import projected_attention_diffusion
from grand_fast.ops.scores import GAT, ExpKernel
from grand_fast.ops.spmm import spmm
from grand_fast.ops.stage_update import stage_update

__all__ = [
    "GAT", "ExpKernel", "attention_diffusion", "attention_product", "csr_diffusion",
    "edge_attention", "edge_softmax", "error_ratio", "projected_attention_diffusion", "spmm",
    "stage_update",
]  # fmt: skip
