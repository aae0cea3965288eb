"""Packed passes: without padding and with a shared prompt once, they give what padded ones do."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tiny_models import FAMILIES, tiny_config, tiny_model
from tiny_trainer import tiny_trainer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from ppo_fast import RewardModel, ValueModel
from ppo_fast.critics.critic import ModelCritic
from ppo_fast.data.batches import in_batches
from ppo_fast.data.tokens import Tokens, make_tokens
from ppo_fast.models import packed_attention, precision
from ppo_fast.models.language_model import LanguageModel
from ppo_fast.models.packed_attention import PackedPass, by_blocks, padded, varlen
from ppo_fast.models.parts import body_of, layer_list
from ppo_fast.models.passes import SWITCHED_OFF, head_passes
from ppo_fast.models.setup import disable_dropout, enable_gradient_checkpointing
from ppo_fast.models.trunk import run
from ppo_fast.rewards.score import score

CPU = torch.device("cpu")
PACKING = tuple(family for family in FAMILIES if family != "gemma2")


def tokens() -> Tokens:
    """Five sequences of three prompts, of different lengths; one response has one token."""
    generator = torch.Generator().manual_seed(1)

    def ids(count: int) -> list[int]:
        return torch.randint(2, 300, (count,), generator=generator).tolist()

    a, b, c = ids(9), ids(4), ids(13)
    return make_tokens([a, b, a, c, a], [ids(n) for n in (5, 7, 1, 3, 8)], 1, CPU)


def both(model: nn.Module, **options) -> tuple[LanguageModel, LanguageModel]:
    one = LanguageModel(model, **options)
    assert one.packed, one.passes.why_padded
    other = LanguageModel(model, padding_free=False, **options)
    assert not other.packed
    assert other.passes.why_padded == SWITCHED_OFF
    return one, other


def logprobs_and_gradients(lm: LanguageModel, **options) -> tuple[Tensor, dict[str, Tensor]]:
    lm.model.zero_grad()
    found = lm.logprobs(lm.forward(tokens(), **options), tokens(), temperature=0.7, entropy=True)
    coefficients = torch.arange(1.0, 1 + found.logprobs.numel()).view_as(found.logprobs)
    (coefficients * (found.logprobs + 0.3 * found.entropy)).sum().backward()
    gradients = {n: p.grad.clone() for n, p in lm.model.named_parameters() if p.grad is not None}
    return found.logprobs.detach(), gradients


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_packed_pass_reads_no_value_on_the_host(family):
    """Reading one of the meta device raises."""
    model = tiny_model(family).to("meta")
    body, on_meta = body_of(model), tokens().to(torch.device("meta"))
    states = run(body, on_meta, packed=PackedPass(on_meta, body.config)).last_hidden_state
    assert states.shape == (1, len(on_meta.packing), 64)


def assert_same(found, expected, tolerance: float) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=tolerance)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        close = tolerance * float(gradient.abs().max())
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=close, msg=name)


# Models held in float64 compute their RMS norms and rotary tables in float32.
@pytest.mark.parametrize(
    ("family", "tolerance"),
    [("gpt2", 1e-12), ("gpt_neox", 1e-12), ("llama", 1e-5), ("qwen2", 1e-5), ("cohere", 1e-5)],
)
def test_log_probs_and_gradients_are_those_of_padded_passes(family, tolerance):
    one, other = both(tiny_model(family).double())
    assert_same(logprobs_and_gradients(one), logprobs_and_gradients(other), tolerance)


@pytest.mark.parametrize("family", PACKING)
def test_log_probs_are_those_of_each_sequence_alone(family):
    model = tiny_model(family)
    lm, _ = both(model)
    with torch.no_grad():
        found = lm.logprobs(lm.forward(tokens()), tokens(), temperature=1.0).logprobs
        for row, (ids, p) in enumerate(
            zip(tokens().sequences(), tokens().prompt_lengths.tolist(), strict=True)
        ):
            table = model(ids[None]).logits[0].log_softmax(-1)[p - 1 : -1]
            expected = table.gather(1, ids[p:, None])[:, 0]
            torch.testing.assert_close(found[row, : len(expected)], expected, rtol=0, atol=2e-5)


def test_linear_layers_see_no_padding_and_a_shared_prompt_once():
    model = tiny_model("llama")
    lm, _ = both(model)
    seen = []
    layer = layer_list(lm.body)[0]
    layer.mlp.up_proj.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[:2]))
    lm.forward(tokens())
    assert seen == [(1, 9 + 4 + 0 + 7 + 4 + 6 + 13 + 2)], "nothing needs a last token's state"


def test_only_states_before_response_tokens_get_a_gradient():
    """What stands where a padded row's end would be is another sequence's."""
    lm, _ = both(tiny_model("llama"))
    t = tokens().select(torch.tensor([0, 1]))
    forward = lm.forward(t)
    assert forward.states.shape[1] == 7
    alone = lm.forward(tokens().select(torch.tensor([0])))
    torch.testing.assert_close(forward.states[0, :5], alone.states[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [3, 6, 11])
def test_a_sliding_window_reaches_into_the_prompt(window):
    config = AutoConfig.for_model(
        "mistral",
        vocab_size=307,
        hidden_size=64,
        num_hidden_layers=2,
        head_dim=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        sliding_window=window,
    )
    torch.manual_seed(0)
    one, other = both(AutoModelForCausalLM.from_config(config).eval())
    assert_same(logprobs_and_gradients(one), logprobs_and_gradients(other), 1e-4)


@pytest.mark.parametrize("family", PACKING)
def test_passes_from_the_trunk(family):
    one, other = both(tiny_model(family, layers=3), num_layers_unfrozen=1)
    with torch.no_grad():
        trunk, padded_trunk = (lm.compute_trunk_states(tokens()) for lm in (one, other))
    assert len(trunk.states) == len(tokens().packing)
    torch.testing.assert_close(trunk.states, padded_trunk.states, rtol=1e-4, atol=1e-5)
    found = logprobs_and_gradients(one, trunk_states=padded_trunk)
    assert_same(found, logprobs_and_gradients(other, trunk_states=trunk), 1e-4)
    whole = one.logprobs(one.forward(tokens()), tokens(), temperature=0.7).logprobs
    torch.testing.assert_close(found[0], whole, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradient_checkpointing_computes_the_same_attention_again(family):
    model = tiny_model(family)
    one, other = both(model)
    expected = logprobs_and_gradients(other)
    disable_dropout(model)
    enable_gradient_checkpointing(model, "policy_model")
    model.train()
    assert one.packed
    assert_same(logprobs_and_gradients(one), expected, 1e-4)


def test_dropout_of_attention_is_refused():
    model = tiny_model("gpt2")
    one, _ = both(model)
    model.train()
    with pytest.raises(NotImplementedError, match="no dropout"):
        one.forward(tokens())


def test_gradient_checkpointing_that_the_user_enabled_is_padded():
    """It would compute attention again without knowing the sequences."""
    model = tiny_model("llama")
    one, other = both(model)
    expected = logprobs_and_gradients(other)
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    assert one.packed, "in eval mode nothing is computed again"
    model.train()
    assert not one.packed
    assert_same(logprobs_and_gradients(one), expected, 1e-4)


def test_a_compiled_model_is_padded():
    model = tiny_model("llama")
    one, _ = both(model)
    layer_list(one.body)[1].compile()
    assert not one.packed
    assert "compiled" in LanguageModel(model).passes.why_padded


def mixing(model: nn.Module) -> nn.Module:
    """Let a layer add the mean of the tokens before each, as a recurrent layer carries a state."""
    layer_list(model.base_model)[0].register_forward_hook(
        lambda _, __, out: out + 0.1 * out.cumsum(1) / torch.arange(1, 1 + out.shape[1])[:, None]
    )
    return model


def eager_alone(model: nn.Module) -> nn.Module:
    """Let a layer's attention be computed by code of its own."""
    attention = layer_list(model.base_model)[1].self_attn
    attention.config = copy.deepcopy(attention.config)
    return model


