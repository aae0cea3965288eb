"""Transformer layers of the Llama kind as one C++ call a step, on the CPU.

A layer computed op by op spends as long in Python and in waking threads as in its products when few
rows pass through it. Which layers qualify shows in their structure, and then in a comparison with
their own forward (checks.py): a family that scales a residual, turns a part of a head or norms in a
way of its own falls out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ppo_fast.forwards import replaced_forwards
from ppo_fast.language_model import LanguageModel
from ppo_fast.ops.cpus import num_threads
from ppo_fast.ops.dispatch import choose
from ppo_fast.ops.launch import DTYPE_CODES, address
from ppo_fast.rollout.slots import SLIDING, SlotCache, layer_types
from ppo_fast.trunk import layer_list

# Names of a layer's weights, as the kernel has them, and those that a layer may do without.
WEIGHTS = {
    "attention_norm": "input_layernorm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    **{f"{x}_weight": f"self_attn.{x}_proj.weight" for x in "qkvo"},
    **{f"{x}_weight": f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")},
}
OPTIONAL = {
    **{f"{x}_bias": f"self_attn.{x}_proj.bias" for x in "qkvo"},
    **{f"{x}_bias": f"mlp.{x}_proj.bias" for x in ("gate", "up", "down")},
    **{f"{x}_norm": f"self_attn.{x}_norm.weight" for x in "qk"},
}


def is_llama_like(layer: nn.Module) -> bool:
    """Whether ``layer`` has the parts of a Llama layer and nothing else that computes."""
    parameters = dict(layer.named_parameters())
    modules = {name: module for name, module in layer.named_modules() if name}
    leaves = [module for module in modules.values() if not list(module.children())]
    norms = [module for module in leaves if type(module).__name__.endswith("RMSNorm")]
    products = [module for module in leaves if type(module) is nn.Linear]
    return (
        set(WEIGHTS.values()) <= set(parameters) <= {*WEIGHTS.values(), *OPTIONAL.values()}
        and len({p.dtype for p in parameters.values()}) == 1
        and all(p.is_cpu and p.is_contiguous() for p in parameters.values())
        and next(layer.parameters()).dtype in (torch.float32, torch.float64)
        and type(modules.get("mlp.act_fn")).__name__ in ("SiLU", "SiLUActivation")
        and all(hasattr(norm, "variance_epsilon") for norm in norms)
        and len(norms) + len(products) + 1 == len(leaves)
        and hasattr(modules["self_attn"], "head_dim")
        and hasattr(modules["self_attn"], "scaling")
        and not any(_is_hooked(module) for module in modules.values())
        and "forward" not in vars(layer)
    )


def _is_hooked(module: nn.Module) -> bool:
    return bool("forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks)


@contextmanager
def fused_layers(model: LanguageModel) -> Iterator[int]:
    """For the block, the layers of a model that qualify take rows of SlotCache as one call each;
    hooks on a layer stay in force. Gives their number. None under autocast."""
    forwards = [(layer, _StepForward(layer, window)) for layer, window in _layers(model)]
    with replaced_forwards(forwards):
        yield len(forwards)


def _layers(model: LanguageModel) -> list[tuple[nn.Module, int]]:
    """Those that qualify, each with the window of its attention (0: none)."""
    if (
        model.body is None
        or model.device.type != "cpu"
        or torch.is_autocast_enabled("cpu")
        or choose("few_row_linear", "auto", model.device).impl != "cpp"
    ):
        return []
    kinds = layer_types(model.text_config)
    try:
        layers = list(layer_list(model.body))
    except ValueError:  # a body of another shape decodes as it is
        return []
    windows = [model.text_config.sliding_window if kind == SLIDING else 0 for kind in kinds]
    pairs = zip(layers, windows, strict=True)
    return [(layer, window) for layer, window in pairs if is_llama_like(layer)]


class _StepForward:
    """What stands in for a layer's forward: the kernel for a step of SlotCache, else its own."""

    def __init__(self, layer: Any, window: int) -> None:
        from ppo_fast import _C

        self._layer, attention = layer, layer.self_attn
        self._index: int = attention.layer_idx
        parameters = dict(layer.named_parameters())
        weights = {
            name: address(parameters.get(path)) for name, path in (WEIGHTS | OPTIONAL).items()
        }
        self._q_size, self._kv_size, self._inner = (
            x.out_features for x in (attention.q_proj, attention.k_proj, layer.mlp.gate_proj)
        )
        size = self._head_size = attention.head_dim
        eps = {
            "attention_eps": layer.input_layernorm.variance_epsilon,
            "mlp_eps": layer.post_attention_layernorm.variance_epsilon,
            "q_eps": getattr(getattr(attention, "q_norm", None), "variance_epsilon", 0.0),
            "k_eps": getattr(getattr(attention, "k_norm", None), "variance_epsilon", 0.0),
        }
        self._kernel = _C.DecodeLayer(
            weights
            | eps
            | {
                "dtype": DTYPE_CODES[next(iter(parameters.values())).dtype],
                "hidden_size": attention.q_proj.in_features,
                "num_heads": self._q_size // size,
                "num_kv_heads": self._kv_size // size,
                "head_size": size,
                "intermediate_size": self._inner,
                "scaling": attention.scaling,
                "window": window,
            }
        )

    def __call__(
        self,
        hidden_states: Tensor,
        *args: Any,
        past_key_values: Any = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if not isinstance(past_key_values, SlotCache) or past_key_values.lengths is None:
            return type(self._layer).forward(
                self._layer,
                hidden_states,
                *args,
                past_key_values=past_key_values,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        assert position_embeddings is not None
        cache, lengths, x = past_key_values, past_key_values.lengths, hidden_states.contiguous()
        room = cache.layers[self._index]
        rows, _, hidden_size = x.shape
        if not room.is_initialized:
            like = x.view(rows, 1, 1, hidden_size)[..., : self._head_size]
            like = like.expand(-1, self._kv_size // self._head_size, -1, -1)
            room.lazy_initialization(like, like)
        cos, sin = (t.expand(rows, 1, -1).contiguous() for t in position_embeddings)
        y = torch.empty_like(x)
        self._kernel(
            x=x.data_ptr(),
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            keys=room.keys.data_ptr(),
            values=room.values.data_ptr(),
            capacity=cache.capacity,
            slots=cache.row_slots.data_ptr(),
            lengths=lengths.data_ptr(),
            y=y.data_ptr(),
            scratch=cache.scratch(
                rows * (hidden_size + 2 * (self._q_size + self._kv_size + self._inner)), x
            ).data_ptr(),
            num_rows=rows,
            num_threads=num_threads(),
        )
        return y
