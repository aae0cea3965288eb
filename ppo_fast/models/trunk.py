"""The frozen trunk: a transformer's embedding and lower layers, whose states are computed once.

A pass from trunk states runs the model's own forward, in which the lower layers return those states
instead of computing them. So masks, rotary tables and the final norm stay the model's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ppo_fast.data.tokens import Tokens
from ppo_fast.data.trunk_states import TrunkStates
from ppo_fast.models.packed_attention import PackedPass
from ppo_fast.models.parts import body_of, layer_list
from ppo_fast.models.patching import replaced_forwards, uncompiled
from ppo_fast.models.transformers_internals import layer_input, layer_output, output_of


class Split:
    """A transformer's body, split into the trunk and the top layers.

    Args:
        body: a transformer without its LM head.
        num_layers_unfrozen: number of top layers.

    Raises:
        ValueError: the body has no list of layers, or not more than that.
    """

    def __init__(self, body: nn.Module | None, num_layers_unfrozen: int) -> None:
        self.num_layers_unfrozen = num_layers_unfrozen
        self.lower = lower_layers(body, num_layers_unfrozen)
        self.first = layer_list(body)[len(self.lower)]
        self.body: Any = body
        # what the trunk's last layer returns, with False for the states; None: not known yet
        self._returned: Any = None

    @torch.no_grad()
    def compute_trunk_states(self, tokens: Tokens, *, packed: PackedPass | None = None) -> Tensor:
        """Compute the trunk states, the input of the first top layer.

        They are [B, L, D], or [1, N, D] of a packed pass.
        """
        handle = self.lower[-1].register_forward_hook(self._note_returned)
        with _stopping_before(self.first) as reached, uncompiled(self.body, around=self.first):
            try:
                run(self.body, tokens, packed=packed)
            except _Reached:
                return reached[0]
            finally:
                handle.remove()
        raise RuntimeError("the first unfrozen layer was never reached")

    def _note_returned(self, layer: nn.Module, args: Any, output: Any) -> None:
        self._returned = layer_output(False, output)

    def as_returned(self, trunk_states: Tensor, tokens: Tokens) -> Any:
        """Return the trunk states of ``tokens`` as a layer of the trunk returns them."""
        if self._returned is None:
            self.compute_trunk_states(tokens)
        return layer_output(trunk_states, self._returned)

    @contextmanager
    def recording(self) -> Iterator[list[Tensor]]:
        """Within the block, append the trunk states of every pass to the yielded list."""
        pieces: list[Tensor] = []

        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            pieces.append(layer_input(args, kwargs))

        handle = self.first.register_forward_pre_hook(record, with_kwargs=True)
        try:
            yield pieces
        finally:
            handle.remove()


def run(
    module: Any,
    tokens: Tokens,
    split: Split | None = None,
    trunk_states: TrunkStates | None = None,
    *,
    packed: PackedPass | None = None,
) -> Any:
    """Return the output of a body, or of a model around it, for all tokens.

    From trunk states, the lower layers do not run. No mask is given: padding follows each row's
    tokens, and causal attention never reaches it. A ``packed`` pass has one row, without padding.
    """
    # ids, from trunk states too: top layers may read what is made of the ids
    arguments: dict[str, Any] = {"input_ids": tokens.input_ids, "use_cache": False}
    if packed is not None:
        position_ids = tokens.packing.columns[None].to(tokens.device)
        arguments |= {"input_ids": tokens.packed_ids, "position_ids": position_ids}
    attending = nullcontext() if packed is None else packed.running()
    if trunk_states is None:
        with attending:
            return output_of(module, **arguments)
    assert split is not None
    given = trunk_states.padded(tokens) if packed is None else trunk_states.packed(tokens)
    # they may be kept in half precision
    states = split.as_returned(given.to(next(module.parameters()).dtype), tokens)
    replaced = [(layer, lambda *_, **__: states) for layer in split.lower]
    with replaced_forwards(replaced), uncompiled(module, around=split.first), attending:
        return output_of(module, **arguments)


def lower_layers(body: nn.Module | None, num_layers_unfrozen: int) -> list[nn.Module]:
    """Return the layers of the trunk: all but the last ``num_layers_unfrozen``.

    Raises:
        ValueError: ``num_layers_unfrozen`` leaves no layer, or is not positive.
    """
    layers = list(layer_list(body))
    if not 0 < num_layers_unfrozen < len(layers):
        raise ValueError(
            f"num_layers_unfrozen: got {num_layers_unfrozen}, expected 1 to {len(layers) - 1} "
            f"(the model has {len(layers)} layers), or None to train them all"
        )
    return layers[: len(layers) - num_layers_unfrozen]


def top_modules(body: nn.Module, num_layers_unfrozen: int) -> list[nn.Module]:
    """Return the top layers and the modules defined after the layers, such as the final norm."""
    lower = lower_layers(body, num_layers_unfrozen)
    layers = layer_list(body)
    top = list(layers[len(lower) :])
    for parent in body.modules():
        children = list(parent.children())
        top += children[_index(layers, children) + 1 :]
    return top


def share_trunk(
    body: nn.Module, policy_body: nn.Module, num_layers_unfrozen: int, *, only_frozen: bool
) -> bool:
    """Let ``body`` share the policy's trunk weights if its own are equal; return whether it does.

    With ``only_frozen``, a body that trains any of them does not share.
    """
    if type(body) is not type(policy_body) or len(layer_list(body)) != len(layer_list(policy_body)):
        return False
    ours, theirs = (_trunk_weights(b, num_layers_unfrozen) for b in (body, policy_body))
    if only_frozen and any(p.requires_grad for p in ours.values()):
        return False
    if ours.keys() != theirs.keys() or any(
        p.dtype != theirs[name].dtype or not torch.equal(p, theirs[name])
        for name, p in ours.items()
    ):
        return False
    for name, parameter in theirs.items():
        path, _, leaf = name.rpartition(".")
        setattr(body.get_submodule(path), leaf, parameter)
    return True


def _trunk_weights(body: nn.Module, num_layers_unfrozen: int) -> dict[str, nn.Parameter]:
    top = {p for m in top_modules(body, num_layers_unfrozen) for p in m.parameters()}
    return {name: p for name, p in body.named_parameters() if p not in top}


def freeze_trunk(model: nn.Module, num_layers_unfrozen: int) -> None:
    """Freeze all of a causal LM but its top layers, its final norm and an untied LM head.

    Weights that were frozen before, as by an adapter, stay frozen.

    Raises:
        ValueError: a bad number of layers, the lowest top layer has nothing to train, or a layer of
            the trunk has weights of the top.
    """
    body = body_of(model)
    trained = top_modules(body, num_layers_unfrozen)  # refuses a bad count first
    if not any(p.requires_grad for p in trained[0].parameters()):
        raise ValueError(
            f"num_layers_unfrozen: got {num_layers_unfrozen}, but the lowest of these layers has "
            "no weights to train; lower the number, or unfreeze them "
            "(policy_model.requires_grad_(True))"
        )
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    trained += [] if head is None else [head]
    kept = {p for module in trained for p in module.parameters()} - {embedding.weight}
    lower = nn.ModuleList(lower_layers(body, num_layers_unfrozen))
    if shared := [n for n, p in lower.named_parameters() if p in kept and p.requires_grad]:
        raise ValueError(
            f"num_layers_unfrozen: layers of the trunk and of the top of {type(model).__name__} "
            f"share weights ({shared[0]}); use num_layers_unfrozen=None"
        )
    for parameter in model.parameters():
        if parameter not in kept:
            parameter.requires_grad_(False)


def _index(module: nn.Module, modules: list[nn.Module]) -> int:
    """Return the index of ``module`` in ``modules``, or their number if it is not among them."""
    return next((i for i, other in enumerate(modules) if other is module), len(modules))


class _Reached(Exception):
    """Raised to end a pass before the layer that it runs up to."""


@contextmanager
def _stopping_before(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Within the block, end a pass before ``layer`` by raising _Reached.

    The layer's input is appended to the yielded list.
    """
    reached: list[Tensor] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        reached.append(layer_input(args, kwargs))
        raise _Reached

    handle = layer.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        yield reached
    finally:
        handle.remove()
