"""Prompts as ids, special tokens of tokenizers, and the texts of what was sampled."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from bos_tokenizer import sentencepiece_like
from tiny_models import EOS_ID, PAD_ID, tiny_tokenizer
from tiny_trainer import PROMPTS, tiny_trainer

from ppo_fast.data.examples import as_examples
from ppo_fast.data.prompts import encode_prompts
from ppo_fast.data.rollout import Rollout
from ppo_fast.rollout.texts import Texts


def completions(prompt_ids, response_ids, *, skip_special_tokens=True):
    model = SimpleNamespace(generation_config=None)
    texts = Texts(model, sentencepiece_like(), skip_special_tokens=skip_special_tokens)
    return texts.decode(Rollout.from_tokens(prompt_ids, response_ids)).completions


def test_a_response_is_decoded_as_it_continues_its_prompt():
    assert sentencepiece_like().decode([4, 5]) == "film was", "alone, it lacks the space"
    assert completions([[0, 3]], [[4, 5, 1]]) == [" film was"]
    assert completions([[0, 3], [3, 4]], [[6], [8, 9, 1]]) == ["n't", "good"]


def test_special_tokens_are_left_out_or_kept():
    row = [[0, 3]], [[2, 4, 2, 1]]
    assert completions(*row) == [" film"]
    (kept,) = completions(*row, skip_special_tokens=False)
    assert kept.replace(" ", "") == "<think>film<think>"
    (unfinished,) = completions([[0, 3]], [[4, 2]], skip_special_tokens=False)
    assert unfinished.endswith("<think>")


def test_the_trainer_keeps_special_tokens_where_asked():
    own = Rollout.from_tokens([[70]], [[PAD_ID, 71, 72, EOS_ID]])
    found = {}
    for skip in (True, False):
        trainer = tiny_trainer(critic="baseline", skip_special_tokens=skip)
        (found[skip],) = trainer.texts.decode(own).completions
    assert found[False] == trainer.tokenizer.pad_token + found[True]


def ids_of(tokenizer, *prompts):
    return [prompt.ids for prompt in encode_prompts(tokenizer, prompts)]


def test_one_bos_and_no_eos():
    tokenizer = sentencepiece_like()
    plain = [0, *tokenizer("the", add_special_tokens=False)["input_ids"]]
    assert ids_of(tokenizer, "the", "<s>the")[0] == plain
    assert [ids.count(0) for ids in ids_of(tokenizer, "the", "<s>the")] == [1, 1]
    assert all(ids[-1] != 1 for ids in ids_of(tokenizer, "the", "<s>the"))
    assert ids_of(tokenizer, "<s><s>the")[0].count(0) == 3, "as it was written"
    assert ids_of(tokenizer, "the</s>")[0][-1] == 1, "as it was written"
    assert ids_of(sentencepiece_like("$A"), "the")[0] == plain[1:]


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor, lambda row: [*map(np.int64, row)]])
def test_prompts_as_token_ids(kind):
    by_text, by_ids = tiny_trainer(), tiny_trainer()
    ids = [kind(row) for row in tiny_tokenizer()(PROMPTS)["input_ids"]]
    expected = by_text.train_step(PROMPTS)
    found = by_ids.train_step(ids)
    assert found["mean_reward"] == expected["mean_reward"]
    assert found["policy_loss"] == expected["policy_loss"]
    assert by_ids.last_rollout.prompts == PROMPTS
    result = by_ids.train(ids, num_steps=1, batch_size=2, progress=False)
    assert len(result["training_history"]["mean_rewards"]) == 1


@pytest.mark.parametrize(
    ("prompts", "error", "match"),
    [
        ([[5, 6], [3, 307]], ValueError, r"prompts\[1\]: holds the id 307, .* 0 to 306"),
        ([[5, -1]], ValueError, "holds the id -1"),
        ([[5], []], ValueError, r"prompts\[1\]: .* is empty"),
        ([[5.0]], TypeError, r"prompts\[0\]: got list, expected a string, a list of ids, a chat"),
        ([[True]], TypeError, r"prompts\[0\]: got list"),
        ([{"text": "a"}], ValueError, r'prompts\[0\] has no "prompt"; it has the columns text'),
        (itertools.cycle(PROMPTS), TypeError, "itertools.cycle, which has no end; pass the list"),
    ],
)
def test_bad_prompts(prompts, error, match):
    trainer = tiny_trainer(critic="baseline")
    with pytest.raises(error, match=match):
        trainer.rollout(prompts)


def test_prompts_come_back_as_a_list():
    assert [example.prompt for example in as_examples(iter(["a", (1, 2)]))] == ["a", [1, 2]]


def rollout_of(sampled, **options):
    lengths = zip(sampled.tokens.prompt_lengths, sampled.tokens.response_lengths, strict=True)
    pairs = list(zip(sampled.tokens.sequences(), lengths, strict=True))
    return Rollout.from_tokens(
        [ids[:n].tolist() for ids, (n, _) in pairs],
        [ids[n:].tolist() for ids, (n, _) in pairs],
        **options,
    )


@pytest.mark.parametrize("known", [True, False])
def test_a_rollout_of_ones_own_tokens(known):
    trainer = tiny_trainer(temperature=0.7)
    sampled = trainer.rollout(PROMPTS)
    lengths = sampled.tokens.response_lengths.tolist()
    logprobs = [row[:n].tolist() for row, n in zip(sampled.logprobs, lengths, strict=True)]
    own = rollout_of(sampled, temperature=0.7, logprobs=logprobs if known else None)
    expected, found = trainer.make_experience(sampled), trainer.make_experience(own)
    assert torch.equal(found.scores, expected.scores), "texts are decoded from the tokens"
    torch.testing.assert_close(found.old_logprobs, expected.old_logprobs)
    torch.testing.assert_close(found.advantages, expected.advantages, rtol=1e-4, atol=1e-4)
    assert trainer.update(found)["first_max_log_ratio"] < 1e-5
    given = trainer.make_experience(own, scores=[1.0] * len(PROMPTS))
    assert given.scores.tolist() == [1.0] * len(PROMPTS)
    with pytest.raises(ValueError, match=r"scores: got shape \[1\], expected \[5\]"):
        trainer.make_experience(own, scores=[1.0])


def test_a_rollout_of_wrong_tokens():
    for arguments, match in (
        (([[1]], [[2], [3]]), "response_ids: got 2 lists of lengths .* expected 1"),
        (([[1], []], [[2], [3]]), "prompt_ids: .* none of them empty"),
    ):
        with pytest.raises(ValueError, match=match):
            Rollout.from_tokens(*arguments)
    for few in ({"logprobs": [[-1.0]]}, {"finished": [True]}):
        (name,) = few
        with pytest.raises(ValueError, match=f"{name}: got 1 entries, expected 2"):
            Rollout.from_tokens([[1], [2]], [[2], [3]], **few)
    arrays = Rollout.from_tokens(
        [np.array([1, 2])], [np.array([3])], logprobs=[np.array([-0.5])], finished=np.array([True])
    )
    assert arrays.logprobs.tolist() == [[-0.5]]
    with pytest.raises(ValueError, match=r"rollout: holds ids from 1 to 500, expected 0 to 306"):
        tiny_trainer().make_experience(Rollout.from_tokens([[1]], [[500]]), [1.0])
    meta = Rollout.from_tokens([[1]], [[5]], device="meta")
    with pytest.raises(ValueError, match=r"tokens are on meta, .*device='cpu'"):
        tiny_trainer().make_experience(meta, [1.0])
    with pytest.raises(ValueError, match=r"logprobs\[0\]: got 1 numbers for 2 tokens"):
        Rollout.from_tokens([[1]], [[2, 3]], logprobs=[[-0.5]])
    assert Rollout.from_tokens([[1]], [[2, EOS_ID]], finished=[False]).finished.tolist() == [False]


@pytest.mark.parametrize(
    ("seeds", "error", "match"),
    [
        (torch.arange(4), ValueError, r"seeds: got shape \[4\], expected \[5\]"),
        (torch.zeros(5), TypeError, "seeds: got torch.float32, expected an int64 tensor"),
        ([1] * 5, TypeError, "seeds: got list"),
    ],
)
def test_bad_seeds(seeds, error, match):
    with pytest.raises(error, match=match):
        tiny_trainer(critic="baseline").rollout(PROMPTS, seeds=seeds)


def test_a_prompt_of_several_samples_is_tokenised_once(monkeypatch):
    trainer, seen = tiny_trainer(critic="baseline"), []
    encode = trainer.texts.encode

    def noting(prompts, *arguments, **options):
        seen.append([example.prompt for example in prompts])
        return encode(prompts, *arguments, **options)

    monkeypatch.setattr(trainer.texts, "encode", noting)
    rollout = trainer.rollout(PROMPTS[:2], samples_per_prompt=3)
    assert seen == [PROMPTS[:2]]
    assert rollout.prompts == [text for text in PROMPTS[:2] for _ in range(3)]