@pytest.mark.parametrize(
    ("change", "reason"), [(mixing, "packed states differ"), (eager_alone, "1 of 2 layers")]
)
def test_models_that_cannot_be_packed_are_padded(change, reason):
    lm = LanguageModel(change(tiny_model("llama")))
    assert not lm.packed
    assert reason in lm.passes.why_padded
    other = LanguageModel(lm.model, padding_free=False)
    assert_same(logprobs_and_gradients(lm), logprobs_and_gradients(other), 0.0)


@pytest.mark.parametrize("family", ["gemma2", "bloom"])
def test_families_that_are_padded(family):
    """Gemma 2 caps attention's scores; BLOOM takes no positions."""
    if family == "gemma2":
        config = tiny_config("gemma2")
    else:
        config = AutoConfig.for_model(family, n_layer=2, n_head=4, vocab_size=307, hidden_size=64)
    lm = LanguageModel(AutoModelForCausalLM.from_config(config).eval())
    assert not lm.packed
    assert lm.forward(tokens()).states is not None


def test_attention_is_set_back_after_an_error():
    model = tiny_model("llama")
    lm, _ = both(model)
    before = model.config._attn_implementation
    handle = lm.body.norm.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lm.forward(tokens())
    handle.remove()
    assert model.config._attn_implementation == before
    assert packed_attention.current() is None


