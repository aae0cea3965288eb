"""The demo: a real pretrained model learns to continue reviews kindly, on any machine."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from ppo_fast.checks import check_counts
from ppo_fast.config import PPOConfig
from ppo_fast.data.batches import in_batches
from ppo_fast.data.evaluated import Evaluated
from ppo_fast.data.rollout import Rollout
from ppo_fast.data.scores import Scores
from ppo_fast.data.step import Step
from ppo_fast.data.tokens import Tokens
from ppo_fast.data.trunk_states import TrunkStates
from ppo_fast.demo.smollm2 import load_smollm2
from ppo_fast.demo.task import distinct_2, load_prompts, plot_curves, positivity
from ppo_fast.exports.export import export_policy
from ppo_fast.ppo import PPO
from ppo_fast.report.page import write_page
from ppo_fast.report.read import read_runs
from ppo_fast.run_folder.folder import RunFolder
from ppo_fast.run_folder.run_writer import RunWriter
from ppo_fast.runs.display import StepDisplay
from ppo_fast.runs.performance import peak_memory_gb
from ppo_fast.runs.plain_text import plain

NUM_STEPS, BATCH_SIZE = 22, 32
SAMPLES_PER_PROMPT = 4  # of each of the 32 held-out prompts, before and after
EVALUATION_SEED = 1 << 40  # far from the training draws of every seed but 256


def demo_config(seed: int) -> PPOConfig:
    """Return the demo's settings: 4 top layers trained on a frozen trunk, with a value head."""
    return PPOConfig(
        learning_rate=2e-4,
        value_learning_rate=1e-3,
        kl_penalty=0.02,
        num_epochs=2,
        num_minibatches=2,
        critic="head",
        num_layers_unfrozen=4,
        max_length=24,
        seed=seed,
    )


@dataclass(frozen=True)
class Evaluation:
    """Results of the policy on the held-out prompts, always sampled with the same seeds.

    kl: KL to the starting policy, in nats per sequence.
    ref_logprob: log-prob of the samples under the starting policy, per token.
    """

    rollout: Rollout
    scores: list[float]
    reward: float
    standard_error: float
    kl: float
    ref_logprob: float
    distinct_2: float

    def summary(self) -> dict[str, float]:
        """Return the plain numbers."""
        names = ("reward", "standard_error", "kl", "ref_logprob", "distinct_2")
        return {name: getattr(self, name) for name in names}

    def evaluated(self, step: int) -> Evaluated:
        """Return it as a run's folder takes it."""
        scores = Scores(torch.tensor(self.scores, device="cpu"))
        return Evaluated(step, self.summary(), self.rollout, scores)


def evaluate(ppo: PPO, prompts: list[str]) -> Evaluation:
    """Sample every prompt ``SAMPLES_PER_PROMPT`` times and score the samples."""
    prompts = prompts * SAMPLES_PER_PROMPT
    seeds = EVALUATION_SEED + torch.arange(len(prompts), device="cpu")
    rollout = ppo.rollout(prompts, seeds=seeds)
    tokens, temperature = rollout.tokens, rollout.sampling.temperature
    reference = ppo.reference

    def logprobs(part: Tokens, _: TrunkStates | None) -> torch.Tensor:
        forward = reference.forward(part)
        return reference.logprobs(forward, part, temperature=temperature).logprobs

    with torch.no_grad():
        ref = in_batches(
            logprobs,
            tokens,
            None,
            ppo.config.forward_batch_tokens,
            packed=reference.packed,
        )
    assert rollout.logprobs is not None
    scores = torch.tensor(positivity(rollout.prompts, rollout.completions))
    return Evaluation(
        rollout,
        scores.tolist(),
        float(scores.mean()),
        float(scores.std() / len(scores) ** 0.5),
        float((rollout.logprobs - ref).sum() / len(prompts)),
        float(ref.sum() / tokens.response_lengths.sum()),
        distinct_2(rollout.completions),
    )


