"""Critics: users' modules, the value head, the baseline, and which tokens a value depends on."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from tiny_models import FAMILIES, tiny_classifier, tiny_config, tiny_model
from torch import nn
from transformers import AutoModelForTokenClassification

from ppo_fast.critics.critic import HeadCritic, ModelCritic
from ppo_fast.data.tokens import Tokens, make_tokens
from ppo_fast.models.heads import ValueHead, ValueModel
from ppo_fast.models.language_model import LanguageModel

PROMPTS = [[5, 6, 7], [4], [3, 2], [8, 9, 1]]
RESPONSES = [[2, 0], [1, 2, 3, 0], [7], [6, 6, 6]]
PROMPT_LENGTHS = [3, 1, 2, 3]
LENGTHS = [5, 5, 3, 6]
EXTENT = torch.tensor([len(r) for r in RESPONSES])
BEYOND = torch.arange(4) >= EXTENT[:, None]

# The ways in which a module may return a tensor.
WRAPPINGS = {
    "plain": lambda x: x,
    "last dimension 1": lambda x: x.unsqueeze(-1),
    "tuple": lambda x: (x, "more"),
    "list": lambda x: [x],
    "logits": lambda x: SimpleNamespace(logits=x),
    "logits, last dimension 1": lambda x: SimpleNamespace(logits=x.unsqueeze(-1)),
}
each_wrapping = pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS.keys())


def tokens(responses: list[list[int]] = RESPONSES) -> Tokens:
    return make_tokens(PROMPTS, responses, 0, torch.device("cpu"))


class Module(nn.Module):
    """A user's value module without support for padding.

    It returns cumulative sums of token weights (one value per token) or the sum over the sequence
    (one value per sequence), and records its inputs.
    """

    def __init__(self, wrap=lambda x: x, *, per_token: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(10.0))
        self.wrap, self.per_token = wrap, per_token
        self.calls: list[tuple[list[list[int]], torch.Tensor]] = []

    def forward(self, input_ids, attention_mask):
        self.calls.append((input_ids.tolist(), attention_mask))
        sums = self.weight[input_ids].cumsum(dim=1)
        return self.wrap(sums if self.per_token else sums[:, -1])


def critic_of(module: nn.Module, max_tokens: int = 1000) -> ModelCritic:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        critic = ModelCritic(module, max_tokens=max_tokens)
    if isinstance(module, Module):
        module.calls.clear()  # the calls at construction
    return critic


@each_wrapping
def test_a_value_per_token_is_read_before_each_response_token(wrap):
    values = critic_of(Module(wrap, per_token=True)).values(tokens())
    # sums of 5 + 6 + 7, then + 2; of 4, then + 1, + 2, + 3; of 3 + 2; of 8 + 9 + 1, then + 6, + 6
    assert values.tolist() == [[18, 20, 0, 0], [4, 5, 7, 10], [5, 0, 0, 0], [18, 24, 30, 0]]


@each_wrapping
def test_a_value_per_sequence_is_that_of_the_prompt_for_every_token(wrap):
    values = critic_of(Module(wrap, per_token=False)).values(tokens())
    assert values.tolist() == [[18, 18, 0, 0], [4, 4, 4, 4], [5, 0, 0, 0], [18, 18, 18, 0]]


def rows_of(module: Module) -> list[list[int]]:
    return sorted(row for rows, _ in module.calls for row in rows)


def test_a_value_per_sequence_depends_on_the_prompt_only():
    module = Module(per_token=False)
    critic_of(module).values(tokens())
    assert rows_of(module) == sorted(PROMPTS)


def test_a_value_per_sequence_warns_once():
    with pytest.warns(UserWarning, match="one value per sequence: it is called on the prompt"):
        critic = ModelCritic(Module(per_token=False), max_tokens=1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            critic.values(tokens())
        ModelCritic(Module(per_token=True), max_tokens=1000)


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("max_tokens", [1, 10, 1000])
def test_a_users_module_gets_rows_of_equal_length_without_padding(per_token, max_tokens):
    module = Module(per_token=per_token)
    critic_of(module, max_tokens).values(tokens())
    whole = [p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    assert rows_of(module) == sorted(whole if per_token else PROMPTS)
    for rows, mask in module.calls:
        assert mask.shape == (len(rows), len(rows[0]))
        assert (mask == 1).all()
        assert mask.dtype == torch.int64
        assert len(rows) == 1 or len(rows) * len(rows[0]) <= max_tokens
    if max_tokens == 1000:
        lengths = [len(rows[0]) for rows, _ in module.calls]
        assert sorted(lengths) == sorted(set(LENGTHS if per_token else PROMPT_LENGTHS))


class Changing(Module):
    def forward(self, input_ids, attention_mask):
        self.per_token = input_ids.shape[1] != 6
        return super().forward(input_ids, attention_mask)


def test_a_module_that_mixes_values_per_token_and_per_sequence_is_refused():
    critic = critic_of(Changing(per_token=True))
    with pytest.raises(ValueError, match="value_model: returned one value per token in one call"):
        critic.values(tokens())


@pytest.mark.parametrize(
    ("wrap", "error", "message"),
    [
        (lambda x: torch.stack([x, x], dim=-1), ValueError, r"returned shape \[2, 3, 2\]"),
        (lambda x: x.sum(), ValueError, r"returned shape \[\] for input_ids \[2, 3\]; expected"),
        (lambda x: x[:1], ValueError, r"returned shape \[1, 3\] for input_ids \[2, 3\]"),
        (lambda x: "18", TypeError, r"returned str, expected a tensor"),
    ],
)
def test_another_output_is_refused(wrap, error, message):
    with pytest.raises(error, match=f"value_model.*{message}"):
        ModelCritic(Module(wrap, per_token=True), max_tokens=1000)


def test_an_error_of_the_module_is_chained():
    original = KeyError("inside")

    def fail(x):
        raise original

    with pytest.raises(RuntimeError, match="value_model raised KeyError: 'inside'") as caught:
        ModelCritic(Module(fail, per_token=True), max_tokens=1000)
    assert caught.value.__cause__ is original


@pytest.mark.parametrize("per_token", [True, False])
def test_gradients_reach_a_users_module(per_token):
    module = Module(per_token=per_token)
    critic_of(module).values(tokens()).sum().backward()
    expected = torch.zeros(10)
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        for t in range(len(response)):
            for token in prompt + (response[:t] if per_token else []):
                expected[token] += 1
    assert torch.equal(module.weight.grad, expected)


# Models that take padding


def language_model_values(kind: str, family: str) -> nn.Module:
    if kind == "ValueModel":
        return ValueModel(tiny_model(family), 64).eval()
    config = tiny_config(family, pad_token_id=1)
    config.num_labels = 1
    return AutoModelForTokenClassification.from_config(config).eval()


VALUE_MODELS = [("ValueModel", family) for family in FAMILIES] + [
    ("token classifier", family) for family in ("gpt2", "qwen2")
]
each_value_model = pytest.mark.parametrize(("kind", "family"), VALUE_MODELS)


@each_value_model
@torch.no_grad()
def test_models_on_padded_batches_equal_their_rows_alone(kind, family):
    model = language_model_values(kind, family)
    calls = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    critic = critic_of(model)
    calls.clear()
    values = critic.values(tokens())
    assert calls == [(4, 6)], "one batch of all lengths"
    for b, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        output = model(input_ids=torch.tensor([prompt + response]))
        alone = getattr(output, "logits", output).reshape(-1)
        n = len(response)
        before = slice(len(prompt) - 1, len(prompt) - 1 + n)
        torch.testing.assert_close(values[b, :n], alone[before], rtol=1e-4, atol=1e-4)


def values_by(kind: str, batch: Tokens) -> torch.Tensor:
    if kind == "head":
        head = ValueHead(64)
        with torch.no_grad():
            head.linear.weight.copy_(torch.linspace(-1, 1, 64)[None])
        states = LanguageModel(tiny_model("llama")).forward(batch).states
        return HeadCritic(head).values(batch, states)
    torch.manual_seed(0)
    modules = {
        "value model": lambda: ValueModel(tiny_model("llama"), 64).eval(),
        "user, per token": lambda: Module(per_token=True),
        "user, per sequence": lambda: Module(per_token=False),
        "classifier": lambda: tiny_classifier("llama"),
    }
    return critic_of(modules[kind]()).values(batch)


KINDS = ["value model", "user, per token", "user, per sequence", "classifier", "head"]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_value_does_not_depend_on_its_token_or_later_ones(kind):
    values = values_by(kind, tokens())
    for t in range(4):
        changed = [[*r[:t], *(9 - token for token in r[t:])] for r in RESPONSES]
        other = values_by(kind, tokens(changed))
        torch.testing.assert_close(values[:, : t + 1], other[:, : t + 1], rtol=0, atol=1e-5)
        if "per sequence" not in kind and kind != "classifier":
            later = ~BEYOND[:, t + 1 :]
            assert ((values - other)[:, t + 1 :][later].abs() > 1e-4).all()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_values_are_zero_beyond_a_response(kind):
    values = values_by(kind, tokens())
    assert values.shape == (4, 4)
    assert (values[BEYOND] == 0).all()
    assert (values[~BEYOND] != 0).all()


@pytest.mark.parametrize("kind", ["value model", "classifier"])
def test_gradients_reach_a_model(kind):
    model = ValueModel(tiny_model("llama"), 64) if kind == "value model" else tiny_classifier()
    critic_of(model).values(tokens()).sum().backward()
    unused = {"base_model.lm_head.weight"}  # the language model's own head
    for name, p in model.named_parameters():
        assert name in unused or p.grad.abs().sum() > 0, name


# The value head


def test_a_value_head_starts_at_zero():
    head = ValueHead(64)
    assert (head(torch.randn(3, 4, 64)) == 0).all()


def test_a_value_head_is_linear_in_the_states():
    head = ValueHead(3)
    with torch.no_grad():
        head.linear.weight.copy_(torch.tensor([[1.0, -2.0, 0.5]]))
        head.linear.bias.fill_(0.25)
    states = torch.tensor([4.0, 1.0, 2.0]).expand(4, 4, 3).clone().requires_grad_()
    values = HeadCritic(head).values(tokens(), states)
    assert values.tolist() == [[0.0 if beyond else 3.25 for beyond in row] for row in BEYOND]
    values.sum().backward()
    assert head.linear.bias.grad.item() == 10, "the valid tokens"
    assert (states.grad[~BEYOND] == torch.tensor([1.0, -2.0, 0.5])).all()
    assert (states.grad[BEYOND] == 0).all()


def test_a_value_head_takes_states_of_lower_precision():
    assert ValueHead(3)(torch.randn(2, 3, dtype=torch.bfloat16)).dtype == torch.float32


def test_a_value_head_without_states_is_an_error():
    with pytest.raises(ValueError, match="needs the policy's states"):
        HeadCritic(ValueHead(3)).values(tokens())


def test_which_critics_read_states():
    assert HeadCritic(ValueHead(3)).reads_states
    assert not critic_of(Module(per_token=True)).reads_states
