"""Measure whole PPO steps of a random Llama, with and without CUDA graphs.

The findings are seconds of the parts, tokens a second, and memory.

python benchmarks/on_gpu/step.py [--model=Llama-1B] [--rows=64] [--prompt=128] [--new=128] [--cpu]
"""

from __future__ import annotations

import argparse
import time
from types import SimpleNamespace
from typing import Any

import step_parts
import torch
from common import DEVICE, ON_GPU, attempt, note, parser, random_llama, synchronize, word_tokenizer

from ppo_fast import PPOConfig, PPOTrainer

METRICS = (
    "time/rollout",
    "time/experience",
    "time/update",
    "first_max_log_ratio",
    "kl_divergence",
    "policy_loss",
    "value_loss",
    "policy_grad_norm",
)


def clock() -> float:
    synchronize()
    return time.perf_counter()


def length_of_text(prompts: list[str], completions: list[str]) -> list[float]:
    return [len(text) % 97 / 50 for text in completions]


def make_trainer(asked: argparse.Namespace) -> PPOTrainer:
    model = random_llama(asked.model, torch.float32)
    tokenizer = word_tokenizer(model.config.vocab_size)
    config = PPOConfig(
        critic="head",
        compute_dtype="bfloat16",
        max_length=asked.new,
        num_epochs=1,
        microbatch_tokens=8192,
        learning_rate=1e-6,
    )
    trainer = PPOTrainer(model, None, length_of_text, tokenizer, DEVICE, config=config)
    trainer.engine.eos_ids = list  # type: ignore[attr-defined]  # all responses of one length
    plan = str(trainer.memory_plan(asked.rows, asked.prompt))[:300]
    note("step: trainer", model=asked.model, head=trainer.policy.reason, plan=plan)
    return trainer


def prompts(asked: argparse.Namespace, vocab_size: int, seed: int) -> list[str]:
    """Make prompts of random lengths, all different, since equal ones are computed once."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(asked.prompt // 2, asked.prompt + 1, (asked.rows,), generator=g)
    rows = [torch.randint(2, vocab_size, (n,), generator=g).tolist() for n in lengths.tolist()]
    return [" ".join(f"w{i}" for i in row) for row in rows]


def peak() -> dict[str, float]:
    if not ON_GPU:
        return {}
    found = torch.cuda.max_memory_allocated() / 1e9, torch.cuda.max_memory_reserved() / 1e9
    torch.cuda.reset_peak_memory_stats()
    return {"peak_gb": round(found[0], 2), "reserved_gb": round(found[1], 2)}


def step(trainer: PPOTrainer, asked: argparse.Namespace, title: str, seed: int) -> None:
    with attempt(f"step: {title}"):
        texts = prompts(asked, trainer.policy.text_config.vocab_size, seed)
        started = clock()
        metrics = trainer.train_step(texts)
        took = clock() - started
        note(
            "step",
            case=title,
            seconds=took,
            response_tokens_s=asked.rows * asked.new / took,
            rollout_tokens_s=asked.rows * asked.new / metrics["time/rollout"],
            **{name: round(metrics[name], 5) for name in METRICS},
            **peak(),
        )


def parts(trainer: PPOTrainer, asked: argparse.Namespace, seed: int) -> None:
    with attempt("step: parts"):
        texts = prompts(asked, trainer.policy.text_config.vocab_size, seed)
        step_parts.time = SimpleNamespace(perf_counter=clock)  # type: ignore[assignment]
        found = step_parts.seconds_of_parts(trainer, lambda: trainer.train_step(texts))
        works: dict[str, Any] = step_parts.work_of_parts(trainer)
        rates = {
            name: round(work.operations / found[name] / 1e12, 1)
            for name, work in works.items()
            if work.operations and found[name]
        }
        split: dict[str, float] = {name: round(took, 4) for name, took in found.items()}
        note("step: parts", seconds=split, tflop_s=rates, **peak())


def main() -> None:
    arguments = parser()
    arguments.add_argument("--model", default="Llama-1B" if ON_GPU else "tiny")
    for name, on_gpu, tiny in (("rows", 64, 4), ("prompt", 128, 8), ("new", 128, 6)):
        arguments.add_argument(f"--{name}", type=int, default=on_gpu if ON_GPU else tiny)
    asked = arguments.parse_args()
    trainer = make_trainer(asked)
    step(trainer, asked, "the first", seed=1)
    step(trainer, asked, "other prompts: new shapes", seed=2)
    step(trainer, asked, "the same prompts: shapes known", seed=2)
    parts(trainer, asked, seed=2)
    trainer.engine.cuda_graphs = False  # type: ignore[attr-defined]
    step(trainer, asked, "without CUDA graphs", seed=2)


if __name__ == "__main__":
    main()
