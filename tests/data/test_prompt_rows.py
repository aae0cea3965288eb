"""Examples: rows, chats and streams of prompts."""

from __future__ import annotations

import pytest
from bos_tokenizer import sentencepiece_like
from tiny_models import tiny_tokenizer
from tiny_trainer import PROMPTS, no_model_runs, one_line, tiny_trainer

from ppo_fast.data.examples import Example, Stream, as_examples
from ppo_fast.data.prompts import cut_left, encode_prompts

datasets = pytest.importorskip("datasets")

ROWS = [{"prompt": text, "answer": str(i), "extra": None} for i, text in enumerate(PROMPTS)]
CHAT = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Where?"}]
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% if not loop.last %};{% endif %}{% endfor %}"
    "{% if add_generation_prompt %};[assistant]{% endif %}{{ mood }}"
)


def chatting(template=TEMPLATE):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# Rows


def test_other_columns_stay_with_their_prompt():
    examples = as_examples(ROWS)
    assert [e.prompt for e in examples] == PROMPTS
    assert examples[3].columns == {"answer": "3", "extra": None}


@pytest.mark.parametrize("kind", ["rows", "dataset", "generator", "examples", "mixed"])
def test_rows_of_many_kinds(kind):
    given = {
        "rows": ROWS,
        "dataset": datasets.Dataset.from_list(ROWS),
        "generator": (row for row in ROWS),
        "examples": [Example(row["prompt"], {"answer": row["answer"]}) for row in ROWS],
        "mixed": [*ROWS[:4], PROMPTS[4]],
    }[kind]
    examples = as_examples(given)
    assert [e.prompt for e in examples] == PROMPTS
    assert [e.columns.get("answer") for e in examples[:4]] == list("0123")


@pytest.mark.parametrize(
    ("row", "error", "match"),
    [
        (
            {"text": "a", "n": 1},
            ValueError,
            r'prompts\[0\] has no "prompt"; it has the columns tex',
        ),
        ({"prompt": None}, ValueError, r'has no "prompt"'),
        ({"prompt": {"a": 1}}, TypeError, 'its "prompt" is a mapping'),
        ({"prompt": 3.5}, TypeError, r'its "prompt": got float'),
        ([{"content": "a"}], ValueError, r'prompts\[0\]\[0\]: a message needs a "role"'),
        ([{"role": "user"}], ValueError, r'prompts\[0\]\[0\]: its "content" is a NoneType'),
        ([{"role": "user", "content": [{"type": "image"}]}], ValueError, '"content" is a list'),
        (
            {"messages": [*CHAT, {"role": "assistant", "content": "There."}]},
            ValueError,
            'its "messages" end with one of the assistant',
        ),
    ],
)
def test_rows_that_are_not_complete(row, error, match):
    trainer = tiny_trainer(critic="baseline")
    with no_model_runs(), pytest.raises(error, match=match) as caught:
        trainer.rollout([row])
    assert one_line(caught)


# Chats


def test_a_chat_becomes_a_text_by_the_template():
    tokenizer = chatting()
    (found,) = encode_prompts(tokenizer, [CHAT])
    assert found.text == "[system]Be short.;[user]Where?;[assistant]"
    assert found.ids == ids(tokenizer, found.text)


def test_a_chat_gets_no_special_tokens_but_those_of_its_template():
    """A tokenizer that puts BOS first would put a second one."""
    tokenizer = sentencepiece_like()
    tokenizer.chat_template = "<s>{{ messages[0].content }}"
    (found,) = encode_prompts(tokenizer, [[{"role": "user", "content": "the"}]])
    assert found.ids == [0, *ids(tokenizer, "the")]
    tokenizer.chat_template = "{{ messages[0].content }}"
    (found,) = encode_prompts(tokenizer, [[{"role": "user", "content": "the"}]])
    assert found.ids == ids(tokenizer, "the")


