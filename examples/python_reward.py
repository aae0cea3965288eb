"""PPO with a Python function as its reward.

    python examples/python_reward.py

SmolLM2-135M continues openings of film reviews; the function likes short words. Expect the mean
number of letters in a word to fall from about 4.5 to about 3.7 in some 3 minutes on two cores.
"""

from __future__ import annotations

import tyro

from ppo_fast import PPO, PPOConfig, evaluate
from ppo_fast.demo.smollm2 import load_smollm2
from ppo_fast.demo.task import load_prompts


def short_words(prompts: list[str], completions: list[str]) -> list[float]:
    """Return minus the mean number of letters in a word of each completion."""
    words = [text.split() or [" " * 20] for text in completions]
    return [-sum(map(len, row)) / len(row) for row in words]


def main(num_steps: int = 12, batch_size: int = 32) -> None:
    # for a model of your own: AutoModelForCausalLM.from_pretrained("org/name") and AutoTokenizer
    model, tokenizer = load_smollm2()
    config = PPOConfig(
        learning_rate=2e-4,
        value_learning_rate=1e-3,
        kl_penalty=0.02,
        num_epochs=2,
        num_minibatches=2,
        critic="head",
        num_layers_unfrozen=4,
        max_length=24,
    )
    ppo = PPO(model, tokenizer, short_words, config=config)
    prompts, held_out = load_prompts()
    before = evaluate(ppo, held_out)
    ppo.train(prompts, num_steps=num_steps, batch_size=batch_size)
    after = evaluate(ppo, held_out)
    print(f"letters in a word: {-before['reward']:.2f} -> {-after['reward']:.2f}")


if __name__ == "__main__":
    tyro.cli(main)
