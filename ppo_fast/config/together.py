"""Checks of settings of PPOConfig that must fit one another."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ppo_fast.config.settings import PPOConfig

# Critics that compare the samples of a prompt.
GROUP_CRITICS = ("group_mean", "group_norm")


def check_together(config: PPOConfig) -> None:
    """Check settings against one another.

    Raises:
        ValueError: two do not fit; it names both and says how to mend it.
    """
    _check_critic(config)
    _check_groups(config)
    _check_kl(config)
    _check_schedule(config)
    _check_loss(config)
    _check_lengths(config)


def _check_critic(config: PPOConfig) -> None:
    if config.critic == "top" and config.num_layers_unfrozen is None:
        raise ValueError(
            "critic='top' is trained above a frozen trunk: set num_layers_unfrozen, or use "
            "critic='model' with a value_model"
        )
    if config.trained_weights != "float32" and config.compute_dtype is None:
        raise ValueError(
            f"trained_weights={config.trained_weights!r} stores weights in bfloat16: set "
            "compute_dtype='bfloat16', or use trained_weights='float32'"
        )
    if config.value_frozen and config.critic not in (None, "model", "top"):
        raise ValueError(
            f"value_frozen: critic={config.critic!r} has no layers of its own to freeze; leave "
            "value_frozen empty"
        )


def _check_groups(config: PPOConfig) -> None:
    if config.samples_per_prompt > 1:
        return
    needs = {
        f"critic={config.critic!r}": config.critic in GROUP_CRITICS,
        "reward_normalization='group'": config.reward_normalization == "group",
        f"max_resampled_batches={config.max_resampled_batches}": config.max_resampled_batches > 0,
    }
    for setting in (name for name, needed in needs.items() if needed):
        raise ValueError(
            f"{setting} compares the samples of a prompt: set samples_per_prompt to 2 or more, "
            f"got {config.samples_per_prompt}"
        )


def _check_kl(config: PPOConfig) -> None:
    if config.kl_in == "loss" and config.kl_estimator == "k1":
        raise ValueError(
            'kl_estimator="k1" with kl_in="loss": the expected gradient of k1 is zero; '
            'use "k1+k2" (the same value, k2\'s gradient) or kl_in="reward"'
        )
    of_controller = {"adaptive": "kl_target", "linear": "kl_penalty_end"}
    for controller, name in of_controller.items():
        given = getattr(config, name) is not None
        if config.kl_controller == controller and not given:
            raise ValueError(f"kl_controller={controller!r} needs {name}; got None")
        if given and config.kl_controller != controller:
            raise ValueError(
                f"{name}: is for kl_controller={controller!r}, got {config.kl_controller!r}"
            )
    if config.kl_controller == "adaptive" and config.kl_penalty == 0:
        raise ValueError(
            "kl_penalty: got 0 with kl_controller='adaptive', which multiplies it; start above 0"
        )


def _check_schedule(config: PPOConfig) -> None:
    if config.lr_floor > 0 and config.lr_schedule != "cosine":
        raise ValueError(
            f"lr_floor: got {config.lr_floor} with lr_schedule={config.lr_schedule!r}; the floor "
            "is the 'cosine' schedule's"
        )
    steps = config.schedule_steps
    if steps is not None and config.critic_warmup_steps >= steps:
        raise ValueError(
            f"critic_warmup_steps: got {config.critic_warmup_steps}, expected fewer than "
            f"schedule_steps={steps}: the policy would never be trained"
        )


def _check_loss(config: PPOConfig) -> None:
    if config.dual_clip is not None and config.objective != "clip":
        raise ValueError(
            f"dual_clip: objective={config.objective!r} has no second clip; use dual_clip=None"
        )
    if config.ratio_to == "sampler":
        for name in ("importance", "target_kl"):
            if getattr(config, name) is not None:
                raise ValueError(
                    f"{name}: got {getattr(config, name)!r} with ratio_to='sampler', whose ratios "
                    "already have the sampler's distribution in them; use ratio_to='old'"
                )
    has_bonus = config.entropy_coef != 0 or config.entropy_target is not None
    if config.entropy_bonus_share < 1 and not has_bonus:
        raise ValueError(
            f"entropy_bonus_share: got {config.entropy_bonus_share}, but there is no bonus; set "
            "entropy_coef or entropy_target"
        )
    if config.entropy_target is not None and config.entropy_coef < 0:
        raise ValueError(
            f"entropy_coef: got {config.entropy_coef} with entropy_target, expected at least 0"
        )


def _check_lengths(config: PPOConfig) -> None:
    alpha, longest = config.gae_length_alpha, config.max_length
    if alpha is not None and alpha * longest < 1:
        raise ValueError(
            f"gae_length_alpha: got {alpha}; 1 - 1 / (alpha * length) is negative for every "
            f"response of up to max_length={longest} tokens; expected at least {1 / longest:g}"
        )
    if config.overlong_buffer > longest:
        raise ValueError(
            f"overlong_buffer: got {config.overlong_buffer}, expected at most max_length={longest}"
        )
