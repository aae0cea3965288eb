"""Cards of saved models: what they say, and that no text in them becomes HTML or Markdown."""

from __future__ import annotations

import html
import json
import math
import re
from importlib.metadata import version
from xml.etree import ElementTree

import pytest
import yaml

from ppo_fast.exports.model_card import ModelCard, card_of_run, curve_svg, escaped

NASTY = (
    "</td><script>alert(1)</script> | [a](javascript:x) ![i](http://e.vil) `c` **b** _u_\n"
    "---\n# head\n```\nwww.evil.com <http://e.vil> a@b.c \\| &lt;b&gt; ~~s~~ $x$"
)


def parts(text):
    """Return the metadata and the page."""
    _, metadata, page = text.split("---\n", 2)
    return yaml.safe_load(metadata), page


def test_a_card_says_what_it_is_and_how_it_was_trained():
    card = ModelCard(
        title="Kind reviews",
        kind="policy",
        base_model="org/base-1B",
        command="ppo-fast train --policy org/base-1B",
        settings={"learning_rate": 1e-4, "clip": (0.2, 0.3)},
        data={"/home/someone/prompts.txt": 64},
        metrics={"mean_reward": 0.731234567, "step": 22},
        tags=["my tag"],
    )
    metadata, page = parts(card.text())
    assert metadata["base_model"] == "org/base-1B"
    assert (metadata["library_name"], metadata["pipeline_tag"]) == (
        "transformers",
        "text-generation",
    )
    assert metadata["tags"] == ["ppo", "rlhf", "ppo_fast", "policy", "my-tag"]
    assert "# Kind reviews\n\nA policy trained with ppo_fast, from org&#47;base-1B." in page
    assert "```sh\nppo-fast train --policy org/base-1B\n```" in page
    assert "| prompts.txt | 64 |" in page
    assert "someone" not in page
    assert "| mean&#95;reward | 0.731235 |" in page
    assert "| step | 22 |" in page
    assert "learning_rate: 0.0001\nclip:\n- 0.2\n- 0.3\n```" in page
    assert f"| torch | {escaped(version('torch'))} |" in page
    assert "curve" not in page.lower()
    assert "Samples" not in page


@pytest.mark.parametrize(
    ("kind", "task", "library", "line"),
    [
        ("adapter", "text-generation", "peft", 'PeftModel.from_pretrained(base, "FOLDER")'),
        ("critic", "token-classification", "transformers", "AutoModelForTokenClassification"),
        ("critic's weights", "reinforcement-learning", "ppo_fast", "load_critic(ppo.critic.module"),
        ("reward model", "text-classification", "transformers", "ForSequenceClassification"),
    ],
)
def test_each_kind_says_how_to_load_it(kind, task, library, line, tmp_path):
    folder = tmp_path / "my-base"
    folder.mkdir()
    metadata, page = parts(ModelCard(title="x", kind=kind, base_model=str(folder)).text())
    assert (metadata["pipeline_tag"], metadata["library_name"]) == (task, library)
    assert "base_model" not in metadata, "a folder is no name of the hub's"
    assert str(tmp_path) not in page
    assert "from my-base." in page
    assert line in page
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
    compile(code, "card", "exec")
    own = ModelCard(title="x", kind=kind, loading="load('me')").text()
    assert "```python\nload('me')\n```" in own
    assert line not in own


def test_no_text_becomes_html_or_markdown():
    card = ModelCard(
        title=NASTY,
        kind="policy",
        base_model=NASTY,
        command=NASTY,
        settings={NASTY: NASTY},
        data={NASTY: 3},
        metrics={NASTY: 1.0},
        curve=[(1, 0.5), (2, 0.7)],
        curve_name=NASTY,
        samples=[(NASTY, NASTY)],
        tags=[NASTY],
    )
    metadata, page = parts(card.text())
    assert metadata["pipeline_tag"] == "text-generation"
    assert "base_model" not in metadata
    fence = re.search(r"^````+sh$", page, re.MULTILINE)[0][:-2]
    assert f"{NASTY}\n{fence}\n" in page
    outside = re.sub(r"^(```+)\w+\n.*?^\1$", "", page, flags=re.DOTALL | re.MULTILINE)
    for sign in ("<", ">", "`", "](java", "**b", "_u_", "http:", "www.", "@", "$", "~~", "\\"):
        assert sign not in outside, sign
    rows = [line for line in outside.splitlines() if line.startswith("|")]
    assert all(line.count("|") == 3 for line in rows)
    assert [line for line in outside.splitlines() if "head" in line and line[:3] == "# h"] == []


