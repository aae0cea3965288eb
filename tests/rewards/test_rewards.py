"""Scores from functions, modules and classifiers, and what is refused."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_models import EOS_ID, PAD_ID, tiny_classifier, tiny_config, tiny_model
from tiny_trainer import PROMPTS as MORE_PROMPTS
from tiny_trainer import tiny_trainer
from torch import nn
from transformers import AutoModelForSequenceClassification

from ppo_fast.data.tokens import Tokens, make_tokens
from ppo_fast.models.heads import RewardModel
from ppo_fast.rewards.score import check_reward_model, check_scores, score

PROMPTS = ["The film", "She", "Nothing in this room"]
COMPLETIONS = [" was over", " thought the phone would last", " was"]
PROMPT_IDS = [[5, 6, 7], [4], [3, 2]]
# The first ends with EOS; the third is as long as the first.
RESPONSE_IDS = [[12, EOS_ID], [11, 2, 30, 9, 8, 7], [7, 8, 4]]


def tokens(pad_id: int = PAD_ID) -> Tokens:
    return make_tokens(PROMPT_IDS, RESPONSE_IDS, pad_id, torch.device("cpu"))


def scores_of(reward_model, *, pad_id: int = PAD_ID, max_tokens: int = 1000) -> torch.Tensor:
    found = score(reward_model, tokens(pad_id), PROMPTS, COMPLETIONS, max_tokens=max_tokens)
    return found.total


# Functions


def test_a_function_is_given_the_texts():
    def lengths(prompts: list[str], completions: list[str]) -> list[int]:
        assert (prompts, completions) == (PROMPTS, COMPLETIONS)
        prompts.clear()  # its own list
        return [len(c) for c in completions]

    scores = scores_of(lengths)
    assert scores.tolist() == [9.0, 29.0, 4.0]
    assert scores.dtype == torch.float32
    assert len(PROMPTS) == 3


@pytest.mark.parametrize(
    "values",
    [
        (1, 2.5, -3),
        np.array([1, 2.5, -3]),
        torch.tensor([1, 2.5, -3], dtype=torch.float64, requires_grad=True),
        [torch.tensor(1.0), torch.tensor([2.5]), np.float32(-3)],
    ],
    ids=["tuple", "array", "tensor", "list of scalars"],
)
def test_numbers_of_any_type_are_accepted(values):
    scores = scores_of(lambda prompts, completions: values)
    assert scores.tolist() == [1.0, 2.5, -3.0]
    assert scores.dtype == torch.float32
    assert not scores.requires_grad


def constant(values):
    def rate(prompts, completions):
        return values

    return rate


@pytest.mark.parametrize(
    "values", [[1.0, 2.0], [1.0] * 4, [], torch.zeros(2), torch.zeros(3, 1), torch.tensor(1.0)]
)
def test_a_wrong_count_or_shape_is_refused(values):
    with pytest.raises(ValueError, match=r"reward_model rate: got shape \[.*expected \[3\]"):
        scores_of(constant(values))


@pytest.mark.parametrize("values", [None, 1.0, ["good", "bad", "good"], "abc"])
def test_what_is_not_numbers_is_refused(values):
    with pytest.raises(TypeError, match=r"reward_model rate: expected a list of numbers"):
        scores_of(constant(values))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_refused_with_its_prompt(bad):
    for values in ([1.0, bad, 2.0], torch.tensor([1.0, bad, 2.0])):
        with pytest.raises(ValueError, match=rf"reward_model rate: got {bad} for the prompt 'She'"):
            scores_of(constant(values))
    module = Sums()
    module.weight.data[11] = bad  # a token of the second response only
    with pytest.raises(ValueError, match=rf"reward_model Sums: got {bad} for the prompt 'She'"):
        scores_of(module)


def test_an_error_of_the_function_is_chained():
    original = ZeroDivisionError("no words")

    def rate(prompts, completions):
        raise original

    with pytest.raises(
        RuntimeError, match="reward_model rate raised ZeroDivisionError: no words"
    ) as caught:
        scores_of(rate)
    assert caught.value.__cause__ is original


# Modules


class Sums(nn.Module):
    """A user's reward module: the sum of token weights plus 100 times the last token's weight."""

    def __init__(self, wrap=lambda x: x) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(40.0))
        self.wrap = wrap
        self.calls: list[tuple[list[list[int]], torch.Tensor]] = []

    def forward(self, input_ids, attention_mask):
        self.calls.append((input_ids.tolist(), attention_mask))
        return self.wrap(self.weight[input_ids].sum(dim=1) + 100 * self.weight[input_ids[:, -1]])


EXPECTED = [30.0, 71.0 + 700.0, 24.0 + 400.0]

WRAPPINGS = {
    "[B]": lambda x: x,
    "[B, 1]": lambda x: x[:, None],
    "tuple": lambda x: (x, None),
    "logits": lambda x: SimpleNamespace(logits=x[:, None]),
    "half": lambda x: (x / 8).bfloat16() * 8,
}


@pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS.keys())
def test_a_module_scores_whole_sequences(wrap):
    scores = scores_of(Sums(wrap))
    tolerance = 1e-2 if wrap is WRAPPINGS["half"] else 0
    torch.testing.assert_close(scores, torch.tensor(EXPECTED), rtol=tolerance, atol=0)
    assert scores.dtype == torch.float32
    assert not scores.requires_grad


@pytest.mark.parametrize("max_tokens", [1, 5, 1000])
def test_a_module_gets_rows_of_equal_length_without_padding(max_tokens):
    module = Sums()
    assert scores_of(module, max_tokens=max_tokens).tolist() == EXPECTED
    rows = sorted(row for call, _ in module.calls for row in call)
    assert rows == sorted(p + r for p, r in zip(PROMPT_IDS, RESPONSE_IDS, strict=True))
    for call, mask in module.calls:
        assert mask.shape == (len(call), len(call[0]))
        assert (mask == 1).all()
    assert len(module.calls) == (3 if max_tokens < 10 else 2), "two rows have the same length"


@pytest.mark.parametrize(
    ("wrap", "error", "message"),
    [
        (lambda x: x.expand(2, len(x)).T, ValueError, r"returned shape \[2, 2\] for input_ids"),
        (lambda x: x.sum(), ValueError, r"returned shape \[\]"),
        (lambda x: x[:0], ValueError, r"returned shape \[0\]"),
        (lambda x: None, TypeError, r"returned NoneType, expected a tensor"),
    ],
    ids=["two labels", "one number", "none", "None"],
)
def test_another_output_of_a_module_is_refused(wrap, error, message):
    with pytest.raises(error, match=f"reward_model Sums {message}"):
        scores_of(Sums(wrap))


def test_a_module_may_score_tokens():
    class PerToken(Sums):
        def forward(self, input_ids, attention_mask):
            return self.weight[input_ids]

    module, rows = PerToken(), tokens(PAD_ID)
    expected = torch.where(rows.response_mask, module.weight[rows.response_ids], 0.0)
    assert torch.equal(scores_of(module), expected)


def test_an_error_of_a_module_is_chained():
    original = IndexError("beyond")

    def fail(x):
        raise original

    with pytest.raises(RuntimeError, match="reward_model Sums raised IndexError: beyond") as caught:
        scores_of(Sums(fail))
    assert caught.value.__cause__ is original


def test_reward_model_scores_a_padded_batch_as_rows_alone():
    model = RewardModel(tiny_model("gpt2"), 64).eval()
    with torch.no_grad():
        alone = torch.cat([model(row[None]) for row in tokens().sequences()])
    for pad_id in (PAD_ID, EOS_ID, 44):
        torch.testing.assert_close(scores_of(model, pad_id=pad_id), alone, rtol=1e-4, atol=1e-4)


# Classifiers


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "gpt_neox"])
@pytest.mark.parametrize("pad_id", [PAD_ID, EOS_ID], ids=["pad", "pad is eos"])
@torch.no_grad()
def test_a_classifier_scores_a_padded_batch_as_rows_alone(family, pad_id):
    model = tiny_classifier(family, pad_token_id=pad_id)
    alone = torch.cat([model(row[None]).logits[:, 0] for row in tokens(pad_id).sequences()])
    calls = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    scores = scores_of(model, pad_id=pad_id)
    assert calls == [(3, 7)], "one batch of all lengths"
    torch.testing.assert_close(scores, alone, rtol=1e-4, atol=1e-4)
    assert scores.std() > 1e-2
    torch.testing.assert_close(
        scores_of(model, pad_id=pad_id, max_tokens=1), alone, rtol=0, atol=1e-4
    )


def test_a_classifier_is_padded_with_its_own_pad_id():
    """A classifier finds the last token by its own config's pad id, not the policy tokenizer's."""
    model = tiny_classifier("gpt2", pad_token_id=9)
    other = tokens(pad_id=44)
    expected = score(model, tokens(pad_id=9), PROMPTS, COMPLETIONS, max_tokens=1000).total
    found = score(model, other, PROMPTS, COMPLETIONS, max_tokens=1000).total
    assert torch.equal(found, expected)


def test_two_labels_are_refused_before_any_model_runs():
    config = tiny_config("gpt2", pad_token_id=PAD_ID)
    config.num_labels = 2
    model = AutoModelForSequenceClassification.from_config(config)
    message = "reward_model: GPT2ForSequenceClassification has num_labels=2, expected 1"
    with pytest.raises(ValueError, match=rf"{message}.*ClassifierReward\(.*label=\.\.\.\)"):
        check_reward_model(model)


@pytest.mark.parametrize("thing", [None, 1.0, "helpful", [1.0]])
def test_what_cannot_be_called_is_refused(thing):
    with pytest.raises(
        TypeError, match=r"reward_model: got .*expected a torch.nn.Module.*function"
    ):
        check_reward_model(thing)


def test_what_can_be_called_is_accepted():
    for good in (constant([1.0]), Sums(), tiny_classifier("gpt2"), print):
        check_reward_model(good)


def test_check_scores_names_what_it_checks():
    assert check_scores([1, 2], ["a", "b"]).tolist() == [1.0, 2.0]
    with pytest.raises(ValueError, match=r"^scores: got shape \[1\], expected \[2\]"):
        check_scores([1], ["a", "b"])


def test_sparse_scores_are_scores():
    assert check_scores(torch.tensor([0.0, 2.0]).to_sparse(), ["a", "b"]).tolist() == [0.0, 2.0]


@pytest.mark.parametrize(
    ("values", "error", "match"),
    [
        ([1j, 2.0, 3.0], TypeError, "got 1j"),
        ([np.complex64(2), 2.0, 3.0], TypeError, r"got np.complex64"),
        (torch.ones(3, dtype=torch.complex64), TypeError, "got torch.complex64 on cpu"),
        (["1.5", 2.0, 3.0], TypeError, "got '1.5'"),
        (torch.ones(3, device="meta"), TypeError, "on meta, expected real numbers"),
        ([torch.ones((), device="meta")] * 3, TypeError, "expected a list of numbers"),
        ([10**400, 1, 2], TypeError, "expected a list of numbers"),
        ([1e20, 0.0, 0.0], ValueError, "expected at most 1e\\+15 in size"),
        ([1e300, 0.0, 0.0], ValueError, "got inf"),
    ],
)
def test_scores_that_are_no_real_numbers(values, error, match):
    with pytest.raises(error, match=match):
        check_scores(values, PROMPTS)


@pytest.mark.parametrize("size", [1e15, -1e15])
def test_scores_as_large_as_allowed_give_finite_metrics(size):
    trainer = tiny_trainer(lambda prompts, completions: [size] + [0.0] * (len(prompts) - 1))
    metrics = trainer.train_step(MORE_PROMPTS)
    assert all(math.isfinite(value) for value in metrics.values()), metrics


@pytest.mark.parametrize("error", [SystemExit(3), ZeroDivisionError("oh")])
def test_an_error_of_a_reward_names_the_line(error):
    def broken(prompts, completions):
        raise error

    words = rf"reward_model broken raised {type(error).__name__}: .* \(.*test_rewards.py:\d+\)"
    with pytest.raises(RuntimeError, match=words):
        scores_of(broken)
