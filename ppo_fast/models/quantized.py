"""Models with frozen weights in 4 or 8 bits by bitsandbytes, under adapters that are trained.

With 4 bits it is QLoRA (Dettmers et al. 2023): the weights are in NF4, in blocks of 64 with
quantised constants. With 8 bits each row of a weight has a scale (LLM.int8(), Dettmers et al. 2022,
section 2.1), and products are those of the dequantised weights. bitsandbytes alone would quantise
the inputs of a product too, so that a token's log-prob while sampling and in the update differ by
the rounding of 8 bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Quantization = Literal["4bit", "8bit"]
QUANTIZATIONS: tuple[Quantization, ...] = ("4bit", "8bit")
INSTALL = "pip install 'ppo_fast[quantized]'"

# Sizes that bitsandbytes uses: weights with a constant, and constants with a constant of their own.
BLOCK, CONSTANTS_BLOCK = 64, 256


def check_quantization(quantization: str, device: torch.device) -> None:
    """Check that weights can be quantised on ``device``, before any model is loaded.

    Raises:
        ValueError: ``quantization`` is neither "4bit" nor "8bit", bitsandbytes is not installed, or
            it has no kernels for ``device``.
    """
    if quantization not in QUANTIZATIONS:
        raise ValueError(f"quantization: got {quantization!r}, expected '4bit' or '8bit'")
    kinds = _bitsandbytes().supported_torch_devices
    if device.type not in kinds:
        raise ValueError(
            f"quantization: bitsandbytes has no kernels for {device.type!r}; use one of "
            f"{', '.join(sorted(kinds))}, or train without quantization"
        )


def load_quantized(
    model: str,
    quantization: Quantization,
    device: torch.device | str,
    compute_dtype: torch.dtype | None = None,
    **options: Any,
) -> Any:
    """Load a causal LM whose linear layers are quantised, all but the LM head.

    Adapters (``with_lora``) make it a policy for ``PPO``.

    Args:
        model: a folder with the weights as they are, or already quantised; or a hub name.
        quantization: "4bit" or "8bit".
        device: where it is loaded; a quantised model is not moved later.
        compute_dtype: dtype of its products; None: float32.
        options: further arguments of ``from_pretrained``.

    Raises:
        ValueError: see ``check_quantization``.
        OSError: transformers finds no such model.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    device = torch.device(device)
    check_quantization(quantization, device)
    dtype = compute_dtype or torch.float32
    four = quantization == "4bit"
    config = BitsAndBytesConfig(
        load_in_4bit=four,
        load_in_8bit=not four,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    loaded = AutoModelForCausalLM.from_pretrained(
        model, quantization_config=config, device_map={"": device}, dtype=dtype, **options
    )
    prepare_quantized(loaded, compute_dtype)
    return loaded


def quantized_layers(model: nn.Module) -> list[Any]:
    """Return the layers of ``model`` that bitsandbytes has quantised."""
    return [module for module in model.modules() if bits_of(module) is not None]


def packed_weights(model: nn.Module) -> set[Tensor]:
    """Return the weights of quantised layers, whatever dtype their bits are stored as."""
    return {layer.weight for layer in quantized_layers(model)}


def bits_of(module: nn.Module) -> int | None:
    """Return 4 or 8 for a linear layer that bitsandbytes has quantised, else None."""
    # peft's wrappers have the same names
    kinds = type(module).__mro__
    names = {kind.__name__ for kind in kinds if kind.__module__.startswith("bitsandbytes.")}
    return 4 if "Linear4bit" in names else 8 if "Linear8bitLt" in names else None


def quantization_of(model: nn.Module) -> Quantization | None:
    """Return how the layers of ``model`` are quantised; None: they are not."""
    layers = quantized_layers(model)
    return None if not layers else "4bit" if bits_of(layers[0]) == 4 else "8bit"


def constant_names(model: nn.Module) -> set[str]:
    """Return the names in the state of ``model`` of quantised layers' constants.

    ``load_state_dict`` does not know those of 4 bits.
    """
    return {
        f"{path}.{name}"
        for path, layer in model.named_modules()
        if bits_of(layer) is not None
        for name in layer.state_dict().keys() - dict(layer.named_parameters()).keys()
    }


def shared_states(model: nn.Module) -> Iterator[Any]:
    """Yield what quantised layers hold beside their parameters: constants, and the 8-bit codes.

    It is frozen, as their weights are.
    """
    for layer in quantized_layers(model):
        yield layer.quant_state if bits_of(layer) == 4 else layer.state


def prepare_quantized(model: nn.Module, compute_dtype: torch.dtype | None) -> None:
    """Make quantised layers compute the same in every mode, by dequantised weights.

    - On processors with AVX-512 BF16, 4-bit layers in eval mode would rewrite their weights for a
      bfloat16 product that has no gradient. They keep their weights, or get them back.
    - 8-bit layers no longer quantise the input.

    Args:
        model: any model; other layers are left alone.
        compute_dtype: dtype of the 4-bit layers' products; None: float32.
    """
    for layer in quantized_layers(model):
        if bits_of(layer) == 4:
            layer.compute_dtype, layer.compute_type_is_set = compute_dtype or torch.float32, True
            layer.support_avx512bf16_for_cpu = False
            layer.state_dict()  # bitsandbytes undoes the rewriting where it gives the weights out
        else:
            layer.__class__ = _weight_only_class()


def to_float32(model: nn.Module) -> None:
    """Convert weights and buffers in half precision to float32; quantised weights stay."""
    packed = packed_weights(model)
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.dtype in (torch.float16, torch.bfloat16) and tensor not in packed:
            tensor.data = tensor.data.float()


def packed_bytes(weight: Tensor, quantization: Quantization) -> int:
    """Return the bytes of a linear layer's ``weight`` [out, in] when it is quantised.

    4 bits: a byte for two weights, a byte for the constant of 64, 4 bytes for 256 of these, and the
    two tables of codes. 8 bits: a byte for a weight and 4 for the scale of a row.
    """
    count = weight.numel()
    if quantization == "8bit":
        return count + 4 * weight.shape[0]
    constants = -(-count // BLOCK)
    return -(-count // 2) + constants + 4 * (-(-constants // CONSTANTS_BLOCK) + 16 + 256 + 1)


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise ValueError(f"quantization needs bitsandbytes: {INSTALL}") from error
    return bitsandbytes


class _Product(torch.autograd.Function):
    """x [..., in] times the dequantised weight; the weight is dequantised anew for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(codes, scales)
        ctx.dtype = x.dtype
        return F.linear(x, _dequantized(codes, scales, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, Tensor | None]:
        codes, scales = ctx.saved_tensors
        of_x = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = (gradient @ _dequantized(codes, scales, gradient.dtype)).to(ctx.dtype)
        if ctx.needs_input_grad[3]:
            of_bias = gradient.flatten(0, -2).sum(0)
        return of_x, None, None, of_bias


def _dequantized(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return codes [out, in] int8 times the scales [out] of their rows, 127 being a row's largest.

    In float32 first: bfloat16 has 8 bits, which a code takes alone.
    """
    return (codes * (scales.float() / 127)[:, None]).to(dtype)


@lru_cache(maxsize=1)
def _weight_only_class() -> type:
    """Return the class of 8-bit layers that leave their input as it is."""

    class WeightOnly8bit(_bitsandbytes().nn.Linear8bitLt):  # type: ignore[misc]
        """A bitsandbytes layer whose product is that of the dequantised weight."""

        def forward(self, x: Tensor) -> Tensor:
            scales = self.state.SCB if self.weight.SCB is None else self.weight.SCB
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return _Product.apply(x, self.weight.data, scales, bias)

    return WeightOnly8bit
