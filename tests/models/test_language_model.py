"""LanguageModel: log-probs on the fused and the ordinary path, decoding steps."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_batch import PROMPTS, RESPONSES, batch
from tiny_models import FAMILIES, VOCAB_SIZE, tiny_config, tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from ppo_fast.data.tokens import position_ids
from ppo_fast.models.language_model import LanguageModel
from ppo_fast.models.parts import body_of

LAYERS = 4

each_family = pytest.mark.parametrize("family", FAMILIES)


def exact_logits(model: nn.Module) -> list[torch.Tensor]:
    """Return the model's own logits [L, V] in float64, each row alone and without padding."""
    double = copy.deepcopy(model).double()
    rows = [p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    with torch.no_grad():
        return [double(torch.tensor([row])).logits[0] for row in rows]


def exact_logprobs(model: nn.Module, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (log-probs, entropies) [B, T] in float64."""
    logprobs, entropy = torch.zeros(3, 5).double(), torch.zeros(3, 5).double()
    for b, logits in enumerate(exact_logits(model)):
        before, response = len(PROMPTS[b]) - 1, torch.tensor(RESPONSES[b])
        table = (logits[before:-1] / temperature).log_softmax(dim=-1)
        logprobs[b, : len(response)] = table[torch.arange(len(response)), response]
        entropy[b, : len(response)] = -(table.exp() * table).sum(dim=-1)
    return logprobs, entropy


def assert_gives_the_models_numbers(lm: LanguageModel, temperature: float = 0.7) -> None:
    with torch.no_grad():
        found = lm.logprobs(lm.forward(batch()), batch(), temperature=temperature, entropy=True)
    logprobs, entropy = exact_logprobs(lm.model, temperature)
    torch.testing.assert_close(found.logprobs.double(), logprobs, rtol=0, atol=2e-5)
    torch.testing.assert_close(found.entropy.double(), entropy, rtol=0, atol=2e-5)


# Log-probs


@each_family
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_fused_logprobs_are_the_models(family, temperature):
    lm = LanguageModel(tiny_model(family))
    assert lm.fused, lm.reason
    assert lm.forward(batch()).logits is None
    assert_gives_the_models_numbers(lm, temperature)


@each_family
def test_ordinary_logprobs_are_the_models(family):
    model = tiny_model(family)
    model.get_output_embeddings().register_forward_hook(lambda *_: None)
    lm = LanguageModel(model)
    assert not lm.fused
    assert_gives_the_models_numbers(lm)


@each_family
def test_both_paths_have_the_same_gradients(family):
    fused, ordinary = (LanguageModel(tiny_model(family)) for _ in range(2))
    ordinary.fused = False
    coefficients = torch.randn(3, 5)
    for lm in (fused, ordinary):
        result = lm.logprobs(lm.forward(batch()), batch(), temperature=0.7, entropy=True)
        (coefficients * (result.logprobs + 0.3 * result.entropy)).sum().backward()
    for (name, p), q in zip(
        fused.model.named_parameters(), ordinary.model.parameters(), strict=True
    ):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-4, msg=name)


@each_family
@pytest.mark.parametrize("fused", [True, False])
def test_pad_ids_do_not_change_log_probs(family, fused):
    lm = LanguageModel(tiny_model(family))
    lm.fused = fused
    with torch.no_grad():
        one, other = (
            lm.logprobs(lm.forward(batch(pad)), batch(pad), temperature=1.0, entropy=True)
            for pad in (0, 305)
        )
    assert torch.equal(one.logprobs, other.logprobs)
    assert torch.equal(one.entropy, other.entropy)
    assert (one.logprobs[~batch().response_mask] == 0).all()


def test_states_are_those_before_each_response_token():
    lm = LanguageModel(tiny_model("llama"))
    with torch.no_grad():
        states = lm.forward(batch()).states
        alone = lm.body(torch.tensor([PROMPTS[2] + RESPONSES[2]])).last_hidden_state[0]
    assert states.shape == (3, 5, 64)
    torch.testing.assert_close(states[2, :3], alone[2:5], rtol=1e-4, atol=1e-4)


def test_float64_and_bfloat16_heads_are_told_from_scaled_ones():
    for dtype in (torch.float64, torch.bfloat16):
        assert LanguageModel(tiny_model("llama").to(dtype)).fused
        assert not LanguageModel(scaled_by_its_forward(tiny_model("llama").to(dtype), 1.1)).fused


def test_a_head_with_a_bias_is_fused():
    model = tiny_model("llama")
    head = nn.Linear(64, VOCAB_SIZE)
    nn.init.normal_(head.bias)
    model.set_output_embeddings(head)
    lm = LanguageModel(model)
    assert lm.fused, lm.reason
    assert_gives_the_models_numbers(lm)


# Heads that are not hidden @ weight.T


class ScaledLinear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 1.5 * super().forward(x)


def wrapped_head(model: nn.Module) -> nn.Module:
    head = ScaledLinear(64, VOCAB_SIZE, bias=False)
    head.load_state_dict(model.lm_head.state_dict())
    model.set_output_embeddings(head)
    return model


def hooked_head(model: nn.Module) -> nn.Module:
    model.lm_head.register_forward_hook(lambda module, args, output: 1.5 * output)
    return model


def hooked_before_its_head(model: nn.Module) -> nn.Module:
    model.lm_head.register_forward_pre_hook(lambda module, args: (1.5 * args[0],))
    return model


def head_with_a_replaced_forward(model: nn.Module) -> nn.Module:
    weight = model.lm_head.weight
    model.lm_head.forward = lambda x: nn.functional.linear(x, weight) + 0.5 * x[..., :1].tanh()
    return model


def scaled_by_its_forward(model: nn.Module, scale: float = 1.5) -> nn.Module:
    forward = model.forward

    def scaled(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits * scale
        return output

    model.forward = scaled
    return model


def scaled_by_its_family(model: nn.Module) -> nn.Module:
    """Return a Granite model, which divides its logits by a field of its config."""
    config = AutoConfig.for_model(
        "granite",
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=131,
        initializer_range=0.15,
        logits_scaling=3.0,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def test_logits_scaled_by_a_familys_config_are_fused():
    lm = LanguageModel(scaled_by_its_family(tiny_model("llama")))
    assert lm.fused
    assert lm.logit_scale == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (wrapped_head, "ScaledLinear"),
        (hooked_head, "hooks"),
        (hooked_before_its_head, "hooks"),
        (head_with_a_replaced_forward, "differ from the logits"),
        (scaled_by_its_forward, "differ from the logits"),
    ],
)
def test_with_an_unusual_head_the_models_own_logits_are_used(change, reason):
    model = change(tiny_model("llama"))
    lm = LanguageModel(model)
    assert not lm.fused
    assert reason in lm.reason
    with torch.no_grad():
        forward = lm.forward(batch())
        found = lm.logprobs(forward, batch(), temperature=0.7).logprobs
        expected = batch().before_response(model(batch().input_ids).logits)
    table = (expected.double() / 0.7).log_softmax(dim=-1)
    by_hand = table.gather(-1, batch().response_ids[..., None])[..., 0]
    torch.testing.assert_close(found.double(), by_hand * batch().response_mask, rtol=0, atol=1e-5)
    assert forward.states is not None, "a value head still has states to read"
    assert_step_is_the_full_forward(lm)


class Wrapper(nn.Module):
    """Wraps a causal LM without a base_model, or with the whole LM as its base_model."""

    def __init__(self, inner: nn.Module, *, shows_its_body: bool) -> None:
        super().__init__()
        self.inner, self.config = inner, inner.config
        if shows_its_body:
            self.base_model = inner
            self.get_output_embeddings = inner.get_output_embeddings
            self.get_input_embeddings = inner.get_input_embeddings

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize(
    ("shows_its_body", "reason"), [(False, "no base_model"), (True, "no last_hidden_state")]
)
def test_a_model_without_a_separate_body_gives_logits_without_states(shows_its_body, reason):
    model = Wrapper(tiny_model("llama"), shows_its_body=shows_its_body)
    lm = LanguageModel(model)
    assert not lm.fused
    assert reason in lm.reason
    assert lm.forward(batch()).states is None
    assert_gives_the_models_numbers(lm)
    assert_step_is_the_full_forward(lm)


def test_a_body_that_the_class_does_not_name_is_found():
    """Classes of Llama 4 say that their base_model is language_model, and have it as model."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 48, "intermediate_size_mlp": 48}
    sizes |= {"vocab_size": 307, "num_local_experts": 2, "pad_token_id": None}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama4_text", **sizes)).eval()
    assert body_of(model) is body_of(model.model) is model.model
    lm = LanguageModel(model, num_layers_unfrozen=1)
    with torch.no_grad():
        expected = batch().before_response(model(batch().input_ids).logits)
        states = lm.forward(batch()).states
    real = batch().response_mask
    torch.testing.assert_close(model.lm_head(states)[real], expected[real], rtol=0, atol=1e-5)


@each_family
def test_passes_are_causal_without_a_mask(family, monkeypatch):
    """Flash attention, and grouped queries without copies, need a causal pass without a mask."""
    masks = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def noting(*args, attn_mask=None, is_causal=False, **kwargs):
        masks.append((attn_mask, is_causal))
        return attention(*args, attn_mask=attn_mask, is_causal=is_causal, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noting)
    lm = LanguageModel(tiny_model(family, layers=3), num_layers_unfrozen=1)
    masks.clear()  # at construction, prompts that several responses share are masked
    lm.forward(batch(), lm.compute_trunk_states(batch()))
    assert set(masks) <= {(None, True)}
    assert len(masks) > 0 or family == "gemma2", "which has no SDPA: it caps scores"


# Decoding steps


def assert_step_is_the_full_forward(lm: LanguageModel, prompt: int = 4) -> None:
    """Compare steps with a cache, after left-padded prompts, with one pass over all tokens."""
    rows = torch.arange(1, 31).view(3, 10) * 7 % VOCAB_SIZE
    mask = (torch.arange(10) >= torch.tensor([[0], [3], [1]])).long()
    positions = position_ids(mask)
    with torch.no_grad():
        full = lm.model(input_ids=rows, attention_mask=mask, position_ids=positions).logits
    cache = DynamicCache(config=lm.model.config)
    start = 0
    for end in range(prompt, 11):
        logits, states = lm.next(
            input_ids=rows[:, start:end],
            attention_mask=mask[:, :end],
            position_ids=positions[:, start:end],
            cache=cache,
        )
        assert (states is not None) == lm.fused
        assert logits.shape == (3, VOCAB_SIZE)
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, full[:, end - 1].float(), rtol=1e-4, atol=1e-4)
        start = end


@each_family
@pytest.mark.parametrize("fused", [True, False])
def test_step_with_a_cache_is_the_full_forward(family, fused):
    lm = LanguageModel(tiny_model(family))
    lm.fused = fused
    assert_step_is_the_full_forward(lm)


@pytest.mark.parametrize("prompt", [4, 7])
def test_step_with_a_sliding_window(prompt):
    """Layers of Gemma 2 see the last 5 tokens only; the prompt is shorter or longer than that."""
    config = tiny_config("gemma2")
    config.sliding_window = 5
    assert_step_is_the_full_forward(
        LanguageModel(AutoModelForCausalLM.from_config(config).eval()), prompt
    )


def test_a_body_that_does_not_name_its_embeddings_is_read():
    """The decoder of BART stands in a wrapper."""
    sizes = {"d_model": 16, "decoder_layers": 2, "decoder_attention_heads": 2, "vocab_size": 31}
    config = AutoConfig.for_model("bart", **sizes, decoder_ffn_dim=24, is_decoder=True)
    config.is_encoder_decoder = False
    lm = LanguageModel(AutoModelForCausalLM.from_config(config).eval())
    assert lm.fused
    assert lm.vocab_size == 31