def test_a_message_of_the_assistant_at_the_end_is_continued():
    (found,) = encode_prompts(chatting(), [[*CHAT, {"role": "assistant", "content": "There"}]])
    assert found.text == "[system]Be short.;[user]Where?;[assistant]There"


def test_columns_reach_the_template():
    row = {"prompt": CHAT, "chat_template_kwargs": {"mood": "!"}}
    (found,) = encode_prompts(chatting(), [row])
    assert found.text.endswith("[assistant]!")


def test_texts_ids_and_chats_keep_their_order():
    tokenizer = chatting()
    found = encode_prompts(tokenizer, ["the", CHAT, [5, 6], "train", CHAT])
    assert [p.text is None for p in found] == [False, False, True, False, False]
    assert found[0].ids == ids(tokenizer, "the")
    assert found[2].ids == [5, 6]
    assert found[3].ids == ids(tokenizer, "train")
    assert found[1] == found[4]


@pytest.mark.parametrize(
    ("template", "match"),
    [
        (None, r"prompts\[1\]: is a chat, and the tokenizer has no chat template; set"),
        ("{{ raise_exception('roles must alternate') }}", "refuses it .*roles must alternate"),
        ("{{ messages[9].content.x }}", "chat template refuses it"),
    ],
)
def test_chats_without_a_template_or_against_it(template, match):
    trainer = tiny_trainer(critic="baseline")
    trainer.tokenizer.chat_template = template
    with no_model_runs(), pytest.raises(ValueError, match=match) as caught:
        trainer.train([[*ids(trainer.tokenizer, "the")], CHAT], num_steps=1, progress=False)
    assert one_line(caught)


def test_a_rollout_knows_columns_and_messages():
    trainer = tiny_trainer(critic="baseline", samples_per_prompt=2)
    trainer.tokenizer.chat_template = TEMPLATE
    rollout = trainer.rollout([{"messages": CHAT, "answer": 4}, "She thought"])
    assert rollout.columns == {"answer": [4, 4, None, None]}
    assert rollout.prompts[0] == "[system]Be short.;[user]Where?;[assistant]"
    first, third = rollout.messages[0], rollout.messages[2]
    assert first == [*CHAT, {"role": "assistant", "content": rollout.completions[0]}]
    assert third[0] == {"role": "user", "content": "She thought"}
    goes_on = trainer.rollout([[*CHAT, {"role": "assistant", "content": "It"}]])
    assert goes_on.messages[0][-1]["content"] == "It" + goes_on.completions[0]
    assert trainer.compute_rewards([CHAT], [rollout.completions[0]]).shape[0] == 1


# Long prompts

LONG = "There were three songs that the band had never played there before. " * 3


def test_long_prompts_are_refused_by_default():
    trainer = tiny_trainer(critic="baseline", max_prompt_length=12)
    with no_model_runs(), pytest.raises(ValueError, match=r"max_prompt_length=12.*'cut' or 'drop'"):
        trainer.train(["She", LONG], num_steps=1, progress=False)


def test_long_prompts_are_dropped_and_counted(caplog):
    trainer = tiny_trainer(critic="baseline", max_prompt_length=12, long_prompts="drop")
    trainer.train(["She", LONG, "There", LONG], num_steps=2, batch_size=4, progress=False)
    assert "2 of 4 prompts are too long and dropped" in caplog.text
    assert set(trainer.last_rollout.prompts) == {"She", "There"}
    with pytest.raises(ValueError, match="all 1 are too long; see max_prompt_length"):
        trainer.train([LONG], num_steps=1, progress=False)


def test_long_prompts_lose_their_beginning(caplog):
    trainer = tiny_trainer(critic="baseline", max_prompt_length=12, long_prompts="cut")
    rollout = trainer.rollout(["She", LONG])
    whole = ids(trainer.tokenizer, LONG)
    tokens = rollout.tokens
    assert tokens.prompt_lengths.tolist() == [len(ids(trainer.tokenizer, "She")), 12]
    assert tokens.prompt_ids[1, -12:].tolist() == whole[-12:]
    assert rollout.prompts[1] == trainer.tokenizer.decode(whole[-12:]), "what the policy read"
    assert "1 of 2 prompts lose their beginning, beyond 12 tokens" in caplog.text


