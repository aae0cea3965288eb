"""Decoding by slots: prompts stream through the rows of one KV cache, one response each."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from ppo_fast.data.rollout import Rollout
from ppo_fast.data.tokens import Tokens
from ppo_fast.data.trunk_states import TrunkStates
from ppo_fast.models.language_model import LanguageModel, Next
from ppo_fast.models.precision import HALF
from ppo_fast.nonfinite import NotFiniteError
from ppo_fast.rollout.buffers import Buffers, KeptBuffers, Sizes, recorded_with
from ppo_fast.rollout.draw import NOT_FINITE, draw
from ppo_fast.rollout.prompts import PromptBatch, Prompts
from ppo_fast.rollout.request import Request
from ppo_fast.rollout.slots import step_arguments
from ppo_fast.rollout.speedups.cuda_graphs import Capture
from ppo_fast.rollout.speedups.few_rows import few_row_products
from ppo_fast.rollout.speedups.fused_layers import StepForward, fused_layers
from ppo_fast.rollout.speedups.int8_products import int8_products
from ppo_fast.rollout.speedups.slot_check import layers_can_be_fused, steps_can_attend
from ppo_fast.rollout.speedups.step_attention import step_attention


def decode_by_slots(
    model: LanguageModel,
    request: Request,
    *,
    max_prompt_tokens: int,
    keep_states: bool,
    whole_trunk: bool,
    int8: bool,
    capture: Capture | None,
    kept: KeptBuffers | None,
) -> Rollout:
    """Sample a response for every prompt; the other arguments are those of ``decode``.

    The model is in eval mode.
    """
    if capture is None or kept is None:
        kept = KeptBuffers(0)
    flags = {"keep_states": keep_states, "whole_trunk": whole_trunk}
    sizes = Sizes(
        sequences=len(request.prompts),
        slots=request.slots,
        capacity=max(map(len, request.prompts)) + max(request.max_lengths),
        draws=max(request.max_lengths) + whole_trunk,  # the last draw is not used
    )
    with _prepared(model, int8=int8) as (fused, attends, trunk_states):
        step_is = recorded_with(model, request.sampling, attends=attends, **flags)
        buffers = kept.take(model, sizes, step_is, attends=attends)
        decoding = _Decoding(
            model,
            request,
            buffers,
            trunk_pieces=trunk_states,
            capture=capture,
            **flags,
        )
        prompts = Prompts(
            model, request.prompts, max_prompt_tokens, request.pad_id, trunk_states, fused=fused
        )
        decoding.admit(prompts)
        while decoding.running:
            decoding.step()
            decoding.admit(prompts)
    rollout = decoding.rollout()
    kept.keep(buffers)
    return rollout


class _Prepared(NamedTuple):
    """Fast paths that a model takes within ``_prepared``.

    fused: whether all of its layers are fused.
    attends: whether its steps run within ``step_attention``.
    trunk_states: the list to which its passes append trunk states.
    """

    fused: bool
    attends: bool
    trunk_states: list[Tensor]


@contextmanager
def _prepared(model: LanguageModel, *, int8: bool) -> Iterator[_Prepared]:
    """Within the block, the model takes every fast path that it qualifies for.

    It looks for the layers that are in the model now: within ``_plain_layers``. Trunk states that
    weights in int8 give are not the policy's, and are not recorded.
    """
    with (
        fused_layers(model, int8=int8)
        if layers_can_be_fused(model)
        else nullcontext[list[StepForward]]([]) as fused,
        step_attention(model) if steps_can_attend(model) else nullcontext() as attends,
        int8_products(model, fused) if int8 else nullcontext(),
        few_row_products(model.model),
        nullcontext[list[Tensor]]([]) if int8 else model.recording_trunk() as trunk_states,
    ):
        all_fused = len(fused) == model.text_config.num_hidden_layers
        yield _Prepared(all_fused, attends is not None, trunk_states)


class _Decoding:
    """State of one rollout. Active slots are contiguous: the first ``len(running)``.

    None of the active slots is empty when a step begins. A step whose rows are rounded up also
    computes empty slots. These write to the last row of the buffers by sequence. Slots are empty
    only when no prompt waits, so that an empty slot takes no more steps than a response may have.
    """

    def __init__(
        self,
        model: LanguageModel,
        request: Request,
        buffers: Buffers,
        *,
        keep_states: bool,
        trunk_pieces: list[Tensor],
        whole_trunk: bool,
        capture: Capture | None,
    ) -> None:
        self.model, self.buffers = model, buffers
        self.request, self.prompts, self.slots = request, request.prompts, request.slots
        self.keep_states, self.capture = keep_states, capture
        self.trunk_pieces, self.whole_trunk = trunk_pieces, whole_trunk
        self.lingering: set[int] = set()  # ended sequences that take one more step, for whole_trunk
        self.waiting = deque(range(len(request.prompts)))
        self.running: list[int | None] = []  # index of each slot's sequence; None: it has ended
        self.responses: list[list[int]] = [[] for _ in request.prompts]
        self.finished = [False] * len(request.prompts)
        vocab_size = model.vocab_size
        ends = self._tensor([i for i in request.stops.ids if i < vocab_size])
        buffers.begin(request.seeds, ends)

    def admit(self, prompts: Prompts) -> None:
        """Give free slots to waiting sequences, and close the gaps that remain."""
        while self.waiting and (free := self._free_slots()):
            count = min(len(free), len(self.waiting))
            sequences = [self.waiting.popleft() for _ in range(count)]
            prompts.read([self.prompts[i] for i in sequences], self.buffers.cache)
            for batch, rows, chosen in prompts.take([self.prompts[i] for i in sequences]):
                self._start(batch, rows, [sequences[i] for i in chosen], [free[i] for i in chosen])
        for slot in reversed([s for s, sequence in enumerate(self.running) if sequence is None]):
            self._move_last_to(slot)

    def step(self) -> None:
        """Decode one more token of every running sequence."""
        slots, cache = range(len(self.running)), self.buffers.cache
        # step_attention reads each row's own tokens alone: one recording serves all lengths
        columns = cache.capacity if cache.attends else max(map(self._cached, slots)) + 1
        # while prompts wait, an empty slot beyond this rollout's would get further than a response
        most_rows = self.slots if self.waiting else cache.slots
        steps = self.buffers.steps
        steps.run(self._advance, len(slots), columns, self.capture, most_rows=most_rows)
        self._note(list(slots), self.buffers.token[: len(slots)])

    def _advance(self, rows: int, columns: int) -> None:
        """Decode one more token in each of the first ``rows`` slots.

        The step reads the cache's first ``columns`` columns. It launches device work alone, on
        tensors whose addresses stay the same, so that it can be recorded.
        """
        b = self.buffers
        slots, lengths = b.slots[:rows], b.length[:rows]
        arguments = step_arguments(self.model, b.cache, b.token[:rows], lengths, columns)
        next_ = self.model.next(**arguments)
        if self.trunk_pieces:
            piece = self.trunk_pieces.pop()
            trunk_states = self._trunk_like(piece)
            trunk_states[b.sequence[:rows], lengths] = piece[:, 0].to(trunk_states.dtype)
        lengths += 1
        self._draw(slots, next_)

    def rollout(self) -> Rollout:
        tokens = self.request.tokens(self.responses, self.model.device)
        width, beyond = tokens.response_ids.shape[1], ~tokens.response_mask

        def drawn(by_sequence: Tensor) -> Tensor:
            found = by_sequence[: len(self.prompts), :width]
            # the extra step of an ended sequence drew a token that is not in its response
            return found.masked_fill(beyond.view(*beyond.shape, *[1] * (found.dim() - 2)), 0.0)

        b = self.buffers
        logprobs = drawn(b.logprobs)
        if not torch.isfinite(logprobs).all():
            raise NotFiniteError(NOT_FINITE)
        return Rollout(
            tokens,
            logprobs,
            drawn(b.sampling_logprobs),
            torch.tensor(self.finished, device="cpu"),
            self.request.sampling,
            self._packed_trunk(tokens),
            None if b.states is None else drawn(b.states),
        )

    def _packed_trunk(self, tokens: Tokens) -> TrunkStates | None:
        trunk_states = self.buffers.trunk_states
        return (
            None
            if trunk_states is None
            else TrunkStates.pack(trunk_states, tokens, whole=self.whole_trunk)
        )

    def _cached(self, slot: int) -> int:
        """Return how many tokens of a slot are in the cache: all but the one drawn last."""
        sequence = self.running[slot]
        assert sequence is not None
        return len(self.prompts[sequence]) + len(self.responses[sequence]) - 1

    def _free_slots(self) -> list[int]:
        ended = [slot for slot, sequence in enumerate(self.running) if sequence is None]
        return ended + list(range(len(self.running), self.slots))

    def _start(
        self, batch: PromptBatch, rows: list[int], sequences: list[int], slots: list[int]
    ) -> None:
        """Give slots to sequences and draw their first tokens; prompts are ``rows`` of a batch."""
        self.running += [None] * (max(slots) + 1 - len(self.running))
        for slot, sequence in zip(slots, sequences, strict=True):
            self.running[slot] = sequence
        lengths = [len(self.prompts[sequence]) for sequence in sequences]
        source, target = self._tensor(rows), self._tensor(slots)
        b = self.buffers
        b.cache.fill(batch.keys_values, source, target)
        b.sequence[target], b.length[target] = self._tensor(sequences), self._tensor(lengths)
        b.position[target] = 0
        if batch.trunk_states is not None:
            trunk_states = self._trunk_like(batch.trunk_states)
            for row, sequence, length in zip(rows, sequences, lengths, strict=True):
                trunk_states[sequence, :length] = batch.trunk_states[row, :length]
        states = None if batch.next.states is None else batch.next.states[source]
        self._draw(target, Next(batch.next.logits[source], states))
        self._note(slots, b.token[target])

    def _draw(self, slots: Tensor, next_: Next) -> None:
        """Draw the next token of the sequences in ``slots`` [n] from their logits [n, V]."""
        b = self.buffers
        at = sequence, position = b.sequence[slots], b.position[slots]
        sampled = draw(next_.logits, b.seeds[sequence], position, self.request.sampling, b.ends)
        b.logprobs[at] = sampled.logprobs.float()
        b.sampling_logprobs[at] = sampled.sampling_logprobs.float()
        if self.keep_states and next_.states is not None:
            if b.states is None:
                b.states = b.room(next_.states, b.logprobs.shape[1])
            b.states[at] = next_.states
        b.token[slots] = sampled.tokens
        b.position[slots] += 1

    def _note(self, slots: list[int], tokens: Tensor) -> None:
        """Record the tokens [n] drawn in ``slots``, and end the sequences that they end."""
        for slot, token in zip(slots, tokens.tolist(), strict=True):
            sequence = self.running[slot]
            assert sequence is not None
            response = self.responses[sequence]
            if sequence in self.lingering:
                self.running[slot] = None
                continue
            noted, self.finished[sequence], ends = self.request.note(sequence, response, token)
            if noted != token:
                self.buffers.token[slot] = noted
            if ends:
                if self.whole_trunk:
                    self.lingering.add(sequence)
                else:
                    self.running[slot] = None

    def _move_last_to(self, slot: int) -> None:
        """Remove an empty slot, and move the last active slot, if it is another, into it."""
        b, last = self.buffers, len(self.running) - 1
        if slot != last:
            b.cache.copy(last, slot, self._cached(last))
            for by_slot in (b.sequence, b.length, b.position, b.token):
                by_slot[slot] = by_slot[last]
            self.running[slot] = self.running[last]
        b.sequence[last], b.length[last], b.position[last] = b.sizes.sequences, 0, 0
        self.running.pop()

    def _tensor(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self.model.device)

    def _trunk_like(self, piece: Tensor) -> Tensor:
        """Return the buffer of trunk states, [sequences + 1, capacity, D].

        It is in half precision where the weights are, also where fused layers pass on float32.
        """
        if self.buffers.trunk_states is None:
            like = piece[:1, :1].to(self.model.dtype) if self.model.dtype in HALF else piece
            self.buffers.trunk_states = self.buffers.room(like, self.buffers.cache.capacity)
        return self.buffers.trunk_states
