"""Files of prompts."""

from __future__ import annotations

import json
import re

import pytest
from command_line import PROMPTS, arguments, fails_in_a_line, lines, write

from ppo_fast.cli.main import main
from ppo_fast.data.files import read_prompts


def texts_of(path):
    return [example.prompt for example in read_prompts(path)]


def test_prompts_of_every_format(tmp_path):
    odd = 'one "quoted", \u2028 with\x85breaks'
    records = [{"prompt": text, "more": 1} for text in ("ä b", odd, "last")]
    jsonl = "\n\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    assert texts_of(write(tmp_path / "a.jsonl", jsonl)) == ["ä b", odd, "last"]
    assert texts_of(write(tmp_path / "a.txt", f"ä b\n\n{odd}\r\n  \nlast")) == [
        "ä b",
        odd,
        "last",
    ]
    table = f'id,prompt\n1,ä b\n2,"{odd.replace(chr(34), chr(34) * 2)}"\n3,"two\nlines"\n'
    assert texts_of(write(tmp_path / "a.csv", table)) == ["ä b", odd, "two\nlines"]
    assert texts_of(write(tmp_path / "b.csv", "\ufeffprompt\nfrom a spreadsheet\n")) == [
        "from a spreadsheet"
    ]


@pytest.mark.parametrize("name", ["p.jsonl", "p.csv"])
def test_train_reads_jsonl_and_csv(place, name):
    if name.endswith("csv"):
        text = "prompt,source\n" + "".join(f"{prompt},book\n" for prompt in PROMPTS)
    else:
        text = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS)
    write(place / name, text)
    main(arguments(prompts=name, num_steps=1, batch_size=3))
    samples = lines(place / "run/samples.jsonl")
    assert sorted(row["prompt"] for row in samples) == sorted(PROMPTS)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.json", "[]", r"--prompts: .*p\.json ends in '\.json', expected \.txt, \.jsonl, \.csv"),
        ("p.txt", "\n  \n", r"--prompts: .*p\.txt holds no prompts"),
        ("p.jsonl", '{"prompt": "a"}\n{"text": "b"}', r'p\.jsonl line 2 has no "prompt"'),
        ("p.jsonl", '{"prompt": "a"}\n\n{"prompt"', r"p\.jsonl line 3 is not JSON"),
        ("p.jsonl", '{"prompt": 3}', r'line 1 has no "prompt" that is a string, a list of ids or'),
        ("p.csv", "text\na\n", r'p\.csv line 2 has no "prompt"'),
    ],
)
def test_bad_prompts(place, capsys, name, text, message):
    write(place / name, text)
    assert re.search(message, fails_in_a_line(capsys, *arguments(prompts=name)))
    assert not (place / "run").exists()
