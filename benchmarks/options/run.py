"""Run every variant on both tasks with several seeds, and write docs/options.md.

``python -m options.run`` runs all; with names of tasks, those, which prints the tables alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from options.tasks import TASKS, Task, started_model
from options.variants import COMMON, Variant, variants
from torch import Tensor

from ppo_fast import PPO, PPOConfig, ValueModel
from ppo_fast.data.batches import in_batches
from ppo_fast.data.tokens import Tokens
from ppo_fast.learning.make_experience import with_trunk
from ppo_fast.ops import _C

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "options.md"
SEEDS = range(5)
AT_A_TIME = 2
EVALUATED = 512  # held-out prompts
MAX_TOKENS = 32768  # of a pass


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        task, name, seed = sys.argv[2].split("/")
        print(json.dumps(one(TASKS[task], variant_of(name), int(seed))))
        return
    names = sys.argv[1:] or list(TASKS)
    for name in names:
        started_model(TASKS[name])  # before processes would compute it twice
    start = time.perf_counter()
    tables = [table(TASKS[name]) for name in names]
    minutes = (time.perf_counter() - start) / 60
    print("\n\n".join(tables), f"\n{minutes:.0f} minutes")
    if len(sys.argv) == 1:
        PAGE.write_text(introduction() + "\n\n".join(tables) + "\n")
        print(f"wrote {PAGE.relative_to(ROOT)}")


def introduction() -> str:
    """Return what stands before the tables."""
    settings = ", ".join(f"`{name}={value}`" for name, value in COMMON.items())
    seeds, kernels = len(SEEDS), _C.instruction_set()
    return f"""# Options compared on two small tasks

Written by `make options`, on two cores ({machine()}; our kernels use {kernels}), float32, torch
{torch.__version__.split("+")[0]}. Each variant is trained with {seeds} seeds, from one model (3
layers of width 128) that has had a short supervised start. All have
{settings},
unless they say otherwise: `benchmarks/options/variants.py` has each variant's settings.

- **sums**: sums of two numbers of two digits; the reward is 1 where the answer is right
- **sentences**: continue three words of an artificial language. Each word has a valence in [-1, 1],
  and the reward is a quarter of their sum; rewards for tokens give each word its part

The columns: mean reward of held-out prompts after training, with the standard deviation over the
seeds; the worst seed's; KL of a sequence to the start; the explained variance of the last 10 steps,
where there is a value function. With 8 samples, a step has as many responses as without, to an
eighth of the prompts.

"""


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown"


def variant_of(name: str) -> Variant:
    return next(variant for variant in variants() if variant.name == name)


def one(task: Task, variant: Variant, seed: int) -> dict[str, float]:
    """Train once, and return the evaluation before and after."""
    settings = COMMON | {"max_length": task.max_length, "seed": seed} | variant.settings
    config, policy = PPOConfig(**settings), started_model(task)
    torch.manual_seed(seed)
    value_model = None
    if config.critic == "model":
        value_model = ValueModel(started_model(task), policy.config.hidden_size)
    reward: Any = task.token_reward if variant.token_rewards else task.reward
    ppo = PPO(policy, task.tokenizer, reward, value_model=value_model, config=config)
    before = evaluate(ppo, task)
    # as many responses a step, whatever the number of samples a prompt
    batch_size = task.batch_size // config.samples_per_prompt
    found: list[float] = []
    ppo.train(
        task.prompts(5000, seed=1),
        task.steps,
        batch_size,
        progress=False,
        on_step=lambda step: found.append(step.metrics.get("explained_variance", 0.0)),
    )
    after = evaluate(ppo, task)
    return {
        "before": before["reward"],
        "reward": after["reward"],
        "kl": after["kl"],
        "explained": mean(found[-10:]),
    }


@torch.no_grad()
def evaluate(ppo: PPO, task: Task) -> dict[str, float]:
    rollout = ppo.rollout(task.prompts(EVALUATED, seed=2), samples_per_prompt=1)
    scores = task.reward(rollout.prompts, rollout.completions)
    rollout = with_trunk(rollout, ppo.policy, MAX_TOKENS)

    def of_reference(part: Tokens, states: Tensor | None) -> Tensor:
        forward = ppo.reference.forward(part, states)
        return ppo.reference.logprobs(forward, part, temperature=1.0).logprobs

    reference = in_batches(of_reference, rollout.tokens, rollout.trunk_states, MAX_TOKENS)
    assert rollout.logprobs is not None
    kl = float((rollout.logprobs - reference).sum()) / len(scores)
    return {"reward": mean(scores), "kl": kl}


def table(task: Task) -> str:
    chosen = [v for v in variants() if task.token_reward is not None or not v.token_rewards]
    jobs = [(variant, seed) for variant in chosen for seed in SEEDS]
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        results = list(pool.map(lambda job: in_process(task, *job), jobs))
    before = mean(result["before"] for result in results)
    lines = [
        f"## {task.name}",
        "",
        f"Mean reward of {EVALUATED} held-out prompts before training: {before:.2f}. "
        f"{task.steps} steps of {task.batch_size} responses of up to {task.max_length} tokens.",
        "",
        "| variant | reward (sd of seeds) | worst seed | KL, nats | explained variance |",
        "|---|---|---|---|---|",
    ]
    for i, variant in enumerate(chosen):
        rows = results[i * len(SEEDS) : (i + 1) * len(SEEDS)]
        column = {name: [row[name] for row in rows] for name in rows[0]}
        explained = "" if not any(column["explained"]) else f"{mean(column['explained']):.2f}"
        lines.append(
            f"| {variant.name} | {mean(column['reward']):.2f} ({stdev(column['reward']):.2f}) | "
            f"{min(column['reward']):.2f} | {mean(column['kl']):.1f} | {explained} |"
        )
    return "\n".join(lines)


def in_process(task: Task, variant: Variant, seed: int) -> dict[str, float]:
    """Train once in a process of its own, on one thread."""
    job = f"{task.name}/{variant.name}/{seed}"
    command = [sys.executable, "-m", "options.run", "--one", job]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, cwd=ROOT
    )
    if done.returncode:
        raise RuntimeError(f"{job} failed:\n{done.stderr[-2000:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    print(
        f"{job}: {result['before']:.2f} -> {result['reward']:.2f}, KL {result['kl']:.1f}",
        flush=True,
    )
    return result


if __name__ == "__main__":
    main()
