"""Value and reward models: a language model's body with a small head, and the heads alone."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ppo_fast.checks import check_counts
from ppo_fast.data.prompts import encode_prompts
from ppo_fast.data.tokens import position_ids
from ppo_fast.models.parts import body_of
from ppo_fast.models.transformers_internals import output_of

logger = logging.getLogger(__name__)


def _head(hidden_size: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(hidden_size, 256), nn.ReLU(), nn.Dropout(0.1), nn.Linear(256, 1))


def _check_hidden_size(base_model: nn.Module, hidden_size: int) -> None:
    config = getattr(base_model, "config", None)
    actual = None if config is None else config.get_text_config().hidden_size
    if actual is not None and hidden_size != actual:
        raise ValueError(
            f"hidden_size: got {hidden_size}, but {type(base_model).__name__} has {actual}; "
            f"pass hidden_size={actual}"
        )


class ValueModel(nn.Module):
    """Gives a value for every token: a language model's last hidden states through a small head.

    The value at a token estimates the return from the state that ends with it. Padding may be on
    either side.

    Args:
        base_model: a transformers causal LM (its LM head is not used) or a bare body.
        hidden_size: D, the width of its states.
    """

    def __init__(self, base_model: nn.Module, hidden_size: int = 768) -> None:
        super().__init__()
        _check_hidden_size(base_model, hidden_size)
        self.base_model, self.hidden_size = base_model, hidden_size
        self.value_head: nn.Module = _head(hidden_size)

    @classmethod
    def from_reward_model(cls, reward_model: nn.Module) -> ValueModel:
        """Make a value model that starts as a copy of a reward model.

        Its values are then the scores that the reward model gives a response that ends there, which
        is where the value functions of InstructGPT start (Ouyang et al. 2022, appendix C.4).

        Args:
            reward_model: a ``RewardModel``, or a transformers sequence classifier with one label on
                a decoder (its head is ``score``).

        Raises:
            TypeError, ValueError: it is something else.
        """
        base: nn.Module
        head: nn.Module
        if isinstance(reward_model, RewardModel):
            base, head = reward_model.base_model, reward_model.reward_head
        else:
            base, head = classifier_parts(reward_model)
        hidden_size = next(m for m in head.modules() if isinstance(m, nn.Linear)).in_features
        model = cls(copy.deepcopy(base), hidden_size)
        model.value_head = copy.deepcopy(head)
        return model.requires_grad_()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Compute values [B, L] from ids [B, L] int64 and a mask [B, L] (default: all ones)."""
        return self.read(_states(self.base_model, input_ids, attention_mask))

    def read(self, states: Tensor) -> Tensor:
        """Compute values [B, L] from the body's last states [B, L, D]."""
        return self.value_head(states).squeeze(-1)


