"""Folders of runs, written in the formats of ``ppo-fast train`` without a model."""

from __future__ import annotations

import json
import math
import random
from dataclasses import asdict
from pathlib import Path

import yaml

from ppo_fast import PPOConfig

START = 1_790_000_000.0
OPENINGS = [
    "I watched this film on a rainy evening and",
    "The acting in the second half was",
    "My brother recommended the book because",
    "Nobody in the theatre expected that",
    "What stays with me is",
    "As for the music, I would say",
]
GOOD = "it was a wonderful , warm and funny story that I would happily watch again ."
POOR = "it was a dull , slow and tired story that I never want to see again ."


def write_run(folder, *, steps=60, seed=0, every=10, tokens=True, changes=None, **config):
    """Write a run of ``steps`` steps to ``folder``, evaluated every ``every`` (0: never).

    changes: takes a step's metrics, and may change them.
    config: settings that differ from the defaults.
    """
    draw = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, num_steps=steps, **config)
    metrics, samples = [], []
    for step in range(1, steps + 1):
        line = metrics_line(step, steps, draw)
        if changes is not None:
            changes(line)
        metrics.append(line)
        if step in (1, 2, steps // 2, steps):
            samples += sample_lines(step, step / steps, draw, tokens)
    write_lines(folder / "metrics.jsonl", metrics)
    write_lines(folder / "samples.jsonl", samples)
    if every:
        at = [step for step in range(steps + 1) if step % every == 0]
        write_lines(folder / "evaluations.jsonl", [evaluation_line(s, steps, draw) for s in at])
        both = [sample_lines(s, s / steps, draw, tokens) for s in (at[0], at[-1])]
        write_lines(folder / "evaluation_samples.jsonl", both[0] + both[1])
    write_lines(folder / "events.jsonl", event_lines(steps))
    return folder


def write_config(folder, **settings):
    run = {
        "policy": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "prompts": "openings.txt",
        "prompt_column": None,
        "reward": ["my_rewards:kind", "my_rewards:brief"],
        "held_out": "0.1",
        "output_dir": "runs/kind",
        "num_steps": 60,
        "batch_size": 32,
        "checkpoint_freq": 10,
        "resume": False,
        "device": "cpu",
    }
    ppo = {"learning_rate": 2e-4, "kl_penalty": 0.02, "critic": "head", "num_layers_unfrozen": 4}
    both = run | asdict(PPOConfig()) | ppo | settings
    fields = {name: list(v) if isinstance(v, tuple) else v for name, v in both.items()}
    (folder / "config.yaml").write_text(yaml.safe_dump(fields, sort_keys=False), "utf-8")


def metrics_line(step, steps, draw):
    """A line of metrics.jsonl of a run that learns."""
    done = step / steps
    reward = 0.3 + 0.5 * (1 - math.exp(-3 * done)) + draw.gauss(0, 0.04)
    length = 24 - 6 * done + draw.gauss(0, 1)
    kl = 9 * done + abs(draw.gauss(0, 0.3))
    spread = 0.02 + abs(draw.gauss(0, 0.01))
    return {
        "step": step,
        "time": START + step * 8.5 + draw.random(),
        "mean_reward": reward,
        "reward_std": 0.3 - 0.1 * done + draw.gauss(0, 0.01),
        "reward/kind/mean": reward + 0.1,
        "reward/kind/std": 0.3,
        "reward/brief/mean": -0.1 + draw.gauss(0, 0.01),
        "reward/brief/std": 0.05,
        "kl_divergence": kl / length,
        "kl_sequence": kl,
        "entropy": 2.8 - 1.2 * done + draw.gauss(0, 0.05),
        "policy_loss": draw.gauss(0, 0.01),
        "clip_fraction": 0.05 + 0.1 * done + abs(draw.gauss(0, 0.01)),
        "approx_kl": 0.01 + draw.gauss(0, 0.002),
        "ratio_mean": 1 + draw.gauss(0, 0.003),
        "ratio_min": 1 - 9 * spread,
        "ratio_max": 1 + 12 * spread,
        "ratio_p01": 1 - 4 * spread,
        "ratio_p50": 1 + draw.gauss(0, 0.002),
        "ratio_p99": 1 + 5 * spread,
        "first_max_log_ratio": 2e-6 + abs(draw.gauss(0, 1e-7)),
        "mean_advantage": draw.gauss(0, 0.02),
        "value_loss": 0.4 * math.exp(-8 * done) + 0.03 + abs(draw.gauss(0, 0.005)),
        "value_mean": reward - 0.05,
        "value_min": reward - 0.6,
        "value_max": reward + 0.5,
        "return_mean": reward,
        "explained_variance": None if step == 3 else 0.6 * (1 - math.exp(-6 * done)) - 0.1,
        "response_length": length,
        "response_length_p10": length - 9,
        "response_length_p50": length + 1,
        "response_length_p90": length + 7,
        "finished_fraction": min(1.0, 0.2 + 0.7 * done + draw.gauss(0, 0.02)),
        "kl_coefficient": 0.02,
        "learning_rate": 2e-4 * (1 - done),
        "policy_grad_norm": 0.8 + abs(draw.gauss(0, 0.2)) + (6 if step == steps // 3 else 0),
        "tokens": int(32 * length),
        "time/rollout": 2.5 + draw.random(),
        "time/experience": 1.2 + draw.random() / 5,
        "time/update": 4.0 + draw.random(),
    }


def sample_lines(step, done, draw, tokens=True):
    """Lines of samples.jsonl or evaluation_samples.jsonl."""
    found = []
    for i, opening in enumerate(OPENINGS):
        words = [draw.choice((g, p)) if draw.random() > done else g
                 for g, p in zip(GOOD.split(), POOR.split(), strict=False)]  # fmt: skip
        text = [f" {word}" for word in words] + ["\n"]
        score = 0.2 + 0.7 * done + draw.gauss(0, 0.08)
        line = {
            "step": step, "prompt": opening, "completion": "".join(text), "score": score,
            "rewards": {"kind": score + 0.1, "brief": None if i == 2 else -0.1},
            "columns": {"source": "reviews", "stars": i % 5},
        }  # fmt: skip
        if tokens and i < 4:
            line["tokens"] = {
                "text": text,
                "log_ratio": [draw.gauss(0.6 * done, 0.1 + 0.8 * done) for _ in text],
                "value": [score + draw.gauss(0, 0.15) for _ in text],
                "advantage": [draw.gauss(0, 1) for _ in text],
            }
        found.append(line)
    return found


def evaluation_line(step, steps, draw):
    """A line of evaluations.jsonl."""
    done = step / steps
    reward = 0.28 + 0.45 * (1 - math.exp(-3 * done)) + draw.gauss(0, 0.02)
    return {
        "step": step,
        "time": START + step * 8.5,
        "reward": reward,
        "standard_error": 0.03,
        "response_length": 24 - 6 * done,
        "finished_fraction": 0.2 + 0.7 * done,
        "reward/kind/mean": reward + 0.1,
        "reward/kind/std": 0.3,
        "reward/brief/mean": -0.1,
        "reward/brief/std": 0.05,
    }


def event_lines(steps):
    return [
        {
            "step": steps // 2, "time": START + steps * 4.2, "level": "WARNING",
            "source": "ppo_fast.runs.health",
            "text": "clip_fraction is 0.34 in the mean of 5 steps; the policy moves far in a step: "
                    "lower learning_rate, or num_epochs",
        },
        {
            "step": steps, "time": START + steps * 8.5, "level": "INFO",
            "source": "ppo_fast.runs.loop", "text": "all steps are done",
        },
    ]  # fmt: skip


def write_lines(path, lines):
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path.write_text(text, "utf-8", errors="backslashreplace")
    return path


def append(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(text)
