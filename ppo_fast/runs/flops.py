"""Floating-point operations of the products and the attention of a PPO step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from ppo_fast.data.tokens import Tokens
from ppo_fast.models.parts import body_of, layer_list
from ppo_fast.models.transformers_internals import head_size, layer_configs


class Sizes(NamedTuple):
    """Sizes of a model, by which its operations are counted.

    weights: of each layer, the number of weights that a token is multiplied with.
    trained: of each layer, those of them that are trained.
    queries: heads of attention times their size, the mean of the layers.
    head: weights of the LM head; 0: none.
    head_trained: whether it is trained.
    """

    weights: tuple[float, ...]
    trained: tuple[float, ...]
    queries: float = 0.0
    head: int = 0
    head_trained: bool = False

    def forward(self, first: int, end: int, layers: int | None = None) -> float:
        """Return the operations of a sequence's tokens ``first`` to ``end`` in the top layers.

        A token takes 2 for each weight, and 4 times ``queries`` for each token that it attends to:
        itself and all before it.
        """
        weights = self.weights[len(self.weights) - (layers or len(self.weights)) :]
        attended = (end * (end + 1) - first * (first + 1)) // 2
        return 2 * sum(weights) * (end - first) + 4 * self.queries * attended * len(weights)

    def backward(self, first: int, end: int) -> float:
        """Return the operations of their backward pass in the layers.

        From the first layer that is trained on, gradients of the inputs take as many operations as
        the forward pass (in attention twice as many), and those of trained weights 2 a weight.
        """
        lowest = next((i for i, n in enumerate(self.trained) if n), len(self.trained))
        layers = len(self.weights) - lowest
        if not layers:
            return 0.0
        forward, count = self.forward(first, end, layers), end - first
        attention = forward - 2 * sum(self.weights[lowest:]) * count
        return forward + attention + 2 * sum(self.trained) * count


def sizes_of(model: nn.Module) -> Sizes:
    """Return the sizes of a transformers model, in wrappers of adapters too, or of another module.

    Of the experts of a layer, those that a token visits count. Another module is one layer without
    attention.
    """
    found = _layers_and_config(model)
    if found is None:
        total, trained = _counts(model, 1.0)
        return Sizes((total,), (trained,))
    layers, config = found
    counts = [_counts(layer, _visited(config)) for layer in layers]
    queries = [_queries(of_layer) for of_layer in layer_configs(config)]
    head = getattr(model, "get_output_embeddings", lambda: None)()
    weight = getattr(head, "weight", None)
    return Sizes(
        tuple(n for n, _ in counts),
        tuple(n for _, n in counts),
        sum(queries) / len(queries),
        0 if weight is None else config.vocab_size * config.hidden_size,
        weight is not None and weight.requires_grad,
    )


def _queries(config: Any) -> int:
    heads = getattr(config, "num_attention_heads", 0)
    return heads * head_size(config) if heads else 0


def _layers_and_config(model: nn.Module) -> tuple[nn.ModuleList, Any] | None:
    """Return a transformer's layers and config, in a value model too; None: it is none."""
    inner: list[Any] = [getattr(model, "body", None), getattr(model, "base_model", None)]
    for part in [model, *inner]:
        try:
            body: Any = body_of(part)
            return layer_list(body), body.config.get_text_config()
        except (ValueError, AttributeError):
            continue
    return None


def _visited(config: Any) -> float:
    """Return the share of a layer's experts that a token visits; 1 without experts."""
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        experts = getattr(config, name, None)
        if experts:
            return min(getattr(config, "num_experts_per_tok", None) or experts, experts) / experts
    return 1.0


def _counts(module: nn.Module, visited: float) -> tuple[float, float]:
    """Return the weights of a module's products for a token, and the trained ones."""
    total = trained = 0.0
    for name, count, grad in _products(module):
        share = visited if ".experts." in f".{name}." else 1.0
        total += share * count
        trained += share * count * grad
    return total, trained


def _products(module: nn.Module) -> Iterator[tuple[str, int, bool]]:
    """Yield name, number of weights and whether they are trained, of each matrix in a module."""
    for name, part in module.named_modules():
        if isinstance(part, nn.Embedding):
            continue  # a row is looked up
        for key, weight in part.named_parameters(recurse=False):
            if hasattr(part, "in_features") and key == "weight":
                # packed in 4 bits, a weight has fewer elements
                yield name, part.in_features * part.out_features, weight.requires_grad
            elif weight.dim() >= 2:
                yield name, weight.numel(), weight.requires_grad


def step_flops(
    tokens: Tokens,
    policy: Sizes,
    value: Sizes | None = None,
    *,
    top: int | None = None,
    value_top: int | None = None,
    samples_per_prompt: int = 1,
    policy_epochs: float = 1.0,
    value_epochs: float = 1.0,
    old_computed: bool = False,
    value_of_prompts: bool = False,
    policy_packed: bool = False,
    value_packed: bool = False,
) -> float:
    """Return the operations of one step, as its equations ask for: nothing is counted twice.

    A forward pass takes 2 operations for each weight and token, a backward pass 4, and attention
    4 times heads times their size for each pair of tokens, twice that backwards. Padding, what
    gradient checkpointing computes again, and rewards are not counted. The passes:

    * rollout: each prompt once for all its samples, in all layers; each response token but the
      last, in all layers; the LM head for each response token;
    * before the update: the reference, the policy too with ``old_computed``, and the value model,
      on prompts and responses, in the layers above the trunk; their LM heads for each response
      token;
    * each epoch: forward and backward of the policy and of the value model, in these layers;
      gradients of weights for those that are trained.

    No pass takes a response's last token, which nothing follows. Where passes are packed, they too
    take each prompt once for all its samples.

    Args:
        tokens: of B sequences.
        policy, value: sizes; None: no value model of its own.
        top, value_top: number of layers above the trunk, whose states are computed once, in the
            rollout; None: no trunk.
        samples_per_prompt: rows next to one another with one prompt.
        policy_epochs, value_epochs: passes of the update.
        old_computed: whether old log-probs are computed anew before the update.
        value_of_prompts: whether the value model reads prompts alone.
        policy_packed, value_packed: whether their passes are packed.
    """
    pairs = list(zip(tokens.prompt_lengths.tolist(), tokens.response_lengths.tolist(), strict=True))
    responses = sum(new for _, new in pairs)
    heads = 2.0 * policy.head * responses
    flops = sum(policy.forward(0, prompt) for prompt, _ in pairs[::samples_per_prompt])
    flops += sum(policy.forward(prompt, prompt + max(new - 1, 0)) for prompt, new in pairs) + heads
    spans = _spans(pairs, samples_per_prompt if policy_packed else 1)
    above = sum(policy.forward(*span, top) for span in spans) + heads
    flops += above * (1 + old_computed)
    backward = sum(policy.backward(*span) for span in spans)
    flops += policy_epochs * (above + backward + (1 + policy.head_trained) * heads)
    if value is not None:
        spans = _spans(pairs, samples_per_prompt if value_packed else 1)
        spans = [(0, prompt) for prompt, _ in pairs] if value_of_prompts else spans
        above = sum(value.forward(*span, value_top) for span in spans)
        backward = sum(value.backward(*span) for span in spans)
        flops += above + value_epochs * (above + backward)
    return flops


def _spans(pairs: list[tuple[int, int]], samples_per_prompt: int) -> list[tuple[int, int]]:
    """Return first and end of the tokens to compute in each row: a prompt once for its samples."""
    return [
        (prompt if row % samples_per_prompt else 0, prompt + max(new - 1, 0))
        for row, (prompt, new) in enumerate(pairs)
    ]