class RewardModel(nn.Module):
    """Gives a score for every sequence, read at its last real token. Padding may be on either side.

    Args:
        base_model: a transformers causal LM (its LM head is not used) or a bare body.
        hidden_size: D, the width of its states.
    """

    append_eos = False
    """Whether ``get_rewards`` tokenises a response apart from its prompt and puts EOS after it, as
    a policy samples them; ``train_reward_model`` sets it where the model was trained so."""

    def __init__(self, base_model: nn.Module, hidden_size: int = 768) -> None:
        super().__init__()
        _check_hidden_size(base_model, hidden_size)
        self.base_model, self.hidden_size = base_model, hidden_size
        self.reward_head = _head(hidden_size)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        last: Tensor | None = None,
    ) -> Tensor:
        """Compute scores [B] from input_ids [B, L] int64.

        attention_mask [B, L], by default all ones, marks the real tokens. If padding is on the
        right alone, ``last`` [B] int64 may mark them instead: the index of each row's last token.
        """
        states = _states(self.base_model, input_ids, attention_mask)
        if last is None:
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            last = (mask.bool() * torch.arange(mask.shape[1], device=mask.device)).argmax(dim=1)
        return self.read(states, last)

    @torch.no_grad()
    def get_rewards(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device | str,
        max_length: int = 512,
    ) -> Tensor:
        """Compute scores [B] of texts, prompt and response joined, in eval mode.

        Of a text of more than ``max_length`` tokens, the beginning is cut, all but a BOS or CLS
        token, with a warning.

        Raises:
            ValueError: ``max_length`` is no whole number of at least 1.
        """
        check_counts(max_length=max_length)
        found = self._tokenize(prompts, responses, tokenizer)
        if long := sum(len(ids) > max_length for ids in found):
            logger.warning(
                "get_rewards: the beginning of %d of %d texts is cut, to max_length=%d tokens",
                long,
                len(found),
                max_length,
            )
        kept = {tokenizer.bos_token_id, tokenizer.cls_token_id}
        found = [_cut(ids, max_length, int(ids[:1] != [] and ids[0] in kept)) for ids in found]
        rows = [torch.tensor(ids, device="cpu") for ids in found]
        input_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
        last = torch.tensor([len(row) - 1 for row in rows], device=device)
        training = self.training
        try:
            return self.eval()(input_ids, last=last)
        finally:
            self.train(training)

    def _tokenize(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
    ) -> list[list[int]]:
        if not self.append_eos:
            texts = [p + r for p, r in zip(prompts, responses, strict=True)]
            return tokenizer(texts, verbose=False)["input_ids"]
        before = encode_prompts(tokenizer, prompts)
        after = tokenizer(list(responses), add_special_tokens=False, verbose=False)["input_ids"]
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        return [
            [*prompt.ids, *ids, *(end if ids[-1:] != end else [])]
            for prompt, ids in zip(before, after, strict=True)
        ]

    def read(self, states: Tensor, last: Tensor) -> Tensor:
        """Compute scores [B] from the body's last states [B, L, D] at the indices ``last`` [B]."""
        return self.reward_head(states[torch.arange(len(last), device=last.device), last]).squeeze(
            -1
        )


def _cut(ids: list[int], max_length: int, keeps: int) -> list[int]:
    """Return at most ``max_length`` ids: the first ``keeps`` of the text, and its last ones."""
    excess = max(0, len(ids) - max_length)
    return [*ids[:keeps], *ids[keeps + excess :]]


def classifier_parts(classifier: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Return the body and the head of a transformers classifier with one label on a decoder."""
    kind, head = type(classifier).__name__, getattr(classifier, "score", None)
    if not isinstance(head, nn.Linear):
        raise TypeError(
            f"reward_model: got {kind}, expected a ppo_fast.RewardModel, or a sequence classifier "
            "of transformers on a decoder, whose head is `score`: a value must not see later tokens"
        )
    if head.out_features != 1:
        raise ValueError(
            f"reward_model: {kind} has {head.out_features} labels, expected 1 (a score)"
        )
    return getattr(classifier, str(classifier.base_model_prefix)), head


def _states(base_model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    # ``output_hidden_states=True`` gives the same last state, but keeps all others and the logits
    body = body_of(base_model)
    if attention_mask is None:
        return output_of(body, input_ids=input_ids, use_cache=False).last_hidden_state
    return output_of(
        body,
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids(attention_mask),
        use_cache=False,
    ).last_hidden_state


class ValueHead(nn.Module):
    """Linear value head on the policy's last hidden state: [..., D] -> [...] float32.

    Its weights start at 0, so that the first advantages are those of the rewards alone.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1, dtype=torch.float32)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, states: Tensor) -> Tensor:
        return self.linear(states.to(self.linear.weight.dtype)).squeeze(-1)


class TopValue(nn.Module):
    """A transformer's body with a value head.

    Args:
        body: returns states [B, L, D].
        hidden_size: D.
    """

    def __init__(self, body: nn.Module, hidden_size: int) -> None:
        super().__init__()
        self.body, self.head = body, ValueHead(hidden_size)
