"""A whole trainer step against a plain re-computation in float64.

The re-computation shares no code with ppo_fast: one sequence at a time without padding, one token
at a time for KL, GAE and losses, AdamW and gradient clipping by hand.
"""

import copy
import math

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer

from ppo_fast import PPOConfig, PPOTrainer, ValueModel

PROMPTS = ["The film was", "She thought the other", "There", "Nothing in this room was where"]
LEARNING_RATE, EPS = 3e-3, 1e-3  # a large eps: AdamW's first steps are then smooth in the gradient


def scores_of(prompts, completions):
    return [0.1 * len(c) - 0.3 * c.count("e") for c in completions]


def sequence_logprobs(model, ids, prompt_length, temperature):
    """Return log-probs of one unpadded sequence's response tokens, and the states before them."""
    output = model(torch.tensor([ids]), output_hidden_states=True)
    logits = output.logits[0, prompt_length - 1 : -1] / temperature
    labels = torch.tensor(ids[prompt_length:])
    states = output.hidden_states[-1][0, prompt_length - 1 : -1]
    return logits.log_softmax(-1)[range(len(labels)), labels], states


def token_advantages(rewards, values, gamma, lam):
    advantages, following = [0.0] * len(rewards), 0.0
    for t in reversed(range(len(rewards))):
        next_value = values[t + 1] if t + 1 < len(rewards) else 0.0
        following = rewards[t] + gamma * next_value - values[t] + gamma * lam * following
        advantages[t] = following
    return advantages


class AdamW:
    def __init__(self, params, config):
        self.params, self.config, self.t = list(params), config, 0
        self.m = [torch.zeros_like(p) for p in self.params]
        self.v = [torch.zeros_like(p) for p in self.params]

    @torch.no_grad()
    def step(self):
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
        norm = math.sqrt(sum(float((g * g).sum()) for g in grads))
        scale = min(1.0, self.config.max_grad_norm / (norm + 1e-6))
        (b1, b2), self.t = self.config.adam_betas, self.t + 1
        for p, g, m, v in zip(self.params, grads, self.m, self.v, strict=True):
            g = g * scale
            m.mul_(b1).add_((1 - b1) * g)
            v.mul_(b2).add_((1 - b2) * g * g)
            denominator = (v / (1 - b2**self.t)).sqrt() + self.config.adam_eps
            p.sub_(LEARNING_RATE * (m / (1 - b1**self.t)) / denominator)
            p.grad = None


