"""Critics: they estimate the value of the state before each response token."""

from __future__ import annotations

import warnings
from typing import Protocol

import torch
from torch import Tensor, nn

from ppo_fast.data.batches import in_batches
from ppo_fast.data.rollout import Rollout
from ppo_fast.data.tokens import Tokens, make_tokens
from ppo_fast.data.trunk_states import TrunkStates
from ppo_fast.models.call_on_rows import call_on_rows
from ppo_fast.models.heads import TopValue, ValueHead, ValueModel
from ppo_fast.models.language_model import LanguageModel
from ppo_fast.models.passes import head_passes, passes_of
from ppo_fast.models.precision import computing_in
from ppo_fast.models.trunk import Split


class Critic(Protocol):
    """Estimates the value of the state before each response token.

    trained: whether it has weights, in ``module``, that the learner trains.
    reads_states: whether it is a head on the policy's states, trained in the policy's backward
        pass. Otherwise it runs on the tokens, in a pass of its own.
    bootstraps: whether GAE may use its values of later states; if not, lambda is 1.
    normalizes: whether scores are normalised within each prompt's samples before it sees them.
    packed: whether passes of its own have no padding (passes.py).
    """

    @property
    def module(self) -> nn.Module: ...

    @property
    def trained(self) -> bool: ...

    @property
    def reads_states(self) -> bool: ...

    @property
    def bootstraps(self) -> bool: ...

    @property
    def normalizes(self) -> bool: ...

    @property
    def packed(self) -> bool: ...

    def values(
        self, tokens: Tokens, states: Tensor | None = None, trunk_states: TrunkStates | None = None
    ) -> Tensor:
        """Compute values [B, T] with gradient, 0 beyond a response.

        ``states`` [B, T, D] are the policy's, for a head; ``trunk_states`` are for a critic that
        can start from them.
        """
        ...

    def values_of_rollout(
        self, rollout: Rollout, scores: Tensor, policy: LanguageModel, max_tokens: int
    ) -> Tensor:
        """Compute values [B, T] of what ``policy`` sampled, before the update.

        ``scores`` [B] are those of whole responses; ``max_tokens`` is the max tokens of a pass.
        """
        ...


class _TrainedCritic:
    """Base of critics with weights."""

    trained, bootstraps, reads_states, normalizes = True, True, False, False

    @property
    def packed(self) -> bool:
        return True

    def values(
        self, tokens: Tokens, states: Tensor | None = None, trunk_states: TrunkStates | None = None
    ) -> Tensor:
        raise NotImplementedError

    def values_of_rollout(
        self, rollout: Rollout, scores: Tensor, policy: LanguageModel, max_tokens: int
    ) -> Tensor:
        return in_batches(
            lambda part, trunk_states: self.values(part, trunk_states=trunk_states),
            rollout.tokens,
            rollout.trunk_states,
            max_tokens,
            packed=self.packed,
        )


class HeadCritic(_TrainedCritic):
    """Computes values by a head on the policy's states."""

    reads_states = True

    def __init__(self, module: ValueHead) -> None:
        self.module = module

    def values(
        self, tokens: Tokens, states: Tensor | None = None, trunk_states: TrunkStates | None = None
    ) -> Tensor:
        if states is None:
            raise ValueError("states: got None; a value head needs the policy's states")
        masked = ~tokens.response_mask
        # before the head too: 0 * NaN would reach the gradient of its weight
        return self.module(states.masked_fill(masked[..., None], 0.0)).masked_fill(masked, 0.0)

    def values_of_rollout(
        self, rollout: Rollout, scores: Tensor, policy: LanguageModel, max_tokens: int
    ) -> Tensor:
        if rollout.states is not None:
            return self.values(rollout.tokens, rollout.states)
        return in_batches(
            lambda part, trunk_states: self.values(part, policy.forward(part, trunk_states).states),
            rollout.tokens,
            rollout.trunk_states,
            max_tokens,
            packed=policy.packed,
        )


