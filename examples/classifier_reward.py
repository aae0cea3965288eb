"""PPO against a sentiment classifier, trained here on 96 labelled sentences.

    python examples/classifier_reward.py

It is SmolLM2's body with a linear head; the reward is the log-odds of POSITIVE. Expect its mean to
go from +1.5 to +2.9, and VADER's, which neither has seen, from +0.21 to +0.28 (standard error
0.06), in 2.5 minutes of processor time.
"""

from __future__ import annotations

import tempfile

import torch
import tyro
from transformers import AutoModelForSequenceClassification

from ppo_fast import PPO, ClassifierReward
from ppo_fast.demo.run import demo_config
from ppo_fast.demo.smollm2 import load_smollm2
from ppo_fast.demo.task import load_prompts, positivity

THINGS = ("food", "staff", "room", "film", "evening", "sound")
BAD = ["awful", "boring", "dirty", "broken", "rude", "dull", "terrible", "sad"]
GOOD = ["lovely", "delightful", "clean", "perfect", "kind", "brilliant", "wonderful", "happy"]


def main(num_steps: int = 12, batch_size: int = 16) -> None:
    model, tokenizer = load_smollm2()
    train, held_out = load_prompts()
    # your own: AutoModelForSequenceClassification.from_pretrained(...) and its tokenizer
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        classifier = AutoModelForSequenceClassification.from_pretrained(
            folder, id2label={0: "NEGATIVE", 1: "POSITIVE"}, pad_token_id=tokenizer.pad_token_id
        )
    texts = [f"The {thing} was {word}." for word in BAD + GOOD for thing in THINGS]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    with torch.no_grad():  # the states of each text's last token
        states = classifier.base_model(**batch).last_hidden_state
        states = states[torch.arange(len(texts)), batch["attention_mask"].sum(1) - 1]
    targets = torch.arange(2).repeat_interleave(len(texts) // 2)
    optimizer = torch.optim.AdamW(classifier.score.parameters(), lr=1e-3, weight_decay=0.1)
    for _ in range(100):
        torch.nn.functional.cross_entropy(classifier.score(states), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    reward = ClassifierReward(classifier, tokenizer, label="POSITIVE")
    ppo = PPO(model, tokenizer, reward, config=demo_config(seed=0))
    for when in ("before", "after"):
        if when == "after":
            ppo.train(train, num_steps=num_steps, batch_size=batch_size)
        found = ppo.rollout(held_out, samples_per_prompt=2)
        judged = (reward(found.prompts, found.completions), positivity([], found.completions))
        print(when, "classifier {:+.2f}, VADER {:+.2f}".format(*(sum(s) / len(s) for s in judged)))


if __name__ == "__main__":
    tyro.cli(main)