def recompute(trainer, policy, value_model, value_head, rollout, scores, config, orders):
    """Train float64 copies, ``policy`` and ``value_model`` (or ``value_head``), on the rollout."""
    reference = copy.deepcopy(trainer.reference_model).double()
    temperature = rollout.sampling.temperature
    prompt_lengths = rollout.tokens.prompt_lengths.tolist()
    sequences = [row.tolist() for row in rollout.tokens.sequences()]

    def values_of(b, states):
        if value_head is not None:
            return value_head(states)[:, 0]
        p = prompt_lengths[b]
        return value_model(torch.tensor([sequences[b]]))[0, p - 1 : -1]

    old, ref, values, advantages, returns = [], [], [], [], []
    with torch.no_grad():
        for b, ids in enumerate(sequences):
            logprobs, states = sequence_logprobs(policy, ids, prompt_lengths[b], temperature)
            ref_logprobs = sequence_logprobs(reference, ids, prompt_lengths[b], temperature)[0]
            v = [float(x) for x in values_of(b, states)]
            rewards = [0.0] * len(v)
            if config.kl_in == "reward":
                rewards = [-config.kl_penalty * float(d) for d in logprobs - ref_logprobs]
            rewards[-1] += float(scores[b])
            a = token_advantages(rewards, v, config.gamma, config.gae_lambda)
            old.append(logprobs)
            ref.append(ref_logprobs)
            values.append(v)
            advantages.append(a)
            returns.append([x + y for x, y in zip(a, v, strict=True)])
    flat = [x for row in advantages for x in row]
    mean = sum(flat) / len(flat)
    variance = sum((x - mean) ** 2 for x in flat) / (len(flat) - 1)
    advantages = [[(x - mean) / math.sqrt(variance + 1e-8) for x in row] for row in advantages]

    critic = value_head if value_head is not None else value_model
    optimizers = [AdamW(policy.parameters(), config), AdamW(critic.parameters(), config)]
    low, high = config.clip
    for order in orders:
        count = sum(len(values[b]) for b in order)
        loss = 0.0
        for b in order:
            new, states = sequence_logprobs(policy, sequences[b], prompt_lengths[b], temperature)
            new_values = values_of(b, states)
            for t in range(len(values[b])):
                ratio = (new[t] - old[b][t]).exp()
                clipped = ratio.clamp(1 - low, 1 + high)
                a = advantages[b][t]
                loss = loss - torch.minimum(ratio * a, clipped * a) / count
                if config.kl_in == "loss":
                    # k2's gradient: its value does not matter here
                    loss = loss + config.kl_penalty * (new[t] - ref[b][t]) ** 2 / 2 / count
                error = (new_values[t] - returns[b][t]) ** 2
                if config.value_clip is not None:
                    delta = new_values[t] - values[b][t]
                    near = values[b][t] + delta.clamp(-config.value_clip, config.value_clip)
                    error = torch.maximum(error, (near - returns[b][t]) ** 2)
                loss = loss + config.value_loss_coef * 0.5 * error / count
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("kl_in", ["reward", "loss"])
@pytest.mark.parametrize("critic", ["model", "head"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_step_equals_its_recomputation_in_float64(family, critic, kl_in):
    tokenizer = tiny_tokenizer()
    policy = tiny_model(family)
    value_model = ValueModel(tiny_model(family, seed=1), hidden_size=64)
    config = PPOConfig(
        critic=critic,
        kl_in=kl_in,
        kl_penalty=0.3,
        gamma=0.97,
        clip_epsilon=0.1,
        clip_epsilon_high=0.15,
        value_clip=0.05,
        learning_rate=LEARNING_RATE,
        adam_eps=EPS,
        num_epochs=2,
        num_minibatches=2,
        microbatch_tokens=40,  # several microbatches a minibatch
        max_length=9,
        temperature=0.8,
        max_grad_norm=0.5,
    )
    trainer = PPOTrainer(
        policy,
        value_model if critic == "model" else None,
        scores_of,
        tokenizer,
        "cpu",
        config=config,
    )
    # the reference and the value function differ from the policy's start
    trainer.reference_model.load_state_dict(tiny_model(family, seed=2).state_dict())
    torch.nn.init.normal_(list(trainer.critic.module.parameters())[-2], std=0.1)
    policy64 = copy.deepcopy(trainer.policy_model).double()
    critic64 = copy.deepcopy(trainer.critic.module).double()
    start = [p.clone() for p in policy64.parameters()]
    value_start = [p.clone() for p in critic64.parameters()]
    rollout = trainer.rollout(PROMPTS)
    experience = trainer.make_experience(rollout)
    generator = torch.Generator().manual_seed(trainer.progress.seed_of("minibatches", 0))
    orders = [
        part.tolist()
        for _ in range(config.num_epochs)
        for part in torch.randperm(len(PROMPTS), generator=generator).tensor_split(2)
    ]
    trainer.update(experience)
    head64 = critic64.linear if critic == "head" else None
    model64 = critic64 if critic == "model" else None
    recompute(trainer, policy64, model64, head64, rollout, experience.scores, config, orders)

    pairs = zip(trainer.policy_model.parameters(), policy64.parameters(), start, strict=True)
    moved = check_moves(pairs)
    value_pairs = zip(
        trainer.critic.module.parameters(), critic64.parameters(), value_start, strict=True
    )
    assert moved > 1e-3
    assert check_moves(value_pairs) > 1e-3


def check_moves(triples):
    """Check that each weight changed as in float64, to a thousandth of the largest change."""
    largest = 0.0
    for found, expected, start in triples:
        move = (expected - start).abs().max().item()
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-3 * LEARNING_RATE * 4)
        largest = max(largest, move)
    return largest
