"""``ppo-fast train``: PPO on a file of prompts."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from signal import Signals
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from rich.console import Console

from ppo_fast.checks import check_counts
from ppo_fast.config import PPOConfig
from ppo_fast.data.examples import Example, Stream, key_of
from ppo_fast.data.files import hold_out, hold_out_where, read_prompts
from ppo_fast.models.pretrained import check_model, load_pretrained
from ppo_fast.rewards.load import function_of
from ppo_fast.runs.hub import check_repo
from ppo_fast.runs.plain_text import plain
from ppo_fast.runs.time_limit import seconds_of

if TYPE_CHECKING:
    import torch

    from ppo_fast.ppo import PPO
    from ppo_fast.runs.folder import RunFolder


logger = logging.getLogger(__name__)

# The status of a process that did not finish and can be run again (EX_TEMPFAIL of sysexits.h).
TIME_IS_UP = 75


@dataclass(frozen=True)
class Train:
    """Train a policy on prompts. Every field of PPOConfig is a flag.

    ``cli/groups.py`` has the groups that the help shows the flags in.
    """

    policy: str = ""
    """The policy: a model directory or a hub name. Required."""
    prompts: str = ""
    """Prompts: a .txt (one per line), .jsonl, .csv or .parquet file, a folder with a data set, or a
    data set's name on the hub. Other columns than the prompt's reach the rewards. Required."""
    prompt_column: str | None = None
    """Column with the prompts, texts or chats; None: "prompt", or else "messages"."""
    prompts_split: str = "train"
    """Split of a data set."""
    stream: bool = False
    """Read a data set of the hub while training, in its own order."""
    held_out: str | None = None
    """Prompts to evaluate on before and after, with none of them trained on: a share such as 0.1,
    column=value, or another file or data set; None: none."""
    reward: tuple[str, ...] = ()
    """One or several, each module:function or file.py:function, f(prompts, completions, **columns)
    -> list[float], or the directory or hub name of a sequence classifier. Required. Weights:
    reward_weights."""
    reward_label: str | None = None
    """Name or index of the classifier's label whose log-odds are the score; None: the classifier
    has one label, whose logit is the score."""
    reward_format: Literal["joined", "pair", "chat"] | None = None
    """How a classifier reads prompt and completion: joined in one text, as a pair, or as a chat by
    its own chat template; None: as its config says, else joined."""
    reward_cut_completions: bool = False
    """Cut completions that are longer than a classifier takes, instead of ending with an error."""
    reward_dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    """Dtype of a classifier's weights; auto: as they are saved."""
    reward_device: str | None = None
    """Device of reward models; None: device."""
    value_model: str | None = None
    """A causal LM whose body becomes the value model; None: see critic."""
    lora_rank: int | None = None
    """Train LoRA adapters of this rank on all layers, or on those of num_layers_unfrozen, with
    alpha twice the rank; None: train the weights themselves."""
    quantization: Literal["4bit", "8bit"] | None = None
    """Load the policy's frozen weights in 4 or 8 bits, under the adapters of lora_rank; None: as
    they are."""
    output_dir: Path = Path("runs/train")
    """Folder for metrics.jsonl, samples.jsonl, config.yaml, checkpoints/ and, at the end, policy/
    and critic/."""
    adapter_only: bool = False
    """Save the policy's adapter alone, without the base model. That of a quantised model is always
    saved so."""
    save_critic: Literal["weights", "whole", "none"] = "weights"
    """Content of critic/: "weights", those that were trained; "whole", a token classifier of
    transformers with a copy of the backbone; "none", no folder."""
    push_to_hub: str | None = None
    """Name on the hub, owner/model, that policy/ is pushed to at the end; None: it is not."""
    num_steps: int = 100
    """Steps of the whole run, including those before a resume."""
    batch_size: int = 16
    """Prompts per step."""
    checkpoint_freq: int = 10
    """Steps between checkpoints."""
    keep_last: int | None = None
    """Number of checkpoints that are kept, the newest; None: all."""
    max_time: str | None = None
    """Time of this process, as seconds, MM:SS or HH:MM:SS: it ends with status 75, to be resumed,
    before a step that would end later; None: there is no limit."""
    resume: bool = False
    """Continue from the newest checkpoint in output_dir that is whole; where all steps are done, do
    what is left after them."""
    device: str = "auto"
    """Device to train on; auto: cuda if there is a GPU, else cpu."""
    dry_run: bool = False
    """Check everything, print the memory plan and the prompts of the first step, and train and
    write nothing."""
    config: Path | None = None
    """A YAML file of any of these flags (names with underscores); a flag overrides the file."""
    ppo: PPOConfig = field(default_factory=PPOConfig)

    def run(self, console: Console) -> None:
        """Run the command."""
        self._check()
        ends = None if self.max_time is None else time.monotonic() + seconds_of(self.max_time)
        prompts, held_out = self._prompts()

        from ppo_fast.models.quantized import check_quantization
        from ppo_fast.rewards.load import load_rewards
        from ppo_fast.runs.folder import RunFolder

        device = self._device()
        if self.quantization is not None:
            check_quantization(self.quantization, device)
        reward = load_rewards(
            self.reward,
            self.reward_device or device,
            self.reward_label,
            format=self.reward_format,
            cut_completions=self.reward_cut_completions,
            dtype=self.reward_dtype,
        )
        if self.dry_run:
            from ppo_fast.cli.dry_run import show_run

            ppo = self._make_ppo(reward, device)
            show_run(console, ppo, prompts, self.batch_size, len(held_out))
            return
        with RunFolder(self.output_dir) as folder:
            self._train(console, folder, prompts, held_out, reward, device, ends)

    def _train(
        self,
        console: Console,
        folder: RunFolder,
        prompts: list[Example] | Stream,
        held_out: list[Example],
        reward: Any,
        device: torch.device,
        ends: float | None,
    ) -> None:
        from ppo_fast.cli.results import save_results
        from ppo_fast.runs.checkpoint import checkpoint_path
        from ppo_fast.runs.display import StepDisplay
        from ppo_fast.runs.kept import checkpoints_in, load_newest, remove_old
        from ppo_fast.runs.trackers import step_logger

        checkpoints = self.output_dir / "checkpoints"
        found = [path.name for path in checkpoints_in(checkpoints).values()]
        if found and not self.resume:
            raise ValueError(
                f"--output-dir: {self.output_dir} holds a run ({found[0]}); continue it with "
                "--resume, or name another folder"
            )
        ppo = self._make_ppo(reward, device)
        if (newest := load_newest(checkpoints, ppo.load_checkpoint)) is not None:
            console.print(plain(f"resumed {newest} after step {ppo.progress.steps}"))
        if self.save_critic == "whole":
            self._check_whole_critic(ppo)
        done = ppo.progress.steps
        if self.num_steps < done:
            raise ValueError(
                f"--num-steps: got {self.num_steps}, expected at least the {done} done"
            )
        evaluations = folder.read_json("evaluation.json") if done else {}
        evaluated = "after" in evaluations or not held_out
        if self.num_steps == done and evaluated and (self.output_dir / "policy").exists():
            console.print(f"nothing is left to do: all {done} steps are done", highlight=False)
            return
        folder.write_config(ppo.config, **self._own_settings())
        folder.forget_after(done)
        if held_out and "before" not in evaluations:
            evaluations["before"] = self._evaluate(console, ppo, held_out, "before")
            folder.write_json("evaluation.json", evaluations)
        if self.num_steps > done:
            with StepDisplay(console, self.num_steps - done) as display:
                result = ppo.train(
                    prompts,
                    self.num_steps - done,
                    self.batch_size,
                    checkpoint_dir=checkpoints,
                    checkpoint_freq=self.checkpoint_freq,
                    keep_last=self.keep_last,
                    max_time=None if ends is None else max(ends - time.monotonic(), 1e-3),
                    progress=False,
                    on_step=step_logger(folder, display),
                )
            if result["stopped_by"] is not None and ppo.progress.steps < self.num_steps:
                self._end_early(console, ppo, result["stopped_by"])
            if ppo.newest_checkpoint != checkpoint_path(checkpoints, self.num_steps).resolve():
                ppo.save_checkpoint(checkpoints, ppo.progress.steps)
                remove_old(checkpoints, ppo.progress.steps, self.keep_last)
        if held_out:
            evaluations["after"] = self._evaluate(console, ppo, held_out, "after")
            folder.write_json("evaluation.json", evaluations)
        save_results(console, self, ppo, prompts, len(held_out))

    def _check_whole_critic(self, ppo: PPO) -> None:
        """Check, before anything is trained, that transformers has a class for the critic."""
        from ppo_fast.runs.export import check_token_classifier

        flag = "--save-critic: whole is not possible"
        if not ppo.critic.trained:
            raise ValueError(f"{flag}: the critic has no weights; leave the flag out")
        try:
            check_token_classifier(ppo)
        except ValueError as error:
            reason = str(error).removeprefix("critic: ").removesuffix("; use whole=False")
            raise ValueError(f"{flag}: {reason}; use --save-critic weights") from error

    def _end_early(self, console: Console, ppo: PPO, stopped_by: str) -> NoReturn:
        """End the process after a signal or at the time limit, before the last step."""
        left = self.num_steps - ppo.progress.steps
        console.print(
            f"{left} of {self.num_steps} steps are left: --resume goes on", soft_wrap=True
        )
        raise SystemExit(TIME_IS_UP if stopped_by == "max_time" else 128 + Signals[stopped_by])

    def settings(self) -> dict[str, Any]:
        """Return every setting of the run by its name."""
        return self._own_settings() | asdict(self.ppo)

    def _own_settings(self) -> dict[str, Any]:
        """Return the settings that are not PPOConfig's; those of a --config file are among them."""
        names = [f.name for f in fields(self) if f.name not in ("ppo", "config")]
        return {name: getattr(self, name) for name in names}

    def _evaluate(
        self, console: Console, ppo: PPO, held_out: list[Example], when: str
    ) -> dict[str, float]:
        """Evaluate on the held-out prompts, and print the result."""
        from ppo_fast.runs.evaluation import evaluate

        found = evaluate(ppo, held_out)
        line = f"{when}: reward {found['reward']:+.3f} ± {found['standard_error']:.3f}"
        console.print(f"{line}, held-out prompts: {len(held_out)}", highlight=False)
        return found

    def _prompts(self) -> tuple[list[Example] | Stream, list[Example]]:
        """Read the prompts to train on and those held out."""
        options: dict[str, Any] = {"column": self.prompt_column, "split": self.prompts_split}
        found = read_prompts(self.prompts, what="--prompts", stream=self.stream, **options)
        if self.held_out is None:
            return found, []
        column, equals, value = self.held_out.partition("=")
        share = _share(self.held_out)
        if not self.held_out or Path(self.held_out).exists() or (share is None and not equals):
            held_out = read_prompts(self.held_out, what="--held-out", **options)
            assert not isinstance(held_out, Stream)
            _warn_of_overlap(found, held_out)
            return found, held_out
        if isinstance(found, Stream):
            raise ValueError(
                f"--held-out: got {self.held_out!r} with --stream; name another file or data set"
            )
        return hold_out_where(found, column, value) if equals else hold_out(found, share or 0.0)

    def _check(self) -> None:
        for name in ("policy", "prompts", "reward"):
            if not getattr(self, name):
                raise ValueError(f"--{name}: is required")
        check_model("policy", self.policy)
        if self.value_model is not None:
            check_model("value-model", self.value_model)
        for reward in self.reward:
            if function_of(reward) is None:
                check_model("reward", reward)
        check_counts(lora_rank=1 if self.lora_rank is None else self.lora_rank)
        for name in ("quantization", "adapter_only"):
            if getattr(self, name) and self.lora_rank is None:
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(f"{flag}: needs adapters to train; add --lora-rank 16")
        check_counts(
            num_steps=self.num_steps, keep_last=1 if self.keep_last is None else self.keep_last
        )
        if self.max_time is not None:
            seconds_of(self.max_time)
        if self.push_to_hub is not None:
            check_repo(self.push_to_hub)

    def _device(self) -> torch.device:
        from torch import nn

        from ppo_fast.models.checks import resolve_device

        return resolve_device(self.device, nn.Module())

    def _make_ppo(self, reward: Any, device: torch.device) -> PPO:
        """Make PPO, with models from their folders or the hub."""
        import torch
        from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, set_seed

        from ppo_fast.models.heads import ValueModel
        from ppo_fast.models.lora import with_lora
        from ppo_fast.models.quantized import load_quantized
        from ppo_fast.ppo import PPO

        set_seed(self.ppo.seed)  # new adapters and value heads are drawn from it
        tokenizer = load_pretrained("policy", AutoTokenizer, self.policy)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if self.quantization is not None:
            policy = load_quantized(
                self.policy, self.quantization, device, compute_dtype=self.ppo.torch_dtype
            )
        else:
            dtype = torch.float32 if self.ppo.compute_dtype is None else "auto"
            policy = load_pretrained("policy", AutoModelForCausalLM, self.policy, dtype=dtype)
        if self.lora_rank is not None:
            policy = with_lora(policy, self.lora_rank, self.ppo.num_layers_unfrozen)
        value_model = None
        if self.value_model is not None:
            # AutoModel: without the LM head
            base = load_pretrained("value-model", AutoModel, self.value_model, dtype=torch.float32)
            value_model = ValueModel(base, base.config.get_text_config().hidden_size)
        return PPO(
            policy,
            tokenizer,
            reward,
            value_model=value_model,
            device=device,
            reward_device=self.reward_device,
            config=self.ppo,
        )


def _warn_of_overlap(prompts: list[Example] | Stream, held_out: list[Example]) -> None:
    """Warn where prompts that are held out are among those to train on."""
    if isinstance(prompts, Stream):
        return
    trained = {key_of(example.prompt) for example in prompts}
    count = sum(key_of(example.prompt) in trained for example in held_out)
    if count:
        logger.warning("--held-out: %d of %d prompts are trained on too", count, len(held_out))


def _share(held_out: str) -> float | None:
    """Return a share as a number; None for anything else."""
    try:
        return float(held_out)
    except ValueError:
        return None
