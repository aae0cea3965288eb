"""Simple versions of PPO in plain torch and transformers, to compare ours with.

`SequentialPPO` handles one prompt at a time, as the classic interface does (here on token ids; the
classic one encoded its texts again). `BatchedPPO` is a straightforward trainer of the top layers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

Score = Callable[[list[list[int]]], list[float]]
EPOCHS, CLIP, KL, LAMBDA = 4, 0.2, 0.1, 0.95


def generate(model: Any, ids: Tensor, mask: Tensor, new: int) -> Tensor:
    """Generate ``new`` tokens a row, drawn from the whole vocabulary, without an early end."""
    return model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=True,
        top_k=0,
        max_new_tokens=new,
        min_new_tokens=new,
        pad_token_id=0,
    )


def logprobs(logits: Tensor, ids: Tensor, new: int) -> Tensor:
    """Return the log-probs [B, new] of the last tokens of ``ids``."""
    table = logits[:, -new - 1 : -1].log_softmax(dim=-1)
    return table.gather(2, ids[:, -new:, None])[..., 0]


def gae(rewards: Tensor, values: Tensor, gamma: float) -> Tensor:
    advantages, last = torch.zeros_like(rewards), torch.zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        following = values[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
        last = rewards[:, t] + gamma * following - values[:, t] + gamma * LAMBDA * last
        advantages[:, t] = last
    return advantages


def ppo_loss(new: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    ratio = (new - old).exp()
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
    return -torch.minimum(ratio * advantages, clipped * advantages).mean()


def freeze_bottom(model: nn.Module, body: Any, k: int) -> None:
    """Freeze a Llama, except for the ``k`` top layers and the final norm."""
    model.requires_grad_(False)
    for module in (*body.layers[-k:], body.norm):
        module.requires_grad_(True)


class SequentialPPO:
    """One prompt at a time, with reference; trains all weights of policy and value model."""

    def __init__(self, policy: Any, value_model: nn.Module, score: Score) -> None:
        self.policy, self.value_model, self.score = policy, value_model, score
        self.reference = copy.deepcopy(policy).requires_grad_(False)
        self.optimizers = [AdamW(m.parameters(), lr=1e-5) for m in (policy, value_model)]

    def step(self, prompts: list[list[int]], new: int) -> None:
        rows = []
        for prompt in prompts:
            ids = torch.tensor([prompt])
            ids = generate(self.policy, ids, torch.ones_like(ids), new)
            with torch.no_grad():
                old = logprobs(self.policy(ids).logits, ids, new)
                reference = logprobs(self.reference(ids).logits, ids, new)
                values = self.value_model(ids)[:, -new - 1 : -1]
            rewards = torch.zeros(1, new)
            rewards[0, -1] = self.score(ids[:, -new:].tolist())[0]
            advantages = gae(rewards, values, gamma=0.99)
            rows.append((ids, old, reference, advantages, advantages + values))
        every = torch.cat([row[3] for row in rows])
        mean, std = every.mean(), every.std() + 1e-8
        for _ in range(EPOCHS):
            for ids, old, reference, advantages, returns in rows:
                found = logprobs(self.policy(ids).logits, ids, new)
                loss = ppo_loss(found, old, (advantages - mean) / std)
                loss = loss + KL * (found - reference).mean()
                (loss / len(rows)).backward()
                values = self.value_model(ids)[:, -new - 1 : -1]
                (0.5 * (values - returns).pow(2).mean() / len(rows)).backward()
            for optimizer in self.optimizers:
                parameters = [p for group in optimizer.param_groups for p in group["params"]]
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad()


class BatchedPPO:
    """Whole batches; trains the ``k`` top layers and a value head on the last states.

    Every pass runs every layer.
    """

    def __init__(self, policy: Any, k: int, score: Score) -> None:
        self.policy, self.score = policy, score
        freeze_bottom(policy, policy.model, k)
        self.reference = copy.deepcopy(policy).requires_grad_(False)
        self.head = nn.Linear(policy.config.hidden_size, 1)
        trained = [p for p in policy.parameters() if p.requires_grad]
        self.optimizer = AdamW([*trained, *self.head.parameters()], lr=1e-4)

    def forward(self, ids: Tensor, mask: Tensor, new: int) -> tuple[Tensor, Tensor]:
        places = (mask.cumsum(1) - 1).clamp_min(0)
        out = self.policy(ids, attention_mask=mask, position_ids=places, output_hidden_states=True)
        values = self.head(out.hidden_states[-1])[:, -new - 1 : -1, 0]
        return logprobs(out.logits, ids, new), values

    def step(self, prompts: list[list[int]], new: int) -> None:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        ids = generate(self.policy, ids, mask, new)
        mask = torch.cat([mask, torch.ones(len(ids), new, dtype=torch.int64)], dim=1)
        with torch.no_grad():
            old, values = self.forward(ids, mask, new)
            places = (mask.cumsum(1) - 1).clamp_min(0)
            logits = self.reference(ids, attention_mask=mask, position_ids=places).logits
            reference = logprobs(logits, ids, new)
            del logits
        rewards = -0.05 * (old - reference)
        rewards[:, -1] += torch.tensor(self.score(ids[:, -new:].tolist()))
        advantages = gae(rewards, values, gamma=1.0)
        returns = advantages + values
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        for _ in range(EPOCHS):
            found, values = self.forward(ids, mask, new)
            loss = ppo_loss(found, old, advantages) + 0.5 * (values - returns).pow(2).mean()
            loss.backward()
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
