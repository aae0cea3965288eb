"""Which of torch's attention kernels passes run on."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# torch's switch is the process's: the first of several threads turns it off, the last one back.
_lock = threading.Lock()
_inside = 0
_before = True


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """For the block, ``scaled_dot_product_attention`` does not choose cuDNN.

    torch 2.11 prefers it on Hopper. It builds a plan for every new shape (0.04 to 1.8 s each on an
    H200; batches of text have new shapes all the time), its results differ from run to run, so that
    a captured step need not draw what a plain one drew, and it can give NaN in gradients where a
    mask is given (pytorch#196678). Without a mask, flash attention is next.

    A backward pass that computes activations again (gradient checkpointing) belongs into the block
    as its forward pass does.
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
