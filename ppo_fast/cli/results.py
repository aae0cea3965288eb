"""Save the policy, the critic and their model cards when ``ppo-fast train`` ends."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from ppo_fast.data.examples import Example, Stream
from ppo_fast.disk.files import written
from ppo_fast.runs.plain_text import plain

# Written last, when all else of a run's results is whole.
DONE = "results.json"

if TYPE_CHECKING:
    from ppo_fast.cli.train import Train
    from ppo_fast.ppo import PPO


def save_results(
    console: Console,
    run: Train,
    ppo: PPO,
    prompts: list[Example] | Stream,
    held_out: int,
    last: int,
) -> None:
    """Save policy/, critic/ and report.html in the run's folder, and push the policy.

    Args:
        run: the command.
        ppo: the trainer, with the weights to save.
        prompts: what it was trained on.
        held_out: number of prompts that were held out.
        last: the last step; the weights may be those of an earlier one.
    """
    from ppo_fast.exports.export import export_policy, save_critic
    from ppo_fast.exports.hub import push_to_hub
    from ppo_fast.exports.model_card import ModelCard, card_of_run
    from ppo_fast.report.page import write_page
    from ppo_fast.report.read import read_runs

    data = {} if isinstance(prompts, Stream) else {Path(run.prompts).name: len(prompts)}
    if held_out:
        data["held out"] = held_out

    def card(kind: str) -> ModelCard:
        return card_of_run(
            run.output_dir,
            kind,  # type: ignore[arg-type]
            title=f"{Path(run.policy).name}, trained by PPO",
            base_model=run.policy,
            command=shlex.join(["ppo-fast", *sys.argv[1:]]) if sys.argv[1:2] == ["train"] else "",
            settings=run.settings(),
            data=data,
            step=ppo.progress.steps,
        )

    folder = run.output_dir / "policy"
    if ppo.critic.trained and run.save_critic != "none":
        whole = run.save_critic == "whole"
        save_critic(ppo, run.output_dir / "critic", whole=whole, card=card("critic"))
    policy, tokenizer = ppo.policy.model, ppo.tokenizer
    kind = export_policy(
        policy, tokenizer, folder, adapter_only=run.adapter_only, card=card("policy")
    )
    what = "trained policy" if kind == "policy" else "trained adapter"
    console.print(plain(f"{what}: {folder}"), soft_wrap=True)
    write_page(run.output_dir / "report.html", read_runs([run.output_dir]))
    console.print(plain(f"report: {run.output_dir / 'report.html'}"), soft_wrap=True)
    if run.push_to_hub is not None:
        url = push_to_hub(folder, run.push_to_hub)
        console.print(plain(f"pushed: {url}"), soft_wrap=True)
    with written(run.output_dir / DONE) as file:
        file.write(json.dumps({"step": last, "weights_of": ppo.progress.steps}).encode())


def results_are_saved(folder: Path, step: int, weights_of: int) -> bool:
    """Return whether all results of a run are whole in its folder.

    Without a sign that they are, as in folders of older versions, they are to be saved again.

    Args:
        folder: of the run.
        step: the last one.
        weights_of: the step whose weights are saved.
    """
    try:
        found = json.loads((folder / DONE).read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    return isinstance(found, dict) and found == {"step": step, "weights_of": weights_of}
