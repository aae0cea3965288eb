"""Batched decoding with a KV cache, by slots or with the model's own cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from ppo_fast.data.rollout import Rollout
from ppo_fast.data.sampling import Sampling
from ppo_fast.models.adapters import merged_adapters
from ppo_fast.models.attention import without_cudnn_attention
from ppo_fast.models.checks import dtype_name
from ppo_fast.models.language_model import LanguageModel
from ppo_fast.rollout.buffers import KeptBuffers
from ppo_fast.rollout.by_slots import decode_by_slots
from ppo_fast.rollout.own_cache import decode_with_own_cache, own_cache
from ppo_fast.rollout.request import Request
from ppo_fast.rollout.speedups.cuda_graphs import Capture
from ppo_fast.rollout.speedups.int8_check import check_int8
from ppo_fast.rollout.speedups.int8_products import int8_products
from ppo_fast.rollout.speedups.step_attention import masked_attention
from ppo_fast.rollout.stops import Stops
from ppo_fast.rollout.turns import Turns


@without_cudnn_attention()
@torch.no_grad()
def decode(
    model: LanguageModel,
    prompt_ids: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    seeds: Tensor,
    eos_ids: Sequence[int],
    pad_id: int,
    slots: int | None = None,
    max_prompt_tokens: int = 8192,
    max_lengths: Sequence[int] | None = None,
    to_text: Callable[[list[int]], str] | None = None,
    turns: Turns | None = None,
    ended: Callable[[int, list[int]], None] | None = None,
    keep_states: bool = False,
    whole_trunk: bool = False,
    int8: bool = False,
    capture: Capture | None = None,
    kept: KeptBuffers | None = None,
) -> Rollout:
    """Sample a response for every prompt.

    Draws depend on a sequence's seed and the token's position in the response alone, not on what
    else is decoded, in which order or in how many slots. Equal prompts are computed once.

    Args:
        model: the policy.
        prompt_ids: B lists of ids, none empty.
        sampling: lengths, the distribution drawn from, and what ends a response.
        seeds: [B] int64.
        eos_ids: ids that end a response; may be empty.
        pad_id: id at padded positions; it may be an EOS id.
        slots: sequences decoded at a time, which bounds the KV cache. When a sequence ends, the
            next prompt takes its slot. None: all.
        max_prompt_tokens: max tokens, with padding, of the prompts computed in one pass.
        max_lengths: B numbers, the max tokens of each response; None: ``sampling.max_length``.
        to_text: ids -> text, for stop strings.
        turns: asks an environment for a reply where a response would end; its tokens count for
            the length. None: it ends.
        ended: called with index and ids of a response as soon as it has ended; None: not called.
        keep_states: whether the rollout gets ``states``.
        whole_trunk: whether ``trunk_states`` includes the state of each row's last token, which
            takes one more step per sequence.
        int8: whether linear layers compute with copies of their weights in int8, made now, on the
            CPU (int8_products.py). Then the log-probs are those of another distribution than the
            policy's, and the rollout has neither states nor trunk states.
        capture: records steps, which are then replayed (cuda_graphs.py); None: steps are not
            recorded.
        kept: provides the buffers and recorded steps, and keeps them for the next rollout, if steps
            are recorded; None: they are freed.

    Returns:
        The rollout, without its texts.

    Raises:
        ValueError: a stop token id beyond the vocabulary, stop strings without ``to_text``, a
            model whose layers cannot be cached, ``kv_cache_dtype`` of one that does not decode by
            slots, or ``int8`` where no weight can be in int8.
        NotFiniteError: the model gave NaN or infinite logits.
    """
    _check_stop_token_ids(sampling, model.vocab_size)
    request = Request(
        prompts=[tuple(ids) for ids in prompt_ids],
        sampling=sampling,
        stops=Stops(sampling, eos_ids, to_text),
        seeds=seeds.to(model.device),
        max_lengths=max_lengths or [sampling.max_length] * len(prompt_ids),
        slots=min(slots or len(prompt_ids), len(prompt_ids)),
        pad_id=pad_id,
        turns=turns,
        ended=ended,
    )
    with _plain_layers(model):
        own = own_cache(model)
        if own is not None and model.kv_cache_dtype is not None:
            raise ValueError(
                f"kv_cache_dtype: got {dtype_name(model.kv_cache_dtype)!r}, but "
                f"{type(model.model).__name__} does not decode by slots in one KV cache "
                f"({own.why_no_slots}); use None"
            )
        if int8:
            check_int8(model)
        if own is not None:
            with int8_products(model) if int8 else nullcontext():
                return decode_with_own_cache(model, request)
        return decode_by_slots(
            model,
            request,
            max_prompt_tokens=max_prompt_tokens,
            keep_states=keep_states and not int8,
            whole_trunk=whole_trunk and model.split is not None and not int8,
            int8=int8,
            capture=capture,
            kept=kept,
        )


def _check_stop_token_ids(sampling: Sampling, vocab_size: int) -> None:
    if outside := [i for i in sampling.stop_token_ids if not 0 <= i < vocab_size]:
        raise ValueError(f"stop_token_ids: got {outside[0]}, expected 0 to {vocab_size - 1}")


@contextmanager
def _plain_layers(model: LanguageModel) -> Iterator[None]:
    """Within the block, the model is in eval mode, with masked attention and merged adapters."""
    with (
        _evaluating(model.model),
        masked_attention(model),
        # on the CPU alone: there fused layers, which need plain layers, save more than copies cost
        merged_adapters(model.model) if model.device.type == "cpu" else nullcontext(),
    ):
        yield


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Temporarily put every submodule in eval mode.

    In train mode, gradient checkpointing makes transformers drop the KV cache.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
