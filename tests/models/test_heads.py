"""ValueModel, RewardModel and disable_dropout."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES, MAX_POSITIONS, VOCAB_SIZE, tiny_config, tiny_model, tiny_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM

from ppo_fast.models.heads import RewardModel, ValueModel
from ppo_fast.models.setup import disable_dropout

HIDDEN = 64
SEQUENCES = [[5, 61, 7, 300, 12, 8], [44], [3, 2, 91, 250]]


def padded(side: str, pad_id: int, extra: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, SEQUENCES)) + extra
    ids, mask = torch.full((len(SEQUENCES), width), pad_id), torch.zeros(len(SEQUENCES), width)
    for b, row in enumerate(SEQUENCES):
        place = slice(width - len(row), None) if side == "left" else slice(0, len(row))
        ids[b, place], mask[b, place] = torch.tensor(row), 1
    return ids, mask.long()


def scorer(kind: type[nn.Module], family: str = "llama") -> nn.Module:
    return kind(tiny_model(family), hidden_size=HIDDEN).eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad_id", [0, 77])
@torch.no_grad()
def test_value_model_is_the_same_under_any_padding(family, side, pad_id):
    model = scorer(ValueModel, family)
    ids, mask = padded(side, pad_id)
    values = model(ids, mask)
    assert values.shape == ids.shape
    for row, value, real in zip(SEQUENCES, values, mask.bool(), strict=True):
        alone = model(torch.tensor([row]))[0]
        torch.testing.assert_close(value[real], alone, rtol=1e-4, atol=1e-4)
        if len(row) > 1:
            assert alone.std() > 1e-3, "values differ from token to token"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad_id", [0, 77])
@torch.no_grad()
def test_reward_model_is_the_same_under_any_padding(family, side, pad_id):
    model = scorer(RewardModel, family)
    ids, mask = padded(side, pad_id)
    scores = model(ids, mask)
    assert scores.shape == (3,)
    alone = torch.cat([model(torch.tensor([row])) for row in SEQUENCES])
    torch.testing.assert_close(scores, alone, rtol=1e-4, atol=1e-4)
    assert alone.std() > 1e-3


@torch.no_grad()
def test_reward_model_reads_its_head_at_the_last_real_token():
    model = scorer(RewardModel)
    reads: list[torch.Tensor] = []
    model.reward_head.register_forward_pre_hook(lambda _, args: reads.append(args[0]))
    for row in SEQUENCES:
        model(torch.tensor([row]))
        states = model.base_model.model(torch.tensor([row])).last_hidden_state
        torch.testing.assert_close(reads.pop(), states[:, -1])


@torch.no_grad()
def test_reward_model_reads_a_last_token_that_is_the_pad_id():
    """A response ends with EOS and is padded with EOS: the score is read at the first EOS."""
    model = scorer(RewardModel)
    ended, cut = torch.tensor([[5, 61, 7, 0]]), torch.tensor([[5, 61, 7]])
    expected = model(ended)
    assert (expected - model(cut)).abs() > 1e-3
    ids, mask = torch.tensor([[5, 61, 7, 0, 0, 0]]), torch.tensor([[1, 1, 1, 1, 0, 0]])
    torch.testing.assert_close(model(ids, mask), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "head"), [(ValueModel, "value_head"), (RewardModel, "reward_head")]
)
def test_architecture_and_names_are_the_specs(kind, head):
    base = tiny_model("gpt2")
    model = kind(base, HIDDEN)
    layers = list(getattr(model, head))
    assert [type(layer) for layer in layers] == [nn.Linear, nn.ReLU, nn.Dropout, nn.Linear]
    assert (layers[0].in_features, layers[0].out_features) == (HIDDEN, 256)
    assert (layers[3].in_features, layers[3].out_features) == (256, 1)
    assert layers[2].p == 0.1
    names = {f"{head}.{i}.{name}" for i in (0, 3) for name in ("weight", "bias")}
    assert set(model.state_dict()) == names | {f"base_model.{name}" for name in base.state_dict()}


@torch.no_grad()
def test_value_model_equals_the_specs_computation():
    """The value is the head of hidden_states[-1]."""
    for family in FAMILIES:
        model = scorer(ValueModel, family)
        ids = torch.tensor([SEQUENCES[0]])
        states = model.base_model(ids, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(model(ids), model.value_head(states).squeeze(-1))


@torch.no_grad()
def test_a_bare_body_serves_as_well_as_the_whole_model():
    whole = tiny_model("llama")
    ids = torch.tensor([SEQUENCES[0]])
    model = ValueModel(whole, HIDDEN).eval()
    bare = ValueModel(whole.model, HIDDEN).eval()
    bare.value_head = model.value_head
    assert torch.equal(bare(ids), model(ids))


@torch.no_grad()
def test_no_mask_means_no_padding():
    model = scorer(ValueModel)
    ids = torch.tensor([SEQUENCES[0]])
    assert torch.equal(model(ids), model(ids, torch.ones_like(ids)))


@torch.no_grad()
def test_a_value_does_not_see_later_tokens():
    model = scorer(ValueModel)
    ids = torch.tensor([SEQUENCES[0]])
    changed = ids.clone()
    changed[0, 3] = 9
    before, after = model(ids)[0], model(changed)[0]
    assert torch.equal(before[:3], after[:3])
    assert (before[3:] - after[3:]).abs().min() > 1e-5


@pytest.mark.parametrize("kind", [ValueModel, RewardModel])
def test_a_wrong_hidden_size_is_refused_with_the_right_one(kind):
    with pytest.raises(ValueError, match=r"hidden_size: got 768.*has 64.*hidden_size=64"):
        kind(tiny_model("gpt2"))


def noisy_model(family: str) -> nn.Module:
    """Return a model with all dropout probabilities of its family set to one half."""
    config = tiny_config(family)
    names = [name for name in vars(config) if "drop" in name and "classifier" not in name]
    names += [name for name in vars(config) if name.endswith("pdrop")]
    for name in names:
        setattr(config, name, 0.5)
    return AutoModelForCausalLM.from_config(config).train()


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2 eager"])
def test_disable_dropout_in_train_mode(family):
    """GPT-2 has dropout modules; the attention of the others has the probability as a float."""
    model = noisy_model(family.split()[0])
    if family == "gpt2 eager":
        model.set_attn_implementation("eager")
    ids = torch.arange(40).view(2, 20) % VOCAB_SIZE

    def twice() -> list[torch.Tensor]:
        return [model(ids).logits for _ in range(2)]

    first, second = twice()
    assert not torch.equal(first, second), "there is a dropout to switch off"
    disable_dropout(model)
    assert model.training
    first, second = twice()
    assert torch.equal(first, second)
    torch.testing.assert_close(first, model.eval()(ids).logits)


def test_disable_dropout_leaves_other_numbers_alone():
    model = ValueModel(tiny_model("llama"), HIDDEN)
    eps = model.base_model.model.norm.variance_epsilon
    disable_dropout(model)
    assert model.value_head[2].p == 0.0
    assert model.base_model.model.norm.variance_epsilon == eps
    assert model.base_model.config.max_position_embeddings == MAX_POSITIONS


@torch.no_grad()
def test_get_rewards_scores_texts():
    model, tokenizer = scorer(RewardModel).train(), tiny_tokenizer()
    assert model.hidden_size == HIDDEN
    prompts, responses = ["The film", "She thought", "x" * 90], [" was over", " so", " of it"]
    found = model.get_rewards(prompts, responses, tokenizer, "cpu", max_length=40)
    assert model.training, "the mode comes back"
    model.eval()
    for prompt, response, score in zip(prompts, responses, found, strict=True):
        ids = torch.tensor(tokenizer(prompt + response)["input_ids"])[None, -40:]
        torch.testing.assert_close(score, model(ids)[0], rtol=1e-5, atol=1e-5)
    assert not found.requires_grad


@torch.no_grad()
def test_get_rewards_keeps_bos_of_texts_that_are_cut():
    """As ClassifierReward does."""
    model, tokenizer = scorer(RewardModel), tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<|pad|>"})
    for append_eos, end in ((False, []), (True, [0])):
        model.append_eos = append_eos
        found = model.get_rewards(["<|pad|>" + "x" * 60], [" of it"], tokenizer, "cpu", 12)
        ids = [*tokenizer("<|pad|>" + "x" * 60 + " of it")["input_ids"], *end]
        assert ids[0] == tokenizer.bos_token_id
        expected = model(torch.tensor([[ids[0], *ids[-11:]]]))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    whole = model.get_rewards(["<|pad|>a"], ["b"], tokenizer, "cpu", 4)
    ids = torch.tensor([[*tokenizer("<|pad|>ab")["input_ids"], 0]])
    torch.testing.assert_close(whole, model(ids), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="max_length: got 0, expected a whole number of at"):
        model.get_rewards(["a"], ["b"], tokenizer, "cpu", 0)
