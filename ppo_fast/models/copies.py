"""Copies of models that compute with weights of their own."""

from __future__ import annotations

import copy
import logging
from types import MethodType
from typing import Any

import torch
from torch import nn

from ppo_fast.models.parts import num_embeddings
from ppo_fast.models.precision import computing_in
from ppo_fast.models.quantized import shared_states
from ppo_fast.models.transformers_internals import output_of

logger = logging.getLogger(__name__)


def copy_of_what_is_trained(module: nn.Module, compute_dtype: torch.dtype | None) -> nn.Module:
    """Return a copy of ``module`` that shares the weights that are not trained.

    A ``forward`` that was set on a module (``layer.forward = torch.compile(layer.forward)``) is a
    function that computes with that module, in the copy too. Compiled ones are replaced in the copy
    by what was compiled, bound to the copy.

    Args:
        module: a causal LM or its body.
        compute_dtype: autocast dtype that it computes in; None: that of its weights.

    Raises:
        ValueError: another such function remains, so that the copy would compute with the weights
            that are trained.
    """
    frozen: dict[int, Any] = {id(p): p for p in module.parameters() if not p.requires_grad}
    frozen |= {id(state): state for state in shared_states(module)}
    copied = copy.deepcopy(module, frozen)
    originals = dict(module.named_modules())
    for name, part in copied.named_modules():
        forward = vars(part).get("forward")
        compiled: Any = getattr(forward, "_torchdynamo_orig_callable", None)
        if getattr(compiled, "__self__", None) is originals[name]:
            part.forward = MethodType(compiled.__func__, part)
            logger.info("the copy of %s runs uncompiled", name or type(module).__name__)
    with computing_in(compute_dtype, next(copied.parameters()).device):
        _check_weights_are_its_own(copied, module)
    return copied


@torch.enable_grad()
def _check_weights_are_its_own(copied: nn.Module, original: nn.Module) -> None:
    """Raise ValueError if ``copied`` computes with trained weights of the original."""
    trained = [p for p in original.parameters() if p.requires_grad]
    own = [p for p in copied.parameters() if p.requires_grad]
    for parameter in own:
        parameter.requires_grad_(False)
    try:
        ids = torch.arange(2, 6, device=next(copied.parameters()).device)[None]
        ids %= num_embeddings(copied)
        result = output_of(copied, input_ids=ids, use_cache=False)[0]
        if not trained or not result.requires_grad:
            return
        used = torch.autograd.grad(result.float().sum(), trained, allow_unused=True)
    finally:
        for parameter in own:
            parameter.requires_grad_(True)
    if all(gradient is None for gradient in used):
        return  # gradient checkpointing lets the embeddings' output require grad
    replaced = [
        name or "itself"
        for name, part in copied.named_modules()
        if "forward" in vars(part) and getattr(part.forward, "__self__", None) is not part
    ]
    where = f"forward of {', '.join(replaced[:3])} was replaced by" if replaced else "it holds"
    raise ValueError(
        f"policy_model: {type(original).__name__} cannot be copied: {where} a function bound to "
        "the original, so that its frozen copy would change as it trains; make the trainer first "
        "and replace forwards after, or replace them by types.MethodType(function, module)"
    )
