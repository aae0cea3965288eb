"""The engine that decodes with the policy in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ppo_fast.config import PPOConfig
from ppo_fast.data.rollout import Rollout
from ppo_fast.data.sampling import Sampling
from ppo_fast.models.adapters import adapted_layers
from ppo_fast.models.language_model import LanguageModel
from ppo_fast.models.patching import uncompiled
from ppo_fast.rollout.buffers import KeptBuffers
from ppo_fast.rollout.decode import decode
from ppo_fast.rollout.engine import OnIds, eos_ids
from ppo_fast.rollout.speedups.cuda_graph_check import CAPTURES, capture_for
from ppo_fast.rollout.speedups.fast_paths import log_fast_paths
from ppo_fast.rollout.turns import Turns


class LocalEngine:
    """Decodes with the policy in this process; see ``decode``.

    Args:
        model: the policy. Its weights are read at every call: there is nothing to synchronise.
        eos_ids: returns the ids that end a response; called by every ``generate``.
        pad_id: id at padded positions.
        slots: sequences decoded at a time; None: all.
        max_prompt_tokens: max tokens, with padding, of the prompts computed in one pass.
        to_text: ids -> text, for stop strings.
        keep_states: whether rollouts get ``states``, the inputs of the LM head.
        whole_trunk: whether rollouts get the trunk states of last tokens too.
        int8: whether it decodes with copies of linear layers' weights in int8, made at every call;
            see ``decode``.
        cuda_graphs: on a GPU, capture steps and replay them, if a check finds that no token
            changes.
        kept_bytes: max size of buffers that are kept for the next rollout, with the graphs captured
            on them. Those of a model with adapters are never kept: adapters may be merged or
            switched off in between.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        eos_ids: Callable[[], Sequence[int]],
        pad_id: int,
        slots: int | None = None,
        max_prompt_tokens: int = 8192,
        to_text: Callable[[list[int]], str] | None = None,
        keep_states: bool = False,
        whole_trunk: bool = False,
        int8: bool = False,
        cuda_graphs: bool = True,
        kept_bytes: int = 0,
    ) -> None:
        self.model, self.eos_ids, self.pad_id = model, eos_ids, pad_id
        self.slots, self.max_prompt_tokens = slots, max_prompt_tokens
        self.to_text, self.cuda_graphs = to_text, cuda_graphs
        self.keep_states, self.whole_trunk, self.int8 = keep_states, whole_trunk, int8
        self.kept = KeptBuffers(kept_bytes)

    def generate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        seeds: Tensor,
        ended: OnIds | None = None,
        turns: Turns | None = None,
    ) -> Rollout:
        """Sample as an Engine does; ``turns`` lets an environment reply within responses."""
        with uncompiled(self.model.model):
            return self._generate(prompt_ids, sampling, seeds, ended, turns)

    def _generate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Tensor,
        ended: OnIds | None,
        turns: Turns | None,
    ) -> Rollout:
        capture = capture_for(self.model) if self.cuda_graphs else None
        rollout = decode(
            self.model,
            prompt_ids,
            sampling,
            seeds=seeds,
            eos_ids=self.eos_ids(),
            pad_id=self.pad_id,
            slots=self.slots,
            max_prompt_tokens=self.max_prompt_tokens,
            to_text=self.to_text,
            turns=turns,
            ended=ended,
            keep_states=self.keep_states,
            whole_trunk=self.whole_trunk,
            int8=self.int8,
            capture=capture,
            kept=None if adapted_layers(self.model.model) else self.kept,
        )
        log_fast_paths(self.model, cuda_graphs=self.cuda_graphs, int8=self.int8)
        return rollout

    def sync_weights(self, model: nn.Module) -> None:
        if model is not self.model.model:
            raise ValueError(
                "model: got another model than the one that this LocalEngine was made with"
            )

    def close(self) -> None:
        """Free the kept buffers."""
        self.kept.free()


def make_local_engine(
    policy: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    config: PPOConfig,
    *,
    keep_states: bool,
    whole_trunk: bool,
) -> LocalEngine:
    """Make the engine that decodes with ``policy`` as ``config`` asks.

    Args:
        policy, tokenizer: as the trainer's.
        config: slots, budgets of tokens and of bytes, weights of rollouts, CUDA graphs.
        keep_states, whole_trunk: as LocalEngine's.
    """
    return LocalEngine(
        policy,
        eos_ids=partial(eos_ids, policy.model, tokenizer),
        pad_id=tokenizer.pad_token_id,
        slots=config.rollout_slots,
        max_prompt_tokens=config.forward_batch_tokens,
        to_text=partial(tokenizer.decode, skip_special_tokens=False),
        keep_states=keep_states,
        whole_trunk=whole_trunk,
        int8=config.rollout_weights == "int8",
        cuda_graphs=config.cuda_graphs,
        kept_bytes=kept_bytes(policy, config),
    )


def kept_bytes(policy: LanguageModel, config: PPOConfig) -> int:
    """Return the max bytes that are kept between rollouts; 0 where nothing is.

    Only CUDA graphs gain from it, and LocalEngine keeps nothing of a model with adapters.
    """
    graphs = policy.device.type in CAPTURES and config.cuda_graphs
    keeps = graphs and not adapted_layers(policy.model)
    return config.kept_rollout_bytes if keeps else 0
