"""Flags of ``ppo-fast train`` in groups, as its help shows them."""

from __future__ import annotations

from dataclasses import MISSING, field, fields, make_dataclass
from typing import Annotated, Any, get_type_hints

import tyro

from ppo_fast.cli.train import Train
from ppo_fast.config import PPOConfig
from ppo_fast.config.class_doc import field_docs

SUMMARY = "Train a policy on prompts. Every field of PPOConfig is a flag."
# tyro writes "... options" after a group's name.
GROUPS = {
    "run": "The models, the length of the run, and the device.",
    "data": "The prompts, and how responses to them are drawn.",
    "reward": "The rewards, and what is made of their scores.",
    "algorithm": "The losses, the critic and the optimizers.",
    "memory": "What bounds memory and time.",
    "output": "The files of the run.",
}
# Settings that are not named here: those of PPOConfig are the algorithm's, Train's own the run's.
NAMED = {
    "run": ("seed", "on_nonfinite", "max_skipped"),
    "data": (
        *("prompts", "prompt_column", "prompts_split", "stream"),
        *("held_out", "eval_every", "eval_samples", "eval_greedy"),
        *("max_prompt_length", "long_prompts", "samples_per_prompt", "max_resampled_batches"),
        *("max_length", "temperature", "top_k", "top_p", "min_new_tokens"),
        *("stop_token_ids", "stop_strings", "skip_special_tokens"),
    ),
    "reward": (
        *("reward", "eval_reward", "reward_label", "reward_format", "reward_cut_completions"),
        *("reward_dtype", "reward_device", "reward_weights"),
        *("reward_normalization", "reward_scale", "reward_clip"),
        *("missing_eos_penalty", "overlong_buffer", "overlong_penalty"),
    ),
    "memory": (
        *("microbatch_tokens", "forward_batch_tokens", "padding_free"),
        *("trunk_dtype", "compute_dtype"),
        *("trained_weights", "gradient_checkpointing", "adamw"),
        *("rollout_slots", "rollout_weights", "kv_cache_dtype"),
        *("cuda_graphs", "kept_rollout_bytes"),
        *("check_gradients_together", "undo_updates", "offload"),
    ),
    "output": (
        *("output_dir", "adapter_only", "save_critic", "push_to_hub"),
        *("checkpoint_freq", "keep_last", "keep_best", "export_from"),
        *("report_to", "metric_names", "project", "run_name"),
    ),
}
GROUP_OF = {name: group for group, names in NAMED.items() for name in names}


def _flags() -> type:
    """Make a dataclass with a dataclass of flags for each group."""
    parts: dict[str, list[Any]] = {group: [] for group in GROUPS}
    for cls, otherwise in ((Train, "run"), (PPOConfig, "algorithm")):
        hints, docs = get_type_hints(cls), field_docs(cls)
        for item in fields(cls):
            if item.name == "ppo":
                continue
            words = docs.get(item.name, ("", ""))[1]
            kind: Any = Annotated[hints[item.name], tyro.conf.arg(help=words)]
            default: Any = {"default": item.default}
            if item.default is MISSING:
                default = {"default_factory": item.default_factory}
            parts[GROUP_OF.get(item.name, otherwise)].append((item.name, kind, field(**default)))
    groups = []
    for group, words in GROUPS.items():
        made: Any = make_dataclass(group, parts[group], frozen=True, namespace={"__doc__": words})
        flags: Any = Annotated[made, tyro.conf.OmitArgPrefixes]
        groups.append((group, flags, field(default_factory=made)))
    return make_dataclass("TrainFlags", groups, frozen=True, namespace={"__doc__": SUMMARY})


# tyro parses the flags to a TrainFlags, and ``train_of`` turns that into a Train.
TrainFlags = _flags()


def flags_of(train: Train) -> Any:
    """Return a command's settings as TrainFlags."""
    of_ppo, groups = {item.name for item in fields(PPOConfig)}, {}
    for group in fields(TrainFlags):
        made: Any = group.default_factory
        values = {
            item.name: getattr(train.ppo if item.name in of_ppo else train, item.name)
            for item in fields(made)
        }
        groups[group.name] = made(**values)
    return TrainFlags(**groups)


def train_of(flags: Any) -> Train:
    """Return the command of these TrainFlags.

    Raises:
        ValueError: settings that PPOConfig refuses.
    """
    values = {
        item.name: getattr(part, item.name)
        for part in (getattr(flags, group) for group in GROUPS)
        for item in fields(part)
    }
    of_ppo = {item.name: values.pop(item.name) for item in fields(PPOConfig)}
    return Train(**values, ppo=PPOConfig(**of_ppo))
