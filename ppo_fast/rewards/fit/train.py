"""Train a reward model from preference pairs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_scheduler

from ppo_fast.data.batches import batches_by_tokens
from ppo_fast.models.checks import check_tokenizer, check_vocabulary, resolve_device
from ppo_fast.models.heads import RewardModel
from ppo_fast.models.precision import computing_in
from ppo_fast.models.quantized import to_float32
from ppo_fast.rewards.encoding import (
    FORMAT_ATTRIBUTE,
    LENGTH_ATTRIBUTE,
    Encoder,
    Format,
)
from ppo_fast.rewards.fit.loss import calibration, pair_losses, pair_metrics
from ppo_fast.rewards.fit.model import (
    as_reward_model,
    choose_trained,
    head_in_its_dtype,
    merge_adapters,
    rewards_of,
)
from ppo_fast.rewards.fit.packed import packed_rewards
from ppo_fast.rewards.fit.pairs import Pair, read_pairs, split
from ppo_fast.rewards.fit.settings import RewardModelConfig
from ppo_fast.rewards.fit.tokens import PairTokens, encode_pairs

logger = logging.getLogger(__name__)

Metrics = dict[str, float]
OnStep = Callable[[Metrics], object]
SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


@dataclass(frozen=True)
class RewardModelResult:
    """A trained reward model.

    model: the model, in eval mode and float32, with adapters merged.
    history: the metrics of each optimizer step: step, epoch, loss, accuracy, margin (mean
        difference of the rewards of chosen and rejected responses), reward_mean and reward_std,
        grad_norm, learning_rate; after an evaluation also those of the held-out pairs, as
        held_out/<name>, with calibration.
    evaluation: metrics of the held-out pairs under the model's weights: loss, accuracy, margin,
        calibration, reward_mean, reward_std; empty without held-out pairs.
    """

    model: Any
    history: list[Metrics]
    evaluation: Metrics


def train_reward_model(
    model: PreTrainedModel | RewardModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Iterable[Any],
    *,
    config: RewardModelConfig | None = None,
    held_out: float | Iterable[Any] | None = 0.1,
    device: torch.device | str | None = None,
    on_step: OnStep | None = None,
) -> RewardModelResult:
    """Train a reward model to prefer the chosen response of each pair to the rejected one.

    The loss is that of Bradley and Terry's model; see ``fit.loss.pair_losses``. Dropout is off. On
    one machine, equal seeds give equal weights.

    Args:
        model: a sequence classifier of transformers with one label, which is trained in place; or
            a causal LM, whose body is copied into a classifier with a new head; or a
            ``ppo_fast.RewardModel``, trained in place.
        tokenizer: the model's tokenizer, with a pad token.
        pairs: a list of dicts or a ``datasets.Dataset`` with prompt, chosen and rejected, texts or
            chats; see ``fit.pairs.read_pairs``.
        config: None: the defaults.
        held_out: share of the pairs that is not trained on but evaluated; or pairs for it; or None.
        device: None: the model's; "auto": a GPU if there is one.
        on_step: called with the metrics of each optimizer step, those of ``history``.

    Returns:
        The model, the metrics of all steps, and those of the held-out pairs.

    Raises:
        TypeError, ValueError: a model, a tokenizer, pairs or settings that do not fit; before any
            model runs.
        FloatingPointError: a reward, loss or gradient of a step was not finite, and the weights are
            those of the step before; or a reward or loss of held-out pairs was, and the weights are
            those that were evaluated.
    """
    config = RewardModelConfig() if config is None else config
    if not isinstance(config, RewardModelConfig):
        raise TypeError(f"config: got {type(config).__name__}, expected a RewardModelConfig(...)")
    check_tokenizer(tokenizer)
    read = read_pairs(pairs, use_margin=config.use_margin)
    of_their_own = None if held_out is None or isinstance(held_out, (int, float)) else held_out
    kept, away = split(len(read), held_out if of_their_own is None else None, config.seed)  # type: ignore[arg-type]
    if config.early_stopping_patience is not None and held_out is None:
        raise ValueError("early_stopping_patience: needs held-out pairs, and held_out is None")
    reward_model = as_reward_model(model, tokenizer, config.seed)
    check_vocabulary(reward_model, "model", tokenizer)
    chosen_format = _format(reward_model, tokenizer, read, config)
    encoder = Encoder(reward_model, tokenizer, chosen_format, max_length=config.max_length)
    data = encode_pairs(encoder, read)
    trained, evaluated = data.select(kept), data.select(away)
    if of_their_own is not None:
        others = read_pairs(of_their_own, use_margin=config.use_margin, name="held_out")
        evaluated = encode_pairs(encoder, others, "held_out")
    reward_model.to(resolve_device(device, reward_model))
    choose_trained(reward_model, config)
    run = _Run(reward_model.eval(), encoder, config, on_step)
    try:
        evaluation = run.train(trained, evaluated)
    finally:
        merge_adapters(reward_model)
        to_float32(reward_model)  # with compute_dtype, what is frozen may be in half precision
    _note(reward_model, encoder)
    return RewardModelResult(reward_model, run.history, evaluation)


def evaluate_reward_model(
    model: PreTrainedModel | RewardModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Iterable[Any],
    *,
    config: RewardModelConfig | None = None,
    device: torch.device | str | None = None,
) -> Metrics:
    """Compute the metrics of pairs under a reward model, as ``train_reward_model`` does.

    Args:
        model: a sequence classifier of transformers with one label, or a ``RewardModel``.
        tokenizer, pairs, config, device: as in ``train_reward_model``.

    Returns:
        loss, accuracy, margin, calibration, reward_mean, reward_std.
    """
    config = RewardModelConfig() if config is None else config
    check_tokenizer(tokenizer)
    read = read_pairs(pairs, use_margin=config.use_margin)
    reward_model = as_reward_model(model, tokenizer, config.seed)
    if reward_model is not model:
        raise TypeError(f"model: got {type(model).__name__}, which gives no reward")
    check_vocabulary(model, "model", tokenizer)
    chosen_format = _format(model, tokenizer, read, config)
    encoder = Encoder(model, tokenizer, chosen_format, max_length=config.max_length)
    data = encode_pairs(encoder, read)
    model.to(resolve_device(device, model))
    was_training = model.training
    try:
        return _Run(model.eval(), encoder, config, None).evaluate(data)
    finally:
        model.train(was_training)


def _format(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    pairs: list[Pair],
    config: RewardModelConfig,
) -> Format:
    """Return how texts become tokens, by what is asked for, the model and the pairs."""
    if config.format is not None:
        return config.format
    if isinstance(model, RewardModel):
        return "policy"
    noted: Format | None = getattr(model.config, FORMAT_ATTRIBUTE, None)
    chats = bool(tokenizer.chat_template) and any(pair.is_chat for pair in pairs)
    return noted or ("chat" if chats else "joined")


def _note(model: nn.Module, encoder: Encoder) -> None:
    """Note in the model how its texts became tokens, for those who score with it."""
    if isinstance(model, RewardModel):
        model.append_eos = encoder.format == "policy"
    else:
        config: Any = model.config
        setattr(config, FORMAT_ATTRIBUTE, encoder.format)
        setattr(config, LENGTH_ATTRIBUTE, encoder.max_length)


class _Run:
    """The optimizer steps of a training run, and its evaluations."""

    def __init__(
        self, model: nn.Module, encoder: Encoder, config: RewardModelConfig, on_step: OnStep | None
    ) -> None:
        self.model, self.encoder, self.config, self.on_step = model, encoder, config, on_step
        self.device = next(model.parameters()).device
        self.dtype = getattr(torch, config.compute_dtype) if config.compute_dtype else None
        self.trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.history: list[Metrics] = []
        self.packed = packed_rewards(model, self.dtype)

    def train(self, data: PairTokens, held_out: PairTokens) -> Metrics:
        """Run all steps, and return the metrics of the held-out pairs."""
        config, count = self.config, len(data.chosen)
        per_epoch = -(-count // config.batch_size)
        total = config.num_epochs * per_epoch
        optimizer, scheduler = self._optimizer(total)
        best = _Best(config.early_stopping_patience)
        evaluation: Metrics = {}
        for step, rows in enumerate(self._batches(count), 1):
            metrics = {"step": step, "epoch": step / per_epoch}
            metrics |= self._step(data, rows, optimizer, step)
            metrics["learning_rate"] = float(scheduler.get_last_lr()[0])
            scheduler.step()
            is_due = step % (config.eval_steps or per_epoch) == 0 or step == total
            if is_due and held_out.chosen:
                evaluation = self.evaluate(held_out, step)
                best.see(evaluation, self.trained)
                metrics |= {f"held_out/{name}": value for name, value in evaluation.items()}
            self.history.append(metrics)
            if self.on_step is not None:
                self.on_step(dict(metrics))
            if best.is_over:
                logger.info("training ends after step %d of %d: %s", step, total, best.reason)
                break
        return best.restore(self.trained) or evaluation

    def _optimizer(self, total: int) -> tuple[AdamW, Any]:
        config, weights = self.config, list(self.trained.values())
        groups = [
            {"params": [p for p in weights if p.dim() > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in weights if p.dim() < 2], "weight_decay": 0.0},
        ]
        optimizer = AdamW([group for group in groups if group["params"]], lr=config.learning_rate)
        warmup = config.lr_warmup if config.lr_warmup >= 1 else config.lr_warmup * total
        scheduler = get_scheduler(
            SCHEDULES[config.lr_schedule],
            optimizer,
            num_warmup_steps=int(warmup),
            num_training_steps=total,
        )
        return optimizer, scheduler

    def _batches(self, count: int) -> Iterator[Tensor]:
        """Yield the indices of each step's pairs; each epoch has an order of its own."""
        generator = torch.Generator("cpu").manual_seed(self.config.seed)
        for _ in range(self.config.num_epochs):
            order = torch.randperm(count, generator=generator, device="cpu")
            yield from order.split(self.config.batch_size)

    @torch.enable_grad()
    def _step(self, data: PairTokens, rows: Tensor, optimizer: AdamW, step: int) -> Metrics:
        """Run an optimizer step on the pairs ``rows``.

        Raises:
            FloatingPointError: a reward, the loss or the gradient is not finite; nothing is
                changed.
        """
        losses = torch.zeros(len(rows), device="cpu")
        rewards = torch.zeros(2, len(rows), device="cpu")
        for part in self._microbatches(data, rows):
            found = self._rewards(data, rows[part])
            margins = data.margins[rows[part]].to(self.device)
            of_part = pair_losses(found[0], found[1], margins, self.config.centering)
            (of_part.sum() / len(rows)).backward()
            losses[part], rewards[:, part] = of_part.detach().cpu(), found.detach().cpu()
        gradients = [p.grad for p in self.trained.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        loss = float(losses.mean())
        # an infinite reward of a chosen response has loss 0
        if not (norm.isfinite() and losses.isfinite().all() and rewards.isfinite().all()):
            optimizer.zero_grad()
            raise FloatingPointError(
                f"step {step}: the loss is {loss}, the gradient's norm {float(norm)}, the largest "
                f"reward {float(rewards.abs().max())}; this step changed nothing; lower "
                "learning_rate, or use compute_dtype=None"
            )
        if self.config.max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(self.trained.values(), self.config.max_grad_norm, norm)
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": loss, **pair_metrics(rewards[0], rewards[1]), "grad_norm": float(norm)}

    def _microbatches(self, data: PairTokens, rows: Tensor) -> list[Tensor]:
        return batches_by_tokens(data.lengths[rows], self.config.microbatch_tokens // 2)

    def _rewards(self, data: PairTokens, rows: Tensor) -> Tensor:
        """Compute the rewards [2, n] of the chosen and the rejected responses, in one batch."""
        chosen, rejected = (
            [side[i] for i in rows.tolist()] for side in (data.chosen, data.rejected)
        )
        with computing_in(self.dtype, self.device), head_in_its_dtype(self.model, self.device):
            if self.packed is not None and self.packed.passes.packed:
                return self.packed(chosen, rejected)
            rewards = rewards_of(self.model, self.encoder.pad(chosen + rejected, self.device))
        return rewards.view(2, -1)

    @torch.no_grad()
    def evaluate(self, data: PairTokens, step: int | None = None) -> Metrics:
        """Compute the metrics of pairs that are not trained on, after ``step``.

        Raises:
            FloatingPointError: a reward or a loss is not finite.
        """
        every = torch.arange(len(data.chosen), device="cpu")
        rewards = torch.zeros(2, len(every), device="cpu")
        for part in self._microbatches(data, every):
            rewards[:, part] = self._rewards(data, part).cpu()
        losses = pair_losses(rewards[0], rewards[1], data.margins, self.config.centering)
        finite = losses.isfinite() & rewards.isfinite().all(0)
        if not finite.all():
            where = "" if step is None else f"held-out pairs after step {step}: "
            raise FloatingPointError(
                f"{where}{int((~finite).sum())} of {len(finite)} pairs have a reward or a loss "
                "that is not finite"
            )
        metrics = {"loss": float(losses.mean()), **pair_metrics(rewards[0], rewards[1])}
        return metrics | {"calibration": calibration(rewards[0], rewards[1])}


class _Best:
    """Keeps the weights of the evaluation with the lowest loss, if training may end early.

    Args:
        patience: evaluations without a lower loss after which training ends; None: never.
    """

    def __init__(self, patience: int | None) -> None:
        self.patience, self.since = patience, 0
        self.evaluation: Metrics = {}
        self._weights: dict[str, Tensor] = {}

    @property
    def is_over(self) -> bool:
        """Whether training ends."""
        return self.patience is not None and self.since >= self.patience

    @property
    def reason(self) -> str:
        """Why training ends."""
        return f"{self.since} evaluations had no loss below {self.evaluation['loss']:.4f}"

    def see(self, evaluation: Metrics, weights: dict[str, nn.Parameter]) -> None:
        """Compare an evaluation with the best so far."""
        if self.patience is None:
            return
        self.since += 1
        if not self.evaluation or evaluation["loss"] < self.evaluation["loss"]:
            self.since, self.evaluation = 0, evaluation
            self._weights = {name: p.detach().cpu().clone() for name, p in weights.items()}

    @torch.no_grad()
    def restore(self, weights: dict[str, nn.Parameter]) -> Metrics:
        """Restore the weights of the best evaluation, and return it; {} if none are kept."""
        for name, weight in self._weights.items():
            weights[name].copy_(weight)
        return self.evaluation