class TopCritic(_TrainedCritic):
    """Computes values by top layers of its own above the policy's trunk.

    Args:
        module: its body's lower layers are the policy's own, frozen; the top is trained.
        num_layers_unfrozen: number of top layers.
        compute_dtype, padding_free: as LanguageModel's.
    """

    def __init__(
        self,
        module: TopValue,
        num_layers_unfrozen: int,
        *,
        compute_dtype: torch.dtype | None = None,
        padding_free: bool = True,
    ) -> None:
        self.module, self.compute_dtype = module, compute_dtype
        self.passes = passes_of(
            module.body,
            Split(module.body, num_layers_unfrozen),
            compute_dtype=compute_dtype,
            padding_free=padding_free,
        )

    @property
    def packed(self) -> bool:
        return self.passes.packed

    def values(
        self, tokens: Tokens, states: Tensor | None = None, trunk_states: TrunkStates | None = None
    ) -> Tensor:
        with computing_in(self.compute_dtype, tokens.device):
            states = self.passes.states(tokens, trunk_states).before_response(tokens)
        return HeadCritic(self.module.head).values(tokens, states)


class ModelCritic(_TrainedCritic):
    """Computes values by a module ``forward(input_ids, attention_mask)``.

    A module that gives one value per sequence is called on the prompt alone: a value that has read
    the response would leak the outcome into the baseline of every token.

    Args:
        module: the value model.
        max_tokens: max tokens in one call.
        compute_dtype, padding_free: as LanguageModel's.
        split: Split of a ValueModel whose lower layers are the policy's trunk; None: they are not.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        max_tokens: int,
        compute_dtype: torch.dtype | None = None,
        split: Split | None = None,
        padding_free: bool = True,
    ) -> None:
        self.module, self.max_tokens, self.compute_dtype = module, max_tokens, compute_dtype
        self.passes = head_passes(
            module, split, compute_dtype=compute_dtype, padding_free=padding_free
        )
        self.per_token = self._gives_a_value_a_token()
        if not self.per_token:
            warnings.warn(
                f"value_model {type(module).__name__} gives one value per sequence: it is called "
                "on the prompt alone and that value is the baseline of every token. One value per "
                "token [B, L], as ppo_fast.ValueModel gives, learns faster.",
                stacklevel=3,
            )

    def values(
        self, tokens: Tokens, states: Tensor | None = None, trunk_states: TrunkStates | None = None
    ) -> Tensor:
        if self.passes is not None:
            assert isinstance(self.module, ValueModel)
            with computing_in(self.compute_dtype, tokens.device):
                states = self.passes.states(tokens, trunk_states).before_response(tokens)
                values = self.module.read(states)
            return values.float().masked_fill(~tokens.response_mask, 0.0)
        if self.per_token:
            return tokens.at_response(self._call(tokens.sequences()))
        pairs = zip(tokens.sequences(), tokens.prompt_lengths.tolist(), strict=True)
        value = torch.stack(self._call([row[:p] for row, p in pairs]))
        return torch.where(tokens.response_mask, value[:, None], 0.0)

    @property
    def packed(self) -> bool:
        return self.passes is not None and self.passes.packed

    def _call(self, rows: list[Tensor]) -> list[Tensor]:
        outputs = self._outputs(rows)
        if not self.per_token:
            # for prompts of one token, [B, 1] is one value per sequence
            outputs = [out[0] if out.shape == (1,) else out for out in outputs]
        if any((out.dim() == 1) != self.per_token for out in outputs):
            raise ValueError(
                "value_model: returned one value per token in one call and one per sequence in "
                "another"
            )
        return outputs

    @torch.no_grad()
    def _gives_a_value_a_token(self) -> bool:
        device = next(self.module.parameters()).device
        probe = make_tokens([[0, 0], [0, 0]], [[0], [0]], 0, device)
        return self._outputs(probe.sequences())[0].dim() == 1

    def _outputs(self, rows: list[Tensor]) -> list[Tensor]:
        with computing_in(self.compute_dtype, rows[0].device):
            return call_on_rows(self.module, rows, max_tokens=self.max_tokens, what="value_model")
