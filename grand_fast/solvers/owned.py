"""Results of a caller's functions in memory that nobody else will write."""

import sys

import torch
from torch import Tensor

from grand_fast.ops.backends import transforms_active

# An attribute of the nodes of autograd that save what they computed, as that of tanh does
_SAVED = "_raw_saved_result"


def owned(f: Tensor) -> Tensor:
    """`f`, copied where its memory is known to others. Must be given without a name to it.

    A solver holds slopes while the function that gave them runs again: one that writes into a
    buffer of its own, as a CUDA graph does, would change them. Who can write the memory again must
    have a hold on it: a tensor that was made anew shows at once that nobody has, and costs no copy.
    Differentiable.
    """
    if torch.compiler.is_compiling():  # which leaves out the copies that it need not make
        return f.clone()
    # What a call itself holds: one more once torch.compile has run in this process
    alone = _references(object())
    return f if sys.getrefcount(f) <= alone and _is_new(f, alone) else f.clone()


def _references(t: object) -> int:
    """To what was given without a name."""
    return sys.getrefcount(t)


def _references_to_base() -> int:
    with torch.inference_mode(False):
        view = torch.empty(1).view(1)
    return _references(view._base)


_OF_A_BASE = _references_to_base() - _references(object())


def _is_new(f: Tensor, alone: int) -> bool:
    """Whether nothing but `f` and what made it has a hold on its memory."""
    if type(f) is not Tensor or f.layout is not torch.strided or transforms_active():
        return False  # whose memory cannot be asked for
    is_view, node = f._is_view(), f.grad_fn
    if is_view:
        if _references(f._base) > alone + _OF_A_BASE:
            return False
        assert f._base is not None
        node = f._base.grad_fn
    if hasattr(node, _SAVED) and f._version == 0:  # in place, it could have gone into a buffer
        return True
    storage = f.untyped_storage()
    holders: int = torch._C._storage_Use_Count(storage._cdata)
    # `f`, `storage`, and what `f` is a view of. Memory of NumPy, or of the graphs of torch.compile,
    # cannot be resized: who has it is unknown.
    return holders <= 2 + is_view and storage.resizable()
