"""``ppo-fast train --dry-run``: check a run, and show its plan and its first batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from ppo_fast.data.examples import Example, Stream
from ppo_fast.runs.plain_text import plain

if TYPE_CHECKING:
    from ppo_fast.ppo import PPO
    from ppo_fast.runs.evaluation import Evaluation


def show_run(
    console: Console,
    ppo: PPO,
    prompts: list[Example] | Stream,
    batch_size: int,
    evaluation: Evaluation | None,
) -> None:
    """Print the memory plan of a run, and the prompts of its first step.

    Args:
        ppo: the trainer; no model runs.
        prompts: to train on; all are checked.
        batch_size: prompts a step.
        evaluation: of the prompts that are held out, which are checked too; None: there are none.
    """
    from ppo_fast.diagnostics.show_plans import show_plans
    from ppo_fast.runs.evaluation import Evaluator
    from ppo_fast.runs.progress import Progress

    Evaluator(ppo, evaluation)
    held_out = 0 if evaluation is None else len(evaluation.prompts)
    checked = ppo.check_prompts(prompts)
    first = Progress(ppo.config.seed).next_prompts(checked, batch_size)
    tokens = ppo.texts.encode(first, ppo.config.max_length)
    longest = max(len(prompt.ids) for prompt in tokens)
    show_plans(console, {"this run": ppo.memory_plan(len(first), longest)}, None)
    table = Table(title="first batch", show_lines=True)
    table.add_column("tokens", justify="right")
    table.add_column("prompt")
    for prompt in tokens:
        text = ppo.tokenizer.decode(prompt.ids) if prompt.text is None else prompt.text
        table.add_row(str(len(prompt.ids)), plain(text))
    console.print(table)
    count = "a stream of prompts" if isinstance(checked, Stream) else f"{len(checked)} prompts"
    rewards = ", ".join(ppo.scorer.rewards)
    console.print(
        plain(f"{count}, {held_out} held out; rewards: {rewards}. Nothing was trained or written."),
        soft_wrap=True,
    )
