"""Fast paths that a model takes or does not take, with the reason and the cost."""

from __future__ import annotations

import logging
from typing import NamedTuple
from weakref import WeakSet

from ppo_fast.models.language_model import LanguageModel
from ppo_fast.rollout.own_cache import own_cache
from ppo_fast.rollout.speedups.cuda_graph_check import why_no_graphs
from ppo_fast.rollout.speedups.few_rows import why_no_few_row_products
from ppo_fast.rollout.speedups.int8_check import check_int8
from ppo_fast.rollout.speedups.slot_check import check_attention, check_layers

logger = logging.getLogger(__name__)

# Largest difference of logits, relative to the largest, that weights in int8 should make: with a
# larger one, few samples count (effective_sample_size).
MOST_INT8_DIFFERENCE = 0.3

_said: WeakSet[LanguageModel] = WeakSet()


class FastPath(NamedTuple):
    """A faster way to compute, and whether a model takes it.

    name: its name.
    in_force: whether the model, or a part of it, takes it.
    why_not: reason why the model, or the rest of it, does not take it; None: all of it does.
    cost: cost of not taking it, as far as it is known.
    failed: whether it was tried and failed the comparison with the model's own numbers.
    """

    name: str
    in_force: bool
    why_not: str | None
    cost: str = ""
    failed: bool = False

    def __str__(self) -> str:
        if self.why_not is None:
            return self.name
        if self.in_force:
            return f"{self.name} ({self.why_not})"
        return f"no {self.name} ({self.why_not}: {self.cost})"


def fast_paths(
    model: LanguageModel, *, cuda_graphs: bool = True, int8: bool = False
) -> list[FastPath]:
    """Return a policy's fast paths, for log-probs and for decoding; run the checks not made yet.

    ``int8`` says whether it decodes with weights in int8.
    """
    head_fails = None if model.fused else model.reason
    no_trunk = "num_layers_unfrozen is None" if model.split is None else None
    paths = [
        _path("fused LM head", head_fails, "all logits are kept in memory", model.fused_differs),
        _path("frozen trunk", no_trunk, "every pass computes every layer"),
        _path(
            "packed passes",
            model.passes.why_padded,
            "passes have padding, and compute a prompt for each of its samples",
        ),
    ]
    if int8:
        paths.append(_int8_path(model))
    if (own := own_cache(model)) is not None:
        cost = "only prompts of equal length are decoded together"
        cost += "" if own.why_all_rows is None else ", until the last response ends"
        paths.append(FastPath("slots in one KV cache", False, own.why_no_slots, cost))
        if own.why_no_cache is not None:
            cost = "every step computes all tokens before it"
            paths.append(FastPath("cache", False, own.why_no_cache, cost, failed=True))
        return paths
    if model.device.type == "cpu":
        layers, total = check_layers(model), model.text_config.num_hidden_layers
        name = f"{layers.number} of {total} layers fused" if layers.number else "fused layers"
        cost = "decoding takes 1.2 to 1.6 times as long"
        few_rows = why_no_few_row_products(model.model)
        return [
            *paths,
            FastPath(name, layers.number > 0, layers.why_not, cost, layers.failed),
            _path("products of few rows", few_rows, "those of 4 rows take 3 to 5 times as long"),
        ]
    attention = check_attention(model)
    copies = "each step copies keys and values for every head"
    graphs = why_no_graphs(model) if cuda_graphs else "cuda_graphs=False"
    return [
        *paths,
        _path("decode_attention", attention, copies, attention is not None),
        _path("CUDA graphs", graphs, "each step launches every kernel from Python"),
    ]


def _int8_path(model: LanguageModel) -> FastPath:
    share, difference = check_int8(model)
    words = f"of {share:.0%} of the weights: logits differ by {difference:.1e}"
    return FastPath("int8 rollouts", True, words, failed=difference > MOST_INT8_DIFFERENCE)


def _path(name: str, why_not: str | None, cost: str, failed: bool = False) -> FastPath:
    return FastPath(name, why_not is None, why_not, cost, failed)


def log_fast_paths(model: LanguageModel, *, cuda_graphs: bool = True, int8: bool = False) -> None:
    """Log a model's fast paths in one line, once per model; as a warning if a comparison failed."""
    if model in _said:
        return
    _said.add(model)
    paths = fast_paths(model, cuda_graphs=cuda_graphs, int8=int8)
    level = logging.WARNING if any(path.failed for path in paths) else logging.INFO
    name = type(model.model).__name__
    logger.log(level, "fast paths of %s: %s", name, ", ".join(map(str, paths)))
