"""The frozen trunk: its states are those of an ordinary pass, and the top starts from them."""

from __future__ import annotations

import pytest
import torch
from tiny_batch import batch
from tiny_models import FAMILIES, tiny_model
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from ppo_fast.data.trunk_states import TrunkStates
from ppo_fast.models.language_model import LanguageModel
from ppo_fast.models.parts import layer_list
from ppo_fast.models.passes import passes_of
from ppo_fast.models.trunk import Split, freeze_trunk

LAYERS = 4

each_family = pytest.mark.parametrize("family", FAMILIES)


each_split = pytest.mark.parametrize(
    ("family", "k"), [(family, k) for family in FAMILIES for k in range(1, LAYERS)]
)


@each_split
@torch.no_grad()
def test_states_from_the_trunk_are_the_ordinary_states(family, k):
    lm = LanguageModel(tiny_model(family, layers=LAYERS), num_layers_unfrozen=k)
    whole = lm.compute_trunk_states(batch())
    for rows in ([0, 1, 2], [1], [2, 0]):
        index = torch.tensor(rows)
        part = batch().select(index)
        trunk_states, expected = (
            lm.compute_trunk_states(part),
            lm.forward(part).states[part.response_mask],
        )
        assert trunk_states.padded(part).shape == (*part.input_ids.shape, 64)
        found = lm.forward(part, trunk_states).states[part.response_mask]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        # what was computed for the whole batch serves some of its rows
        found = lm.forward(part, whole.select(index))
        found = found.states[part.response_mask]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@each_split
def test_the_trunk_is_what_enters_the_first_unfrozen_layer(family, k):
    lm = LanguageModel(tiny_model(family, layers=LAYERS), num_layers_unfrozen=k)
    with torch.no_grad():
        output = lm.body(batch().input_ids, output_hidden_states=True, use_cache=False)
    assert torch.equal(lm.split.compute_trunk_states(batch()), output.hidden_states[LAYERS - k])


@each_split
def test_gradients_of_the_top_are_the_same_from_the_trunk(family, k):
    model = tiny_model(family, layers=LAYERS)
    freeze_trunk(model, k)
    lm = LanguageModel(model, num_layers_unfrozen=k)
    coefficients = torch.randn(3, 5)
    gradients = []
    for trunk_states in (None, lm.compute_trunk_states(batch())):
        model.zero_grad()
        result = lm.logprobs(
            lm.forward(batch(), trunk_states), batch(), temperature=0.7, entropy=True
        )
        (coefficients * (result.logprobs + 0.3 * result.entropy)).sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() == trainable(model)
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], rtol=1e-5, atol=1e-6)
        assert gradients[0][name].abs().max() > 0


def test_only_the_top_layers_run_from_the_trunk():
    lm = LanguageModel(tiny_model("llama", layers=LAYERS), num_layers_unfrozen=1)
    trunk_states = lm.compute_trunk_states(batch())
    ran = []
    for i, layer in enumerate(layer_list(lm.body)):
        layer.self_attn.register_forward_hook(lambda *_, i=i: ran.append(i))
    lm.forward(batch(), trunk_states)
    assert ran == [3]
    ran.clear()
    lm.compute_trunk_states(batch())
    assert ran == [0, 1, 2]


def test_the_ordinary_path_starts_from_the_trunk_too():
    model = tiny_model("llama", layers=LAYERS)
    model.lm_head.register_forward_hook(lambda _, __, logits: 2 * logits)
    lm = LanguageModel(model, num_layers_unfrozen=2)
    with torch.no_grad():
        ordinary, split = lm.forward(batch()), lm.forward(batch(), lm.compute_trunk_states(batch()))
    real = batch().response_mask
    torch.testing.assert_close(ordinary.logits[real], split.logits[real], rtol=1e-5, atol=1e-5)


def test_the_trunk_can_be_recorded_during_a_pass():
    model = tiny_model("llama", layers=LAYERS)
    lm = LanguageModel(model, num_layers_unfrozen=2, padding_free=False)
    with lm.recording_trunk() as pieces, torch.no_grad():
        lm.forward(batch())
        lm.forward(batch())
    expected = lm.split.compute_trunk_states(batch().without_last)
    assert all(torch.equal(piece, expected) for piece in pieces)
    assert len(pieces) == 2
    lm.forward(batch())
    assert len(pieces) == 2, "nothing is recorded after the block"
    with LanguageModel(lm.model).recording_trunk() as pieces:
        lm.forward(batch())
    assert pieces == [], "there is no trunk"


def test_layers_are_restored_after_an_exception():
    model = tiny_model("llama", layers=LAYERS)
    lm = LanguageModel(model, num_layers_unfrozen=2)
    layers = layer_list(lm.body)
    own = layers[1].forward
    layers[1].forward = lambda *args, **kwargs: own(*args, **kwargs)  # as accelerate's hooks do
    hooked = layers[1].forward
    with torch.no_grad():
        expected, trunk_states = lm.forward(batch()).states, lm.compute_trunk_states(batch())

    def fail(*_):
        raise KeyError("top")

    for place, run in (
        (layers[3], lambda: lm.forward(batch(), trunk_states)),
        (layers[0], lambda: lm.compute_trunk_states(batch())),
    ):
        handle = place.register_forward_pre_hook(fail)
        with pytest.raises(KeyError, match="top"):
            run()
        handle.remove()
        assert "forward" not in layers[0].__dict__
        assert layers[1].forward is hooked
        assert not any(layer._forward_pre_hooks for layer in layers)
    with torch.no_grad():
        assert torch.equal(lm.forward(batch()).states, expected)


def trainable(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


NORMS = {"gpt2": "transformer.ln_f", "gpt_neox": "gpt_neox.final_layer_norm"}
LISTS = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}


