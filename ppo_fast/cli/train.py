"""``ppo-fast train``: PPO on a file of prompts."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console

from ppo_fast.checks import check_counts
from ppo_fast.config import PPOConfig
from ppo_fast.data.examples import Example, Stream, key_of
from ppo_fast.data.files import hold_out, hold_out_where, read_prompts
from ppo_fast.exports.hub import check_repo
from ppo_fast.models.pretrained import check_model, load_pretrained
from ppo_fast.rewards.load import function_of
from ppo_fast.runs.time_limit import seconds_of

if TYPE_CHECKING:
    import torch

    from ppo_fast.ppo import PPO
    from ppo_fast.runs.callbacks import Callback
    from ppo_fast.runs.evaluation import Evaluation


logger = logging.getLogger(__name__)


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
    """Prompts to evaluate on before, during and after, with none of them trained on: a share such
    as 0.1, column=value, or another file or data set; None: none."""
    eval_every: int | None = None
    """Steps between evaluations on held_out; None: only before and after."""
    eval_samples: int = 1
    """Responses to each prompt of an evaluation."""
    eval_greedy: bool = False
    """In evaluations, take the likeliest tokens instead of drawing them."""
    eval_reward: tuple[str, ...] = ()
    """Rewards that judge evaluations, each as in reward, with weights of 1; none: reward."""
    best: str = "reward"
    """Metric of the evaluations by which the best is found."""
    best_is_lowest: bool = False
    """The best evaluation is the one with the smallest number."""
    patience: int | None = None
    """Evaluations in a row that are no new best, after which the run ends; None: it goes on."""
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
    """Folder for metrics.jsonl, samples.jsonl, evaluations.jsonl, events.jsonl, config.yaml,
    checkpoints/ and, at the end, policy/ and critic/. A file control.yaml in it changes a running
    run (docs/watching.md)."""
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
    keep_best: int = 1
    """Number of checkpoints that are kept besides them: those of the best evaluations."""
    export_from: Literal["last", "best"] = "last"
    """Content of policy/ and critic/: the weights after the last step, or those of the best
    evaluation."""
    report_to: tuple[str, ...] = ()
    """Trackers that get metrics and samples: tensorboard, wandb, trackio, mlflow, and others that
    accelerate has."""
    metric_names: Literal["ppo_fast", "trl"] = "ppo_fast"
    """Names of the metrics that trackers get: ours, or TRL's where it has one (docs/metrics.md)."""
    project: str = "ppo_fast"
    """Name of the project in trackers."""
    run_name: str | None = None
    """Name of the run in trackers; None: that of output_dir."""
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

        from ppo_fast.cli.train_run import TrainRun
        from ppo_fast.models.quantized import check_quantization

        device = self._device()
        if self.quantization is not None:
            check_quantization(self.quantization, device)
        trackers = self._trackers()
        reward = self._rewards(self.reward, device)
        evaluation = self._evaluation(held_out, device)
        if self.dry_run:
            from ppo_fast.cli.dry_run import show_run

            ppo = self.make_ppo(reward, device)
            show_run(console, ppo, prompts, self.batch_size, evaluation)
            return
        TrainRun(
            self,
            console,
            prompts=prompts,
            evaluation=evaluation,
            trackers=trackers,
            make_ppo=lambda: self.make_ppo(reward, device),
            ends=ends,
        ).run()

    def _rewards(self, names: tuple[str, ...], device: torch.device) -> Any:
        from ppo_fast.rewards.load import load_rewards

        return load_rewards(
            names,
            self.reward_device or device,
            self.reward_label,
            format=self.reward_format,
            cut_completions=self.reward_cut_completions,
            dtype=self.reward_dtype,
        )

    def _trackers(self) -> list[Callback]:
        """Return the trackers, whose packages are checked before a model is loaded."""
        if not self.report_to:
            return []
        from ppo_fast.trackers.report_to import Trackers

        return [
            Trackers(
                self.report_to,
                project=self.project,
                run_name=self.run_name,
                folder=self.output_dir,
                metric_names=self.metric_names,
            )
        ]

    def _evaluation(self, held_out: list[Example], device: torch.device) -> Evaluation | None:
        if not held_out:
            return None
        from ppo_fast.runs.evaluation import Evaluation

        with _as_eval_reward():
            judges = self._rewards(self.eval_reward, device) if self.eval_reward else None
        return Evaluation(
            held_out,
            every=self.eval_every,
            samples_per_prompt=self.eval_samples,
            greedy=self.eval_greedy,
            reward=judges,
            best=self.best,
            lower_is_better=self.best_is_lowest,
            keep_best=max(self.keep_best, int(self.export_from == "best")),
            patience=self.patience,
        )

    def settings(self) -> dict[str, Any]:
        """Return every setting of the run by its name."""
        return self.own_settings() | asdict(self.ppo)

    def own_settings(self) -> dict[str, Any]:
        """Return the settings that are not PPOConfig's; those of a --config file are among them."""
        names = [f.name for f in fields(self) if f.name not in ("ppo", "config")]
        return {name: getattr(self, name) for name in names}

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
        self._check_evaluation()
        with _as_eval_reward():
            for reward in self.eval_reward:
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

    def _check_evaluation(self) -> None:
        """Check the flags of evaluations, under their own names."""
        defaults = {item.name: item.default for item in fields(self)}
        of_evaluations = (
            *("eval_every", "eval_samples", "eval_greedy", "eval_reward", "patience"),
            *("best", "best_is_lowest", "keep_best", "export_from"),
        )
        given = [name for name in of_evaluations if getattr(self, name) != defaults[name]]
        if given and self.held_out is None:
            flag = f"--{given[0].replace('_', '-')}"
            raise ValueError(f"{flag}: needs prompts to evaluate on; add --held-out 0.1")
        check_counts(
            eval_every=1 if self.eval_every is None else self.eval_every,
            eval_samples=self.eval_samples,
            patience=1 if self.patience is None else self.patience,
        )
        if self.keep_best < 0:
            raise ValueError(
                f"keep_best: got {self.keep_best}, expected a whole number of 0 or more"
            )
        if self.eval_greedy and self.eval_samples > 1:
            raise ValueError(
                f"eval_samples: got {self.eval_samples} with --eval-greedy, expected 1: they would "
                "be the same"
            )
        if self.patience is not None and self.eval_every is None:
            raise ValueError("patience: needs the steps between evaluations; add --eval-every 20")

    def _device(self) -> torch.device:
        from torch import nn

        from ppo_fast.models.checks import resolve_device

        return resolve_device(self.device, nn.Module())

    def make_ppo(self, reward: Any, device: torch.device) -> PPO:
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


@contextmanager
def _as_eval_reward() -> Iterator[None]:
    """Let an error of the block that names --reward name --eval-reward."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        named = re.sub(r"^(--)?reward\b", "--eval-reward", str(error))
        raise ValueError(named) from error


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