# The three ways to compute attention


def slow_varlen(q, k, v, queries, keys, scaling, window):
    """Attention of rows of different lengths by its definition."""
    outs, q_end, k_end = [], 0, 0
    lengths = (rows.ends.diff().tolist() for rows in (queries, keys))
    for n, m in zip(*lengths, strict=True):
        q_end, k_end = q_end + n, k_end + m
        at = torch.arange(m - n, m)[:, None] - torch.arange(m)
        mask = (at >= 0) & (at < window) if window else at >= 0
        group = q.shape[1] // k.shape[1]
        x, y = (z[k_end - m : k_end].repeat_interleave(group, 1).transpose(0, 1) for z in (k, v))
        out = F.scaled_dot_product_attention(
            q[q_end - n : q_end].transpose(0, 1), x, y, attn_mask=mask, scale=scaling
        )
        outs.append(out.transpose(0, 1))
    return torch.cat(outs)


@pytest.mark.parametrize("window", [0, 3, 12])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_the_ways_to_compute_attention_agree(window, kv_heads, monkeypatch):
    monkeypatch.setattr(packed_attention, "varlen_attention", lambda: slow_varlen)
    packed_pass = PackedPass(tokens(), None)
    count = len(tokens().packing)
    q, k, v = (torch.randn(1, h, count, 8, dtype=torch.float64) for h in (4, kv_heads, kv_heads))
    expected = by_blocks(packed_pass, q, k, v, 0.3, window)
    assert expected.shape == (1, count, 4, 8)
    for way in (varlen, padded):
        torch.testing.assert_close(way(packed_pass, q, k, v, 0.3, window), expected)


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_attention_in_half_precision_is_in_float32_on_the_cpu(weights, monkeypatch):
    """Under autocast too, where rotated queries and keys are in float32, and values are not."""
    dtypes, own = set(), F.scaled_dot_product_attention

    def watched(query, key, value, **options):
        dtypes.update(x.dtype for x in (query, key, value, own(query, key, value, **options)))
        return own(query, key, value, **options)

    raw = tiny_model()
    model = (
        LanguageModel(raw, compute_dtype=torch.bfloat16)
        if weights == "float32"
        else LanguageModel(raw.bfloat16())
    )
    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    assert model.packed
    model.forward(tokens())
    assert dtypes == {torch.float32}


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_attention_on_a_gpu_is_in_the_dtype_of_autocast(autocast, monkeypatch):
    monkeypatch.setattr(packed_attention, "autocast_dtype", lambda device: autocast)
    query = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32, is_cuda=True)
    dtype = autocast or torch.float32
    assert packed_attention._dtypes(query) == (dtype, dtype)


