"""Constitutional AI in small: a principle labels pairs, a reward model learns them, then PPO.

    python examples/constitution.py

SmolLM2-135M continues reviews and judges its own: of two, the kinder one is chosen. Expect little:
the judge's kindness of held-out samples went from 0.54 to 0.61 with one thread and to 0.57 with two
(64 samples, standard errors 0.02), in 12 minutes on two cores that others used too. The reward
model agrees with 0.53 to 0.63 of 19 held-out labels, and VADER, a lexicon, sees no gain: 0.21 to
0.10 and to 0.20 (standard errors 0.05). The chain is the same for a better judge.
"""

from __future__ import annotations

import copy

import tyro

from ppo_fast import PPO, RewardModel, RewardModelConfig, train_reward_model
from ppo_fast.demo.run import demo_config
from ppo_fast.demo.smollm2 import load_smollm2
from ppo_fast.demo.task import load_prompts, positivity
from ppo_fast.rewards.constitution import Constitution
from ppo_fast.rewards.principles import Principle
from ppo_fast.rewards.revise import preference_pairs
from ppo_fast.rewards.yes_no import Question, YesNoModel

# a small model tells two fitting words apart after a plain text; "Yes" from "No" is harder
TONE = "{completion}\n\nOne word for this review, positive or negative:"
KINDNESS = Principle("kindness", "The review is kind.", Question(TONE, "positive", "negative"))


def main(num_steps: int = 12, batch_size: int = 32) -> None:
    model, tokenizer = load_smollm2()  # your own: AutoModelForCausalLM.from_pretrained(...)
    prompts, held_out = load_prompts()
    judge = YesNoModel(copy.deepcopy(model), tokenizer, chat=False)  # PPO does not change it
    constitution = Constitution([KINDNESS], judge=judge)
    config = demo_config(seed=0)  # it trains the 4 top layers
    sampler = PPO(model, tokenizer, constitution, config=config)
    rollout = sampler.rollout(prompts[: 2 * batch_size], samples_per_prompt=6)
    first, second = rollout.completions[::2], rollout.completions[1::2]
    pairs = preference_pairs(constitution, rollout.prompts[::2], first, second)
    reward_model = RewardModel(copy.deepcopy(model), model.config.hidden_size)
    settings = RewardModelConfig(num_layers_unfrozen=4, learning_rate=2e-4, num_epochs=2)
    fitted = train_reward_model(reward_model, tokenizer, pairs, config=settings)
    print(f"{len(pairs)} pairs; held-out accuracy {fitted.evaluation['accuracy']:.2f}")

    ppo = PPO(model, tokenizer, reward_model, config=config)
    means: list[float] = []
    for _ in ("before", "after"):
        if means:
            ppo.train(prompts, num_steps=num_steps, batch_size=batch_size)
        found = ppo.rollout(held_out, samples_per_prompt=2)
        for score in (constitution.scores, positivity):
            means.append(sum(score(found.prompts, found.completions)) / len(found.prompts))
    print(f"kindness {means[0]:.2f} -> {means[2]:.2f}, VADER {means[1]:.2f} -> {means[3]:.2f}")


if __name__ == "__main__":
    tyro.cli(main)
