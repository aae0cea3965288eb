"""Training of reward models in the classic interface: functions, and RewardModelTrainer.

They are thin: the training is ``ppo_fast.rewards.fit.train``, which has more settings.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ppo_fast.checks import check_counts
from ppo_fast.disk.files import written
from ppo_fast.models.heads import RewardModel
from ppo_fast.rewards.fit import train as fit
from ppo_fast.rewards.fit.loss import pair_losses
from ppo_fast.rewards.fit.settings import RewardModelConfig

logger = logging.getLogger(__name__)

__all__ = [
    "RewardModel",
    "RewardModelTrainer",
    "compute_reward_loss",
    "evaluate_reward_model",
    "train_reward_model",
]

Pairs = Sequence[dict[str, Any]]
MAX_LENGTH = 512


def compute_reward_loss(reward_chosen: Tensor, reward_rejected: Tensor) -> Tensor:
    """Compute the mean of -log sigmoid(reward_chosen - reward_rejected), of rewards [n] each."""
    return pair_losses(reward_chosen, reward_rejected).mean()


def train_reward_model(
    reward_model: RewardModel,
    training_data: Pairs,
    tokenizer: PreTrainedTokenizerBase,
    num_epochs: int = 3,
    batch_size: int = 4,
    learning_rate: float = 1e-5,
    device: torch.device | str | None = None,
    validation_data: Pairs | None = None,
    max_length: int = MAX_LENGTH,
    gradient_accumulation_steps: int = 1,
    log_interval: int = 10,
) -> dict[str, list[float]]:
    """Train a reward model in place on preference pairs.

    Args:
        reward_model: the model.
        training_data: dicts with prompt, response_chosen and response_rejected.
        tokenizer: its tokenizer, with a pad token.
        num_epochs: passes over the pairs.
        batch_size: pairs of a forward pass.
        learning_rate: AdamW step size, constant.
        device: None: the model's.
        validation_data: pairs that are evaluated after each epoch.
        max_length: max tokens of a prompt with a response; the prompt's beginning is cut.
        gradient_accumulation_steps: forward passes of an optimizer step.
        log_interval: optimizer steps between log lines (logging, level INFO).

    Returns:
        losses, accuracy (means over each epoch's steps) and epochs (1, 2, ...), a number an epoch;
        with validation data also validation_losses and validation_accuracy.

    Raises:
        TypeError, ValueError, FloatingPointError: as ``fit.train.train_reward_model``.
    """
    check_counts(
        batch_size=batch_size,
        max_length=max_length,
        gradient_accumulation_steps=gradient_accumulation_steps,
        log_interval=log_interval,
    )

    def log(metrics: dict[str, float]) -> None:
        if metrics["step"] % log_interval == 0:
            logger.info(
                "step %d: loss %.4f, accuracy %.3f",
                metrics["step"],
                metrics["loss"],
                metrics["accuracy"],
            )

    config = RewardModelConfig(
        format="joined",
        num_epochs=num_epochs,
        batch_size=batch_size * gradient_accumulation_steps,
        microbatch_tokens=2 * batch_size * max_length,
        learning_rate=learning_rate,
        lr_schedule="constant",
        max_length=max_length,
    )
    result = fit.train_reward_model(
        reward_model,
        tokenizer,
        training_data,
        config=config,
        held_out=validation_data,
        device=device,
        on_step=log,
    )
    return by_epoch(result.history)


def evaluate_reward_model(
    reward_model: RewardModel,
    evaluation_data: Pairs,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device | str,
    batch_size: int = 4,
    max_length: int = MAX_LENGTH,
) -> tuple[float, float]:
    """Compute the loss of preference pairs, and the share whose chosen response scores higher."""
    config = RewardModelConfig(
        format="joined",
        max_length=max_length,
        microbatch_tokens=2 * batch_size * max_length,
    )
    metrics = fit.evaluate_reward_model(
        reward_model, tokenizer, evaluation_data, config=config, device=device
    )
    return metrics["loss"], metrics["accuracy"]


def by_epoch(history: list[dict[str, float]]) -> dict[str, list[float]]:
    """Return the numbers of each epoch, from those of each step."""
    found: dict[str, list[float]] = {"losses": [], "accuracy": [], "epochs": []}
    start = 0
    for end, metrics in enumerate(history, 1):
        if metrics["epoch"] != int(metrics["epoch"]):
            continue
        steps, start = history[start:end], end
        found["losses"].append(sum(m["loss"] for m in steps) / len(steps))
        found["accuracy"].append(sum(m["accuracy"] for m in steps) / len(steps))
        found["epochs"].append(int(metrics["epoch"]))
        for name, key in (("validation_losses", "loss"), ("validation_accuracy", "accuracy")):
            if f"held_out/{key}" in metrics:
                found.setdefault(name, []).append(metrics[f"held_out/{key}"])
    return found


class RewardModelTrainer:
    """Trains a reward model, keeps its history, and writes checkpoints.

    Args:
        reward_model: the model, trained in place.
        tokenizer: its tokenizer, with a pad token.
        device: None: the model's.
        learning_rate: AdamW step size, constant.
        batch_size: pairs of an optimizer step.

    Attributes:
        training_history: what ``train`` returned, of all its calls one after another.
    """

    def __init__(
        self,
        reward_model: RewardModel,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device | str | None = None,
        learning_rate: float = 1e-5,
        batch_size: int = 4,
    ) -> None:
        RewardModelConfig(learning_rate=learning_rate, batch_size=batch_size)  # checks them
        self.reward_model, self.tokenizer, self.device = reward_model, tokenizer, device
        self.learning_rate, self.batch_size = learning_rate, batch_size
        self.training_history: dict[str, list[float]] = {}

    def train(
        self,
        training_data: Pairs,
        num_epochs: int = 3,
        validation_split: float = 0.1,
        validation_data: Pairs | None = None,
        save_dir: str | Path | None = None,
        save_best_only: bool = True,
        early_stopping_patience: int | None = None,
    ) -> dict[str, list[float]]:
        """Train on preference pairs.

        Args:
            training_data: dicts with prompt, response_chosen and response_rejected.
            num_epochs: max passes over them.
            validation_split: share that is held out, if there is no ``validation_data``; 0: none.
            validation_data: pairs that are evaluated after each epoch.
            save_dir: folder for ``best_model.pt``, the weights of the epoch with the lowest
                validation loss (training loss without validation); None: nothing is saved.
            save_best_only: False: also ``checkpoint_epoch_<n>.pt`` of each epoch.
            early_stopping_patience: epochs without a lower validation loss after which training
                ends, with the weights of the best; None: all epochs, and the last weights.

        Returns:
            losses, accuracy and epochs, as ``train_reward_model``.
        """
        config = RewardModelConfig(
            format="joined",
            num_epochs=num_epochs,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            lr_schedule="constant",
            max_length=MAX_LENGTH,
            early_stopping_patience=early_stopping_patience,
        )
        split = None if validation_split == 0 else validation_split
        steps: list[dict[str, float]] = []
        before = self.training_history

        def on_step(metrics: dict[str, float]) -> None:
            steps.append(metrics)
            if metrics["epoch"] == int(metrics["epoch"]):
                self.training_history = _joined(before, by_epoch(steps))
                if save_dir is not None:
                    self._save_epoch(Path(save_dir), by_epoch(steps), save_best_only)

        fit.train_reward_model(
            self.reward_model,
            self.tokenizer,
            training_data,
            config=config,
            held_out=split if validation_data is None else validation_data,
            device=self.device,
            on_step=on_step,
        )
        return by_epoch(steps)

    def _save_epoch(self, folder: Path, history: dict[str, list[float]], best_only: bool) -> None:
        losses = history.get("validation_losses", history["losses"])
        if not best_only:
            self.save_checkpoint(folder / f"checkpoint_epoch_{len(losses)}.pt")
        if losses[-1] == min(losses):
            self.save_checkpoint(folder / "best_model.pt")

    def evaluate(self, evaluation_data: Pairs) -> dict[str, float]:
        """Compute loss and accuracy of preference pairs."""
        device = next(self.reward_model.parameters()).device if self.device is None else self.device
        loss, accuracy = evaluate_reward_model(
            self.reward_model, evaluation_data, self.tokenizer, device, self.batch_size
        )
        return {"loss": loss, "accuracy": accuracy}

    def save_checkpoint(self, path: str | Path) -> None:
        """Write the model's weights and the history to a file, whole or not at all."""
        path = Path(path)
        contents = {
            "reward_model": self.reward_model.state_dict(),
            "training_history": self.training_history,
        }
        with written(path) as file:
            torch.save(contents, file)

    def load_checkpoint(self, path: str | Path) -> None:
        """Restore what ``save_checkpoint`` wrote. No code in the file is run.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is no such checkpoint, or one of another model; nothing is changed.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"path: no file {path}")
        try:
            contents = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(f"path: {path} is no checkpoint of a RewardModelTrainer") from error
        if not _is_checkpoint(contents):
            raise ValueError(f"path: {path} is no checkpoint of a RewardModelTrainer")
        weights, history = contents["reward_model"], contents["training_history"]
        own = {name: tensor.shape for name, tensor in self.reward_model.state_dict().items()}
        if own != {name: tensor.shape for name, tensor in weights.items()}:
            raise ValueError(f"path: {path} holds the weights of another model")
        self.reward_model.load_state_dict(weights)
        self.training_history = history

    def plot_training_history(self, save_path: str | Path | None = None) -> Any:
        """Plot loss and accuracy over the epochs, and return matplotlib's figure.

        Args:
            save_path: file to write it to, by its ending; None: none.

        Raises:
            ValueError: nothing is trained yet.
            ModuleNotFoundError: matplotlib is not installed.
        """
        if not self.training_history:
            raise ValueError("training_history: is empty; call train() first")
        try:
            from matplotlib.figure import Figure
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "the plot needs matplotlib: pip install matplotlib"
            ) from error
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        for axes, title, name in zip(
            figure.subplots(1, 2), ("Loss", "Accuracy"), ("losses", "accuracy"), strict=True
        ):
            for key, label in ((name, "training"), (f"validation_{name}", "validation")):
                if values := self.training_history.get(key):
                    axes.plot(range(1, len(values) + 1), values, marker="o", label=label)
            axes.set_title(title)
            axes.set_xlabel("epoch")
            axes.legend()
        if save_path is not None:
            figure.savefig(save_path, dpi=150)
        return figure


def _is_checkpoint(contents: Any) -> bool:
    """Return whether a file's contents are those that ``save_checkpoint`` writes."""
    if not isinstance(contents, dict):
        return False
    weights, history = contents.get("reward_model"), contents.get("training_history")
    return (
        isinstance(weights, dict)
        and isinstance(history, dict)
        and all(isinstance(weight, Tensor) for weight in weights.values())
        and all(isinstance(numbers, list) for numbers in history.values())
    )


def _joined(
    before: dict[str, list[float]], after: dict[str, list[float]]
) -> dict[str, list[float]]:
    """Return a history with another one after it; its epochs are numbered on."""
    done = before.get("epochs", [])
    after = after | {"epochs": [n + len(done) for n in after["epochs"]]}
    return {name: [*before.get(name, []), *after.get(name, [])] for name in before | after}
