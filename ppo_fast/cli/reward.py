"""``ppo-fast reward``: train a reward model on preference pairs."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro
from rich.console import Console

from ppo_fast.models.pretrained import check_model, load_pretrained
from ppo_fast.rewards.fit.settings import RewardModelConfig
from ppo_fast.runs.plain_text import plain

if TYPE_CHECKING:
    from ppo_fast.exports.model_card import ModelCard
    from ppo_fast.rewards.fit.train import RewardModelResult
    from ppo_fast.run_folder.folder import RunFolder

SHOWN = ("loss", "accuracy", "margin", "calibration")


@dataclass(frozen=True)
class Reward:
    """Train a reward model on preference pairs. Every field of RewardModelConfig is a flag."""

    model: str = ""
    """A sequence classifier with one label, or a language model, which gets a new head: a model
    directory or a hub name. Required."""
    pairs: str = ""
    """Rows with prompt, chosen and rejected, texts or chats: a .jsonl, .csv or .parquet file, or
    the name of a data set on the hub. Required."""
    split: str = "train"
    """Split of a data set on the hub."""
    held_out: float | Path | None = 0.1
    """Share of the pairs that is evaluated and not trained on, or a file of pairs for it."""
    output_dir: Path = Path("runs/reward")
    """Folder for metrics.jsonl and the trained model/, which ``train --reward`` takes."""
    device: str = "auto"
    """Device to train on; auto: cuda if there is a GPU, else cpu."""
    settings: tyro.conf.OmitArgPrefixes[RewardModelConfig] = field(
        default_factory=RewardModelConfig
    )

    def run(self, console: Console) -> None:
        """Run the command."""
        for name in ("model", "pairs"):
            if not getattr(self, name):
                raise ValueError(f"--{name}: is required")
        check_model("model", self.model)
        if (self.output_dir / "model").exists():
            raise ValueError(
                f"--output-dir: {self.output_dir} holds a trained model; name another folder"
            )
        rows, held_out = self._rows()

        from ppo_fast.run_folder.folder import RunFolder

        with RunFolder(self.output_dir) as folder:
            folder.forget_after(0)  # of a run that did not end
            self._train(console, folder, rows, held_out)

    def _rows(self) -> tuple[list[dict[str, Any]], Any]:
        from ppo_fast.data.files import read_rows

        rows = read_rows(self.pairs, self.split, what="--pairs")
        if isinstance(self.held_out, Path):
            return rows, read_rows(str(self.held_out), self.split, what="--held-out")
        return rows, self.held_out

    def _train(
        self, console: Console, folder: RunFolder, rows: list[dict[str, Any]], held_out: Any
    ) -> None:
        from transformers import AutoTokenizer

        from ppo_fast.exports.export import export_policy
        from ppo_fast.rewards.fit.train import train_reward_model

        tokenizer = load_pretrained("model", AutoTokenizer, self.model)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token

        def on_step(metrics: dict[str, float]) -> None:
            folder.write_metrics(int(metrics["step"]), metrics)
            shown = {name: metrics.get(f"held_out/{name}") for name in SHOWN}
            if shown["loss"] is not None:
                numbers = "  ".join(f"{name} {value:.4f}" for name, value in shown.items())
                line = f"step {metrics['step']:g}  held out: {numbers}"
                console.print(plain(line), soft_wrap=True)

        result = train_reward_model(
            self._load(),
            tokenizer,
            rows,
            config=self.settings,
            held_out=held_out,
            device=self.device,
            on_step=on_step,
        )
        export_policy(result.model, tokenizer, self.output_dir / "model")
        self._card(result, len(rows)).write(self.output_dir / "model")
        console.print(plain(f"reward model: {self.output_dir / 'model'}"), soft_wrap=True)

    def _card(self, result: RewardModelResult, count: int) -> ModelCard:
        from ppo_fast.exports.model_card import ModelCard

        held_out = "held_out/accuracy"
        name = held_out if result.evaluation else "accuracy"
        points = [(int(m["step"]), m[name]) for m in result.history if name in m]
        arguments = ["ppo-fast", *sys.argv[1:]]
        return ModelCard(
            f"{Path(self.model).name}, a reward model",
            "reward model",
            base_model=self.model,
            command=shlex.join(arguments) if arguments[1:2] == ["reward"] else "",
            settings=asdict(self.settings),
            data={self.pairs: count},
            metrics=result.evaluation or {k: float(v) for k, v in result.history[-1].items()},
            curve=points,
            curve_name="accuracy of held-out pairs" if name == held_out else "accuracy",
        )

    def _load(self) -> Any:
        """Load the model as a sequence classifier; one that is none gets a new head.

        Raises:
            ValueError: it cannot be loaded, or weights are missing; of a model that is no
                classifier those of its body.
        """
        import torch
        from transformers import AutoConfig, AutoModelForSequenceClassification, set_seed
        from transformers.utils import logging as transformers_logging

        config = load_pretrained("model", AutoConfig, self.model)
        kinds = config.architectures or [""]
        is_classifier = kinds[0].endswith("ForSequenceClassification")
        set_seed(self.settings.seed)  # the new head is drawn from it
        verbosity = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()  # it would report the new head
        try:
            model, found = load_pretrained(
                "model",
                AutoModelForSequenceClassification,
                self.model,
                dtype=torch.float32 if self.settings.compute_dtype is None else "auto",
                output_loading_info=True,
                **({} if is_classifier else {"num_labels": 1}),
            )
        finally:
            transformers_logging.set_verbosity(verbosity)
        body = f"{model.base_model_prefix}."
        lost = found["missing_keys"]
        if not is_classifier:  # its head is new, and so may a pooler be
            lost = [name for name in lost if name.startswith(body) and "pooler" not in name]
        if lost:
            raise ValueError(f"--model: {self.model} has no weights {', '.join(sorted(lost)[:3])}")
        return model
