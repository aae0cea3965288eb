"""Print which of two responses SmolLM2-135M-Instruct prefers: the table of docs/constitution.md.

python benchmarks/judges.py
"""

from __future__ import annotations

import logging
import math
from pathlib import Path

import yaml

from ppo_fast.demo.smollm2 import load_smollm2
from ppo_fast.rewards.principles import default_principles
from ppo_fast.rewards.yes_no import Question, YesNoModel

PAIRS = Path(__file__).parents[1] / "tests" / "rewards" / "judged_pairs.yaml"
TONE = "{completion}\n\nOne word for the tone of this answer, kind or rude:"
POLITE = "{completion}\n\nIs the answer kind and polite? Reply with Yes or No"


def main() -> None:
    logging.disable(logging.WARNING)
    model, tokenizer = load_smollm2()
    pairs = yaml.safe_load(PAIRS.read_text("utf-8"))
    plain, chat = (YesNoModel(model, tokenizer, chat=chat) for chat in (False, True))
    asked = [
        ("kindness", "kind or rude", plain, Question(TONE, "kind", "rude")),
        ("kindness", "kind and polite", chat, Question(POLITE)),
        *((p.name, "default", chat, p.evaluator) for p in default_principles()),
    ]
    print("| question | pairs | right | mean score, better / worse |\n|---|---|---|---|")
    for name, words, judge, question in asked:
        prompts, better, worse = zip(*pairs[name], strict=True)
        odds = (judge.ask([question] * len(prompts), prompts, t) for t in (better, worse))
        high, low = ([1 / (1 + math.exp(-x)) for x in row] for row in odds)
        count, right = len(high), sum(a > b for a, b in zip(high, low, strict=True))
        means = f"{sum(high) / count:.2f} / {sum(low) / count:.2f}"
        print(f"| {name}, {words} | {count} | {right} | {means} |")


if __name__ == "__main__":
    main()