def test_an_escaped_text_reads_as_it_was():
    assert html.unescape(escaped(NASTY, 1000)) == " ".join(NASTY.split())
    assert escaped("x" * 500) == "x" * 400 + " ..."


def test_the_curve_is_a_drawing_and_a_short_table(tmp_path):
    curve = [(step, math.sin(step / 9)) for step in range(1, 101)]
    card = ModelCard(title="x", kind="policy", curve=[*curve, (101, math.nan)])
    card.write(tmp_path)
    svg = ElementTree.parse(tmp_path / "curve.svg").getroot()
    line = svg.find("{http://www.w3.org/2000/svg}polyline").get("points").split()
    assert len(line) == 100
    xs, ys = zip(*(map(float, point.split(",")) for point in line), strict=True)
    assert list(xs) == sorted(xs)
    assert ys.index(min(ys)) == max(range(100), key=lambda i: curve[i][1]), "up is more"
    assert min(xs) >= 0
    assert max(xs) <= 640
    assert min(ys) >= 0
    assert max(ys) <= 240
    page = (tmp_path / "README.md").read_text()
    assert "![curve](curve.svg)" in page
    rows = re.findall(r"^\| (\d+) \| ", page, re.MULTILINE)
    assert (rows[0], rows[-1], len(rows)) == ("1", "100", 12)
    assert "nan" not in page


def test_curves_of_little():
    ElementTree.fromstring(curve_svg([(3, 1.0), (4, 1.0)]))
    one = ModelCard(title="x", kind="policy", curve=[(1, 0.5)])
    assert "curve.svg" not in one.text()
    assert "| 1 | 0.5 |" in one.text()


def test_the_card_of_a_run_is_made_of_its_files(tmp_path):
    lines = [
        {"step": step, "time": 1e9, "mean_reward": reward, "time/update": 3.0, "kl": None}
        for step, reward in ((1, 0.25), (2, 0.5), (3, None), (4, 0.75))
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    samples = [
        {"step": step, "prompt": f"p{i}", "completion": f"c{step}{i}", "score": 1.0}
        for step in (3, 4)
        for i in range(5)
    ]
    (tmp_path / "samples.jsonl").write_text("\n".join(map(json.dumps, samples)))
    card = card_of_run(tmp_path, "policy", title="x", base_model="base", data={"p.txt": 4})
    assert card.metrics == {"step": 4, "mean_reward": 0.75}
    assert card.curve == [(1, 0.25), (2, 0.5), (4, 0.75)]
    assert card.samples == [(f"p{i}", f"c4{i}") for i in range(3)]
    card.write(tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert "| p0 | c40 |" in page
    empty = card_of_run(tmp_path / "none", "critic", title="x", base_model="base")
    assert empty.text().count("## ") == 2


def test_paths_of_the_machine_are_not_told():
    card = ModelCard(
        "t",
        "policy",
        command="ppo-fast train --policy /home/user/models/base --prompts ~/data/p.jsonl -x a/b",
        settings={"output_dir": "/home/user/runs/a", "reward": ["/opt/x/r.py:f"], "config": None},
    )
    text = card.text()
    assert "ppo-fast train --policy base --prompts p.jsonl -x a/b" in text
    assert "output_dir: a" in text
    assert "- r.py:f" in text
    assert not {"/home", "/opt", "user"} & set(text.replace("/", " /").split())


def test_a_long_file_of_samples_is_not_held(tmp_path):
    rows = [{"step": n, "prompt": "p", "completion": f"c{n}"} for n in (1, 2, 2, 2, 2)]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{")
    (tmp_path / "metrics.jsonl").write_text('{"step": 2, "mean_reward": 1.0}\n')
    card = card_of_run(tmp_path, "policy", title="t", base_model="b", num_samples=3)
    assert card.samples == [("p", "c2")] * 3