def run_demo(
    console: Console, output_dir: Path, *, num_steps: int | None = None, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Train, show what changed, and write everything to ``output_dir``.

    Returns:
        The evaluations' numbers, as ``{"before": ..., "after": ...}``.
    """
    num_steps = NUM_STEPS if num_steps is None else num_steps
    check_counts(num_steps=num_steps)
    with RunFolder(output_dir) as folder:
        return _run(console, folder, num_steps, seed)


def _run(
    console: Console, folder: RunFolder, num_steps: int, seed: int
) -> dict[str, dict[str, float]]:
    started, output_dir = time.perf_counter(), folder.folder
    disable_progress_bar()  # transformers' own, one for every load and save
    train_prompts, held_out = load_prompts()
    console.print("Loading SmolLM2-135M-Instruct (the first time, converting it: a minute) ...")
    model, tokenizer = load_smollm2()
    config = demo_config(seed)
    ppo = PPO(model, tokenizer, positivity, device="cpu", config=config)
    folder.write_config(config, num_steps=num_steps, batch_size=BATCH_SIZE)
    folder.forget_after(0)  # the lines of an earlier demo
    count = len(held_out) * SAMPLES_PER_PROMPT
    console.print(f"Sampling {count} continuations of {len(held_out)} held-out openings ...")
    before = evaluate(ppo, held_out)
    folder.write_evaluation(before.evaluated(0))
    console.print(f"before: {describe(before)}", soft_wrap=True)
    rewards: list[float] = []
    kls: list[float] = []
    with StepDisplay(console, num_steps) as display:

        def on_step(step: Step) -> None:
            rewards.append(step.metrics["mean_reward"])
            kls.append(step.metrics["kl_sequence"])

        ppo.train(
            train_prompts,
            num_steps=num_steps,
            batch_size=BATCH_SIZE,
            progress=False,
            on_step=on_step,
            callbacks=[RunWriter(folder, display, tokenizer)],
        )
    # before all that may fail
    export_policy(ppo.policy.model, tokenizer, output_dir / "policy")
    console.print(f"Sampling {count} continuations again, with the same seeds ...")
    after = evaluate(ppo, held_out)
    folder.write_evaluation(after.evaluated(num_steps))
    numbers = {"before": before.summary(), "after": after.summary()}
    (output_dir / "evaluation.json").write_text(json.dumps(numbers, indent=2), "utf-8")
    write_page(output_dir / "report.html", read_runs([output_dir]))
    plot_curves(output_dir / "learning.png", range(1, len(rewards) + 1), rewards, kls)
    minutes, peak = (time.perf_counter() - started) / 60, peak_memory_gb(ppo.device)
    console.print(samples_table(before, after))
    console.print(f"before: {describe(before)}\nafter:  {describe(after)}", soft_wrap=True)
    memory = "" if peak is None else f" and {peak:.1f} GB"
    summary = (
        f"mean reward {before.reward:+.2f} -> {after.reward:+.2f} in {minutes:.1f} minutes"
        f"{memory}; everything is in {output_dir}: report.html, learning.png, metrics.jsonl, "
        "samples.jsonl, policy/ (loads with AutoModelForCausalLM.from_pretrained)"
    )
    console.print(plain(summary), soft_wrap=True)
    return numbers


def describe(evaluation: Evaluation) -> str:
    """Describe an evaluation in one line."""
    e = evaluation
    return (
        f"reward {e.reward:+.3f} ± {e.standard_error:.3f} (standard error, {len(e.scores)} "
        f"samples)  KL {e.kl:.2f}/seq  start's log-prob {e.ref_logprob:.2f}/token  "
        f"distinct-2 {e.distinct_2:.3f}"
    )


def samples_table(before: Evaluation, after: Evaluation, rows: int = 8) -> Table:
    """Make a table of the first held-out prompts, with the first sample of each, before and after.

    The samples are not selected.
    """
    table = Table(title="Held-out openings, first sample of each", show_lines=True)
    for name in ("prompt", "before", "score", "after", "score"):
        table.add_column(name, justify="right" if name == "score" else "left")
    for i in range(rows):
        table.add_row(
            plain(before.rollout.prompts[i]),
            plain(before.rollout.completions[i].strip()),
            f"{before.scores[i]:+.2f}",
            plain(after.rollout.completions[i].strip()),
            f"{after.scores[i]:+.2f}",
        )
    return table
