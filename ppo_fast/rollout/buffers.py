"""Tensors of decoding steps, and their reuse by the next rollout with the CUDA graphs on them."""

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
    """The most sequences, slots, tokens of a sequence (prompt and response), and draws for one."""

    sequences: int
    slots: int
    capacity: int
    draws: int


class Buffers:
    """The tensors that decoding steps read and write. Recorded steps hold their addresses.

    By slot, int64 [slots]: ``length`` (tokens in the cache), ``place`` (tokens drawn), ``token``
    (the last one drawn), ``sequence`` (the sequence's index; ``sizes.sequences`` in an empty slot).
    By sequence, with one more row for what empty slots draw: ``seeds`` [sequences + 1],
    ``logprobs`` and ``sampling_logprobs`` [sequences + 1, draws] and, once ``room`` has made them,
    ``states`` [sequences + 1, draws, D] and ``trunk`` [sequences + 1, capacity, D]. ``ends`` [V]:
    whether a token ends a response.

    Args:
        model: the policy.
        sizes: of the tensors.
        attends: steps run within ``step_attention``.
    """

    def __init__(self, model: LanguageModel, sizes: Sizes, *, attends: bool) -> None:
        self.sizes, device = sizes, model.device
        sequences, slots, capacity, draws = sizes
        self.cache = SlotCache(model.text_config, slots, capacity, attends=attends)
        self.length, self.place, self.token, self.sequence = torch.zeros(
            4, slots, dtype=torch.int64, device=device
        )
        self.slots = torch.arange(slots, device=device)
        self.seeds = torch.zeros(sequences + 1, dtype=torch.int64, device=device)
        self.logprobs, self.sampling_logprobs = torch.zeros(2, sequences + 1, draws, device=device)
        self.ends = torch.zeros(model.text_config.vocab_size, dtype=torch.bool, device=device)
        self.states: Tensor | None = None
        self.trunk: Tensor | None = None
        self.steps = Steps(slots, capacity)

    def begin(self, seeds: Tensor, ends: Tensor) -> None:
        """Every slot empty; ``seeds`` [B], and ``ends``, ids that end a response."""
        for tensor in (self.length, self.place, self.token, self.ends):
            tensor.zero_()
        self.sequence.fill_(self.sizes.sequences)
        self.seeds[: len(seeds)] = seeds
        self.ends[ends] = True

    def room(self, like: Tensor, columns: int) -> Tensor:
        """Zeros [sequences + 1, columns, D] for vectors such as the rows of ``like``."""
        return like.new_zeros(self.sizes.sequences + 1, columns, like.shape[-1])

    def nbytes(self) -> int:
        """Of all tensors whose size grows with the rollout's."""
        own = (self.logprobs, self.sampling_logprobs, self.states, self.trunk)
        return self.cache.nbytes() + sum(tensor.nbytes for tensor in own if tensor is not None)


class KeptBuffers:
    """Keeps the buffers of one rollout for the next, with the steps recorded on them.

    They serve a rollout that is no larger, whose steps would be recorded the same. Else they are
    freed and larger ones made.

    Args:
        most_bytes: buffers of more are not kept.
    """

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self._buffers: Buffers | None = None
        self._recorded_with: Hashable = None

    def take(
        self, model: LanguageModel, sizes: Sizes, recorded_with: Hashable, *, attends: bool
    ) -> Buffers:
        """Buffers of at least these sizes, to be given back to ``keep``."""
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
        """For the next rollout, unless they are too large."""
        if buffers.nbytes() <= self.most_bytes:
            self._buffers = buffers

    def free(self) -> None:
        """Keep nothing."""
        self._buffers = self._recorded_with = None


def recorded_with(
    model: LanguageModel, sampling: Sampling, *, keep_states: bool, whole_trunk: bool, attends: bool
) -> Hashable:
    """What a recorded step holds besides its buffers: addresses of weights, and numbers."""
    tensors = [*model.model.parameters(), *model.model.buffers()]
    return (
        tuple((tensor.data_ptr(), tensor.dtype) for tensor in tensors),
        (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_new_tokens),
        (keep_states, whole_trunk, attends, uses_tf32(model.device)),
    )