@each_split
def test_freeze_trunk_leaves_the_top_the_norm_and_an_untied_head(family, k):
    model = tiny_model(family, layers=LAYERS)
    head = model.get_output_embeddings().weight
    tied = head is model.get_input_embeddings().weight
    freeze_trunk(model, k)
    layers = LISTS.get(family, "model.layers")
    top = tuple(f"{layers}.{i}." for i in range(LAYERS - k, LAYERS))
    expected = {
        name
        for name, p in model.named_parameters()
        if name.startswith((*top, NORMS.get(family, "model.norm") + "."))
        or (p is head and not tied)
    }
    assert trainable(model) == expected
    assert any(name.startswith(NORMS.get(family, "model.norm")) for name in expected)


def test_the_families_have_tied_and_untied_heads():
    tied = {
        family: model.get_output_embeddings().weight is model.get_input_embeddings().weight
        for family in FAMILIES
        for model in [tiny_model(family, layers=1)]
    }
    assert set(tied.values()) == {True, False}


@pytest.mark.parametrize("k", [0, -1, LAYERS, LAYERS + 1])
def test_a_bad_split_is_refused_with_the_layer_count(k):
    model = tiny_model("gpt2", layers=LAYERS)
    message = rf"num_layers_unfrozen: got {k}, expected 1 to 3 \(the model has 4 layers\)"
    with pytest.raises(ValueError, match=message):
        LanguageModel(model, num_layers_unfrozen=k)
    with pytest.raises(ValueError, match=message):
        freeze_trunk(model, k)
    assert all(p.requires_grad for p in model.parameters()), "nothing was changed"


def test_a_model_without_a_list_of_layers_is_refused():
    model = tiny_model("llama", layers=LAYERS)
    model.config.num_hidden_layers = 5
    with pytest.raises(ValueError, match=r"num_layers_unfrozen: found no list of 5 layers"):
        LanguageModel(model, num_layers_unfrozen=1)


@torch.no_grad()
def test_top_layers_may_read_embeddings_of_the_tokens():
    """As those of Gemma 4 do, and those of Zamba."""
    model = tiny_model("llama", layers=LAYERS)
    embedded = []
    model.model.embed_tokens.register_forward_hook(lambda *args: embedded.append(args[-1]))
    layer_list(model.model)[3].register_forward_hook(lambda *args: args[-1] + embedded[-1])
    lm = LanguageModel(model, num_layers_unfrozen=2)
    real = batch().response_mask
    expected = lm.forward(batch()).states[real]
    found = lm.forward(batch(), lm.compute_trunk_states(batch())).states[real]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", ["bloom", "openai-gpt"])  # return a tuple and a list
def test_layers_may_return_more_than_states(family):
    """A Split that has computed no trunk states, as a critic's, gives what the whole body does."""
    sizes = {"n_layer": LAYERS, "n_head": 4, "vocab_size": 307, "hidden_size": 64}
    torch.manual_seed(0)
    body = AutoModel.from_config(AutoConfig.for_model(family, **sizes)).eval()
    padded = Split(body, 2).compute_trunk_states(batch())
    trunk_states = TrunkStates.pack(padded, batch(), whole=True)
    passes = passes_of(body, Split(body, 2), compute_dtype=None, padding_free=False)
    found, expected = (passes.states(batch(), x, last=True).padded() for x in (trunk_states, None))
    real = batch().attention_mask.bool()
    assert torch.equal(found[real], expected[real])


def test_a_top_that_reads_what_the_trunk_computes_is_refused():
    """As that of Gemma 3n, whose top layers take keys and values of lower ones."""
    model = tiny_model("llama", layers=LAYERS)
    computed = {}
    first, last = layer_list(model.model)[0], layer_list(model.model)[3]
    first.mlp.register_forward_hook(lambda *args: computed.update(states=args[-1]))
    last.register_forward_hook(lambda *args: args[-1] + computed.pop("states", 0.0))
    with pytest.raises(ValueError, match="cannot be split into a trunk and a top"):
        LanguageModel(model, num_layers_unfrozen=2)


def test_a_top_that_fails_without_the_trunk_is_refused():
    """As that of Gemma 4 with shared keys, which looks for those of a lower layer by name."""
    model = tiny_model("llama", layers=LAYERS)
    computed = {}
    first, last = layer_list(model.model)[0], layer_list(model.model)[3]
    first.mlp.register_forward_hook(lambda *args: computed.update(states=args[-1]))
    last.register_forward_hook(lambda *args: args[-1] + 0.0 * computed.pop("states"))
    with pytest.raises(ValueError, match=r"cannot be split into a trunk and a top.*KeyError"):
        LanguageModel(model, num_layers_unfrozen=2)


def test_states_of_another_shape_are_refused():
    """XLNet's layers take them transposed."""
    sizes = {"n_layer": LAYERS, "n_head": 4, "d_model": 64, "d_inner": 96, "vocab_size": 307}
    config = AutoConfig.for_model("xlnet", attn_type="uni", **sizes)
    model = AutoModelForCausalLM.from_config(config).eval()
    message = r"its layers take states \[5, 3, 64\] for tokens \[3, 5\]"
    with pytest.raises(ValueError, match=message):
        LanguageModel(model, num_layers_unfrozen=2)


def test_weights_that_the_trunk_shares_with_the_top_are_refused():
    model = tiny_model("llama", layers=LAYERS)
    layers = layer_list(model.model)
    layers[3].mlp = layers[1].mlp
    with pytest.raises(ValueError, match=r"share weights \(1\.mlp\.gate_proj\.weight\)"):
        freeze_trunk(model, 1)
    assert all(p.requires_grad for p in model.parameters()), "nothing was changed"
    freeze_trunk(model, 3)  # both are trained