def test_a_cut_prompt_keeps_its_bos():
    assert cut_left([0, 1, 2, 3, 4], 3, bos_id=0) == [0, 3, 4]
    assert cut_left([5, 1, 2, 3, 4], 3, bos_id=0) == [2, 3, 4]
    assert cut_left([0, 1, 2], 3, bos_id=0) == [0, 1, 2]
    assert cut_left([5, 1, 2], 2, bos_id=None) == [1, 2]


# Streams


def stream_of(rows):
    return datasets.Dataset.from_list(rows).to_iterable_dataset()


def test_a_stream_is_read_in_its_order_and_from_its_start_again():
    stream = Stream(stream_of(ROWS))
    batches, start = [], 0
    for _ in range(4):
        batch, read = stream.take(start, 3)
        start += read
        batches += [e.prompt for e in batch]
    assert batches == (PROMPTS * 3)[:12]
    again, _ = stream.take(4, 3)
    assert [e.prompt for e in again] == [PROMPTS[4], *PROMPTS[:2]]


def test_rows_of_a_stream_that_do_not_fit_are_passed_over():
    stream = Stream(ROWS, fit=lambda rows: [e for e in rows if e.columns["answer"] != "1"])
    batch, read = stream.take(0, 5)
    assert [e.columns["answer"] for e in batch] == ["0", "2", "3", "4", "0"]
    assert read == 6
    with pytest.raises(ValueError, match="no row of the stream fits"):
        Stream(ROWS, fit=lambda rows: []).take(0, 1)
    with pytest.raises(ValueError, match="the stream is empty"):
        Stream([]).take(0, 1)


def test_a_run_on_a_stream_resumes_where_it_was(tmp_path):
    def run(steps, resume=None):
        trainer = tiny_trainer(critic="baseline")
        if resume is not None:
            trainer.load_checkpoint(resume)
        seen = []
        trainer.train(
            stream_of(ROWS),
            num_steps=steps,
            batch_size=2,
            progress=False,
            checkpoint_dir=tmp_path,
            checkpoint_freq=1,
            on_step=lambda step: seen.append(step.rollout.prompts),
        )
        return seen

    whole = run(4)
    assert [p for batch in whole for p in batch] == (PROMPTS * 2)[:8]
    assert run(2, tmp_path / "ppo_checkpoint_step_2.pt") == whole[2:]


def test_rows_of_a_stream_that_are_dropped_are_counted(caplog):
    trainer = tiny_trainer(critic="baseline", max_prompt_length=12, long_prompts="drop")
    rows = [{"prompt": text} for text in ("She", LONG, "There", LONG)]
    trainer.train(stream_of(rows), num_steps=2, batch_size=2, progress=False)
    assert set(trainer.last_rollout.prompts) == {"She", "There"}
    assert "2 rows of the stream were too long and dropped" in caplog.text, "each counts once"


@pytest.mark.parametrize(
    ("prompts", "error", "match"),
    [
        (CHAT, TypeError, r"got one chat, expected a list of them; pass \[chat\]"),
        (datasets.DatasetDict({"train": stream_of}), TypeError, "pass one of its splits: train"),
        ([{"prompt": "a", 1: "b"}], TypeError, "has a column named 1, expected a text"),
        ([Example(5)], TypeError, r"prompts\[0\]: got int"),
        (["a\ud83d"], ValueError, r"prompts\[0\]: holds .* at 1, half of a pair"),
    ],
)
def test_what_is_no_list_of_prompts(prompts, error, match):
    with pytest.raises(error, match=match) as caught:
        as_examples(prompts)
    assert one_line(caught)


def test_a_stream_is_no_batch():
    with pytest.raises(TypeError, match="got a stream, which train"):
        tiny_trainer(critic="baseline").rollout(Stream(ROWS))