def test_a_deep_model_in_bfloat16_is_judged_by_float32(monkeypatch):
    """Rounding adds up over layers: packed and padded passes differ by more than the tolerance."""
    raw = tiny_model("llama", layers=24).bfloat16()
    assert LanguageModel(raw).packed
    monkeypatch.setattr(precision, "EXACT_BYTES", 2**10)
    too_large = LanguageModel(raw)
    assert not too_large.packed
    assert too_large.passes.why_padded.startswith("packed states differ by")


def test_what_is_wrong_is_not_taken_for_rounding(monkeypatch):
    """Beside rounding to bfloat16 the mistake is small; in float32 it shows."""
    own = packed_attention.by_blocks
    monkeypatch.setattr(packed_attention, "by_blocks", lambda *given: 1.002 * own(*given))
    assert not LanguageModel(tiny_model("llama", layers=24).bfloat16()).packed


# Value and reward models, batches, whole steps


@pytest.mark.parametrize("critic", ["head", "model", "top"])
def test_a_step_is_the_same_with_padding(critic):
    """Three samples of each prompt: the same step, from the same rollout."""
    weights, metrics = [], []
    for padding_free in (True, False):
        options = {"critic": critic, "padding_free": padding_free, "samples_per_prompt": 3}
        options |= {"num_minibatches": 2, "microbatch_tokens": 40, "max_length": 6}
        if critic == "top":
            options["num_layers_unfrozen"] = 1
        trainer = tiny_trainer(**options)
        assert trainer.policy.packed == trainer.critic.packed == padding_free or critic == "head"
        metrics.append(trainer.train_step(["Once upon a time", "The", "One two three"]))
        weights.append([p.detach() for p in trainer.policy.model.parameters()])
    for name, value in metrics[1].items():
        if not name.startswith(("time/", "perf/", "memory")):
            assert metrics[0][name] == pytest.approx(value, rel=1e-3, abs=2e-5), name
    for one, other in zip(*weights, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5)


def test_values_and_scores_are_those_of_the_modules_called():
    torch.manual_seed(3)
    value, reward = ValueModel(tiny_model(), 64).eval(), RewardModel(tiny_model(), 64).eval()
    critic = ModelCritic(value, max_tokens=1000)
    assert critic.packed
    with torch.no_grad():
        found = critic.values(tokens())
        for row, (ids, p) in enumerate(
            zip(tokens().sequences(), tokens().prompt_lengths.tolist(), strict=True)
        ):
            expected = value(ids[None])[0, p - 1 : -1]
            torch.testing.assert_close(found[row, : len(expected)], expected, rtol=0, atol=1e-5)
            assert (found[row, len(expected) :] == 0).all()
        scores = torch.stack([reward(ids[None])[0] for ids in tokens().sequences()])
    passes = head_passes(reward)
    assert passes.packed
    texts = ["a"] * 5
    for most in (1000, 20):
        of_passes = score(reward, tokens(), texts, texts, max_tokens=most, passes=passes).total
        torch.testing.assert_close(of_passes, scores, rtol=0, atol=1e-5)


def test_a_head_whose_forward_was_changed_is_called():
    """As accelerate does, whose forward enters autocast."""
    value = ValueModel(tiny_model(), 64).eval()
    own = value.forward
    value.forward = lambda *args, **kwargs: 2 * own(*args, **kwargs)
    critic = ModelCritic(value, max_tokens=1000)
    assert not critic.packed
    with torch.no_grad():
        doubled = critic.values(tokens())
        del value.forward
        plain = ModelCritic(value, max_tokens=1000).values(tokens())
    torch.testing.assert_close(doubled, 2 * plain, rtol=1e-4, atol=1e-5)


def test_packed_batches_give_each_row_its_numbers():
    lm, other = both(tiny_model("gpt2"))

    def compute(model: LanguageModel):
        return lambda part, _: model.logprobs(model.forward(part), part, temperature=1.0).logprobs

    with torch.no_grad():
        expected = in_batches(compute(other), tokens(), None, 1000)
        for most in (1, 15, 30, 1000):
            found = in_batches(compute(lm), tokens(), None, most, packed=True)
            torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
