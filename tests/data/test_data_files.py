"""Rows and prompts from files, folders and the hub, and held-out parts."""

from __future__ import annotations

import json
import sys

import pytest
from tiny_trainer import one_line

from ppo_fast.data.examples import Stream, as_examples
from ppo_fast.data.files import hold_out, hold_out_where, read_prompts, read_rows

datasets = pytest.importorskip("datasets")

ROWS = [
    {"question": f"q{i}", "answer": i, "split": "test" if i % 4 == 0 else "train"} for i in range(8)
]


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = datasets.Dataset.from_list(ROWS)
    data.to_parquet("rows.parquet")
    data.save_to_disk("saved")
    datasets.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk("splits")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl", "saved", "splits"])
def test_columns_of_every_format(place, name):
    examples = read_prompts(name, column="question")
    assert [e.prompt for e in examples] == [f"q{i}" for i in range(8)]
    assert examples[5].columns == {"answer": 5, "split": "train"}
    assert read_rows(name) == ROWS


def test_a_split_is_chosen(place):
    assert [e.prompt for e in read_prompts("splits", column="question", split="test")] == ["q1"]


def test_a_name_of_the_hub(place, monkeypatch):
    asked = []

    def load_dataset(name, split, streaming):
        asked.append((name, split, streaming))
        data = datasets.Dataset.from_list(ROWS)
        return data.to_iterable_dataset() if streaming else data

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("ppo_fast.data.files.why_not_on_hub", lambda name, kind: None)
    assert len(read_prompts("org/name", column="question")) == 8
    stream = read_prompts("org/name", column="question", split="test", stream=True)
    assert isinstance(stream, Stream)
    assert [e.prompt for e in stream.take(0, 2)[0]] == ["q0", "q1"]
    assert asked == [("org/name", "train", False), ("org/name", "test", True)]


@pytest.mark.parametrize(
    ("name", "options", "error", "match"),
    [
        ("none.jsonl", {}, FileNotFoundError, "prompts: no file none.jsonl"),
        ("./none", {}, FileNotFoundError, "prompts: no file ./none"),
        (
            "org/none",
            {},
            ValueError,
            "no file org/none, and no data set .*unreachable",
        ),
        (
            "rows.jsonl",
            {"column": "quest"},
            ValueError,
            'line 1 has no "quest"; it has the col',
        ),
        ("rows.parquet", {}, ValueError, 'rows.parquet row 0 has no "prompt"; it has'),
        ("bad.parquet", {}, ValueError, "bad.parquet cannot be read"),
        ("bad.csv", {}, ValueError, "bad.csv cannot be read"),
        ("splits", {"column": "question", "split": "dev"}, ValueError, "'?dev'?"),
    ],
)
def test_what_cannot_be_read(place, monkeypatch, name, options, error, match):
    monkeypatch.setattr("ppo_fast.data.files.why_not_on_hub", lambda name, kind: "unreachable")
    (place / "bad.parquet").write_text("no table")
    (place / "bad.csv").write_bytes(b"prompt\n\xff\xfe\n")
    with pytest.raises(error, match=match) as caught:
        read_prompts(name, **options)
    assert one_line(caught)


def test_libraries_that_are_missing(place, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    for name in ("org/name", "rows.parquet"):
        with pytest.raises(ValueError, match=r"pip install 'ppo_fast\[data\]'"):
            read_rows(name)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (
            'prompt,answer\n"The,1\nShe,2\n',
            "t.csv line 3 cannot be read .*a quote that does not end",
        ),
        ("prompt,answer\nThe,1,2\n", r"t.csv line 2 has 3 fields, expected 2 \(prompt, answer\)"),
        ("prompt,answer\nThe\n", "t.csv line 2 has 1 fields, expected 2"),
        ("prompt,prompt\nThe,1\n", "two columns of one name: prompt, prompt"),
        ('prompt,n\n"two\nlines",1\nx\n', "t.csv line 4 has 1 fields"),
    ],
)
def test_tables_that_are_damaged(tmp_path, text, match):
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=match) as caught:
        read_prompts(path)
    assert one_line(caught)


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("5", 'line 1 has no "prompt" that is a string, a list of ids or messages'),
        ("null", 'line 1 has no "prompt" that is'),
        ('{"messages": []}', 'line 1: its "messages" hold no message'),
        ('{"prompt": "\\ud83d"}', "holds .* at 0, half of a pair of UTF-16"),
        ("[" * 100_000, "line 1 is not JSON"),
        ("1" * 5000, "line 1 is not JSON"),
    ],
)
def test_lines_that_are_no_prompts(tmp_path, line, match):
    path = tmp_path / "t.jsonl"
    path.write_text(line)
    with pytest.raises(ValueError, match=match) as caught:
        read_prompts(path)
    assert one_line(caught)


def test_a_file_is_no_stream(place):
    with pytest.raises(ValueError, match=r"rows.jsonl is a file, which is read whole; leave stre"):
        read_prompts("rows.jsonl", stream=True)


def test_a_table_of_pandas():
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame({"prompt": ["a", "b"], "answer": [1, 2]})
    assert [(e.prompt, e.columns) for e in as_examples(table)] == [
        ("a", {"answer": 1}),
        ("b", {"answer": 2}),
    ]


def test_rows_are_mappings(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match="line 1 is a list, expected a mapping"):
        read_rows(path)


# Held-out parts


@pytest.mark.parametrize(("share", "count"), [(0.25, 2), (0.01, 1), (0.99, 7)])
def test_a_share_is_held_out(share, count):
    examples = as_examples([f"p{i}" for i in range(8)])
    rest, held_out = hold_out(examples, share)
    assert len(held_out) == count
    assert sorted(e.prompt for e in rest + held_out) == [e.prompt for e in examples]
    assert hold_out(examples, share) == (rest, held_out)


def test_rows_of_a_column_are_held_out():
    examples = as_examples([row | {"prompt": row["question"]} for row in ROWS])
    rest, held_out = hold_out_where(examples, "split", "test")
    assert [e.columns["answer"] for e in held_out] == [0, 4]
    assert len(rest) == 6
    with pytest.raises(ValueError, match="there is no column 'none'; there are answer, question,"):
        hold_out_where(examples, "none", "dev")
    with pytest.raises(ValueError, match=r"'split' reads 'dev' in 0 of 8 rows; it has test, train"):
        hold_out_where(examples, "split", "dev")


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0, float("nan")])
def test_shares_out_of_range(share):
    with pytest.raises(ValueError, match=r"held_out: got .* a share in \(0, 1\)"):
        hold_out(as_examples(["a", "b"]), share)
    with pytest.raises(ValueError, match="got 1 prompts"):
        hold_out(as_examples(["a"]), 0.5)
