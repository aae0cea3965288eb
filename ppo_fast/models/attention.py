"""Keep torch's attention from choosing cuDNN."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# torch's switch is global: the first of several threads turns it off, the last one restores it.
_lock = threading.Lock()
_inside = 0
_before = True


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Within the block, ``scaled_dot_product_attention`` does not choose cuDNN.

    torch 2.11 prefers cuDNN on Hopper. cuDNN builds a plan for every new shape (0.04 to 1.8 s each
    on an H200; batches of text have new shapes all the time). Its results differ from run to run,
    so that a captured step need not draw what a plain one drew. It can give NaN in gradients where
    a mask is given (pytorch#196678). Without a mask, torch then chooses flash attention.

    A backward pass that computes activations again (gradient checkpointing) must run within the
    block, as its forward pass does.
    """
    global _inside, _before
    with _lock:
        if _inside == 0:
            _before = torch.backends.cuda.cudnn_sdp_enabled()
            torch.backends.cuda.enable_cudnn_sdp(False)
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                torch.backends.cuda.enable_cudnn_sdp(_before)
