"""PPO on several rewards with weights, each of them logged by itself.

    python examples/weighted_rewards.py

SmolLM2-135M writes reviews: kind ones (VADER's sentiment), of about 12 words, that do not repeat
themselves. Expect kindness to rise from about 0.23 to about 0.61, and the distance to 12 words,
in shares of 12, to fall from about 0.59 to about 0.44, in some 3 minutes on two cores.
"""

from __future__ import annotations

import tyro

from ppo_fast import PPO, PPOConfig, evaluate
from ppo_fast.demo.smollm2 import load_smollm2
from ppo_fast.demo.task import load_prompts, positivity
from ppo_fast.rewards import Length, Repetition


def main(num_steps: int = 12, batch_size: int = 32) -> None:
    # for a model of your own: AutoModelForCausalLM.from_pretrained("org/name") and AutoTokenizer
    model, tokenizer = load_smollm2()
    rewards = {"kind": positivity, "length": Length(12, unit="words"), "repeats": Repetition()}
    config = PPOConfig(
        reward_weights=(1.0, 0.5, 0.5),
        learning_rate=2e-4,
        value_learning_rate=1e-3,
        kl_penalty=0.02,
        num_epochs=2,
        num_minibatches=2,
        critic="head",
        num_layers_unfrozen=4,
        max_length=24,
    )
    ppo = PPO(model, tokenizer, rewards, config=config)
    prompts, held_out = load_prompts()
    before = evaluate(ppo, held_out)
    ppo.train(prompts, num_steps=num_steps, batch_size=batch_size)
    after = evaluate(ppo, held_out)
    for name in rewards:
        old, new = (numbers[f"reward/{name}/mean"] for numbers in (before, after))
        print(f"{name}: {old:.2f} -> {new:.2f}")


if __name__ == "__main__":
    tyro.cli(main)
