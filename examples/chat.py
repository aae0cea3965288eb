"""PPO on chats: prompts are lists of messages, which the tokenizer's chat template makes texts of.

    python examples/chat.py

SmolLM2-135M-Instruct is asked for names of things, and the reward likes answers of one word.
Expect the mean number of words in an answer to held-out questions to fall from about 12.1 to about
1.4 in some 3 minutes on two cores.
"""

from __future__ import annotations

import tyro

from ppo_fast import PPO, PPOConfig, evaluate
from ppo_fast.demo.smollm2 import load_smollm2

THINGS = (
    "fruit", "colour", "animal", "city", "river", "metal", "game", "tree", "bird", "country",
    "flower", "planet", "drink", "language", "tool", "fish", "dance", "spice", "month", "insect",
)  # fmt: skip


def few_words(prompts: list[str], completions: list[str], messages: list) -> list[float]:
    """Return minus the distance to one word, by 10; chats end with the assistant's message."""
    assert all(chat[-1]["role"] == "assistant" for chat in messages)
    return [-abs(len(text.split()) - 1) / 10 for text in completions]


def main(num_steps: int = 10, batch_size: int = 32) -> None:
    # for a model of your own: AutoModelForCausalLM.from_pretrained("org/name") and AutoTokenizer
    model, tokenizer = load_smollm2()
    system = {"role": "system", "content": "You answer in one word."}
    chats = [[system, {"role": "user", "content": f"Name a {thing}."}] for thing in THINGS]
    config = PPOConfig(
        learning_rate=2e-4,
        value_learning_rate=1e-3,
        kl_penalty=0.02,
        critic="head",
        num_layers_unfrozen=4,
        samples_per_prompt=2,
        max_length=20,
    )
    ppo = PPO(model, tokenizer, few_words, config=config)
    before = evaluate(ppo, chats[:6], samples_per_prompt=8)
    ppo.train(chats[6:], num_steps=num_steps, batch_size=batch_size)
    after = evaluate(ppo, chats[:6], samples_per_prompt=8)
    print(f"words in an answer: {1 - 10 * before['reward']:.1f} -> {1 - 10 * after['reward']:.1f}")


if __name__ == "__main__":
    tyro.cli(main)
