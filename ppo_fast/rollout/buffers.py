"""Buffers of decoding steps, kept for the next rollout with the CUDA graphs recorded on them."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from ppo_fast.data.sampling import Sampling
from ppo_fast.models.language_model import LanguageModel
from ppo_fast.models.precision import uses_tf32
from ppo_fast.rollout.slots import SlotCache
from ppo_fast.rollout.speedups.cuda_graphs import Steps, round_up

CAPACITY_MULTIPLE = 64


class Sizes(NamedTuple):
    """Sizes of the buffers.

    sequences: max sequences of a rollout.
    slots: max sequences decoded at a time.
    capacity: max tokens of a sequence, prompt and response together.
    draws: max tokens drawn for a sequence.
    """

    sequences: int
    slots: int
    capacity: int
    draws: int


class Buffers:
    """Tensors that decoding steps read and write. Recorded steps hold their addresses.

    By slot, int64 [slots]: ``length`` (tokens in the cache), ``position`` (tokens drawn so far),
    ``token`` (the last token drawn), ``sequence`` (index of the slot's sequence;
    ``sizes.sequences`` in an empty slot).

    By sequence, with one more row for the draws of empty slots: ``seeds`` [sequences + 1],
    ``logprobs`` and ``sampling_logprobs`` [sequences + 1, draws] and, once ``room`` has allocated
    them, ``states`` [sequences + 1, draws, D] and ``trunk_states`` [sequences + 1, capacity, D].

    ``ends`` [V] bool: whether a token ends a response.

    Args:
        model: the policy.
        sizes: sizes of the tensors.
        attends: whether steps run within ``step_attention``.
    """

    def __init__(self, model: LanguageModel, sizes: Sizes, *, attends: bool) -> None:
        self.sizes, device = sizes, model.device
        sequences, slots, capacity, draws = sizes
        self.cache = SlotCache(
            model.text_config, slots, capacity, attends=attends, dtype=model.kv_cache_dtype
        )
        self.length, self.position, self.token, self.sequence = torch.zeros(
            4, slots, dtype=torch.int64, device=device
        )
        self.slots = torch.arange(slots, device=device)
        self.seeds = torch.zeros(sequences + 1, dtype=torch.int64, device=device)
        self.logprobs, self.sampling_logprobs = torch.zeros(
            2, sequences + 1, draws, dtype=torch.float32, device=device
        )
        self.ends = torch.zeros(model.vocab_size, dtype=torch.bool, device=device)
        self.states: Tensor | None = None
        self.trunk_states: Tensor | None = None
        self.steps = Steps(capacity)

    def begin(self, seeds: Tensor, ends: Tensor) -> None:
        """Empty every slot, and set ``seeds`` [B] and ``ends``, the ids that end a response."""
        for tensor in (self.length, self.position, self.token, self.ends):
            tensor.zero_()
        self.sequence.fill_(self.sizes.sequences)
        self.seeds[: len(seeds)] = seeds
        self.ends[ends] = True

    def room(self, like: Tensor, columns: int) -> Tensor:
        """Allocate zeros [sequences + 1, columns, D], with D, dtype and device of ``like``."""
        return like.new_zeros(self.sizes.sequences + 1, columns, like.shape[-1])

    def nbytes(self) -> int:
        """Return the total size in bytes of the tensors that grow with the rollout."""
        own = (self.logprobs, self.sampling_logprobs, self.states, self.trunk_states)
        return self.cache.nbytes() + sum(tensor.nbytes for tensor in own if tensor is not None)


class KeptBuffers:
    """Keeps the buffers of a rollout, and the steps recorded on them, for the next rollout.

    They serve a rollout that is no larger and whose steps would be recorded the same. For any other
    rollout they are freed and new ones allocated.

    Args:
        most_bytes: max size of buffers that are kept.
    """

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self._buffers: Buffers | None = None
        self._recorded_with: Hashable = None

    def take(
        self, model: LanguageModel, sizes: Sizes, recorded_with: Hashable, *, attends: bool
    ) -> Buffers:
        """Return buffers of at least these sizes. The caller gives them back to ``keep``."""
        buffers, self._buffers = self._buffers, None
        if self.most_bytes > 0:  # the next prompts may be a little longer
            sizes = sizes._replace(capacity=round_up(sizes.capacity, CAPACITY_MULTIPLE))
        if buffers is not None:
            sizes = Sizes(*map(max, zip(sizes, buffers.sizes, strict=True)))
            if sizes == buffers.sizes and recorded_with == self._recorded_with:
                return buffers
            del buffers  # before larger ones are allocated
        self._recorded_with = recorded_with
        return Buffers(model, sizes, attends=attends)

    def keep(self, buffers: Buffers) -> None:
        """Keep ``buffers`` for the next rollout, unless they exceed ``most_bytes``."""
        if buffers.nbytes() <= self.most_bytes:
            self._buffers = buffers

    def free(self) -> None:
        """Free the kept buffers."""
        self._buffers = self._recorded_with = None


def recorded_with(
    model: LanguageModel, sampling: Sampling, *, keep_states: bool, whole_trunk: bool, attends: bool
) -> Hashable:
    """Return a key of what recorded steps hold besides buffers: weights' addresses and settings."""
    tensors = [*model.model.parameters(), *model.model.buffers()]
    return (
        tuple((tensor.data_ptr(), tensor.dtype) for tensor in tensors),
        (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_new_tokens),
        (keep_states, whole_trunk, attends, uses_tf32(model.device)),
    )
