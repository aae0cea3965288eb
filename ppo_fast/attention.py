"""Which of torch's attention kernels passes run on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


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
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
