"""The page of ``ppo-fast report``: what it has, and that no text of a run becomes markup."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import re
import time
from html.parser import HTMLParser

import pytest
from run_folders import (
    evaluation_line,
    metrics_line,
    sample_lines,
    write_config,
    write_lines,
    write_run,
)

from ppo_fast.cli.main import main
from ppo_fast.report import curves, samples
from ppo_fast.report.html import VOID, embedded
from ppo_fast.report.page import page
from ppo_fast.report.read import read_runs
from ppo_fast.report.tokens import scales

HOSTILE = (
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(2)>",
    '" onmouseover="alert(3)',
    "' onfocus='alert(4)",
    "</title></style><style>*{display:none}</style>",
    "<!-- --><![CDATA[ ]]>&lt;b&gt;&#x3c;i&#x3e;",
    "\x00\x1b[31m\x07\u202e\u2066\ud800\u2028",
)
TAGS = {
    "html", "head", "meta", "title", "style", "body", "a", "header", "p", "h1", "h2", "h3", "h4",
    "nav", "main", "section", "div", "span", "table", "caption", "thead", "tbody", "tr", "th", "td",
    "i", "b", "svg", "desc", "g", "line", "text", "polygon", "polyline", "circle", "rect", "figure",
    "figcaption", "ul", "ol", "li", "code", "mark", "details", "summary", "fieldset", "legend",
    "input", "label", "article", "script",
}  # fmt: skip
ATTRIBUTES = {
    "lang", "charset", "http-equiv", "content", "name", "class", "href", "id", "aria-label",
    "aria-labelledby", "aria-describedby", "aria-hidden", "tabindex", "role", "scope", "viewbox",
    "x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "r", "width", "height", "points", "data-low",
    "data-high", "data-n", "type", "checked", "for", "open", "dir",
}  # fmt: skip


class Parsed(HTMLParser):
    """Tags, attributes and texts of a page."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.texts, self.links = [], set(), [], []
        self.scripts, self.open = [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self.links += [value for name, value in attrs if name in ("href", "src")]
        if tag == "script":
            self.scripts.append(dict(attrs).get("type"))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("script", "style"):
            return
        self.texts.append(data)

    @property
    def text(self):
        return "".join(self.texts)


def parsed(*folders):
    made = page(read_runs(folders))
    made.encode("utf-8")  # no lone surrogate is left
    found = Parsed(made)
    assert set(found.tags) <= TAGS
    assert found.attributes <= ATTRIBUTES
    assert found.scripts == ["application/json", None]
    assert found.tags.count("style") == found.tags.count("title") - made.count("<title id=") == 1
    assert all(link.startswith("#") for link in found.links)
    return made, found


def test_a_run_has_all_sections(tmp_path):
    made, found = parsed(write_run(tmp_path / "kind"))
    titles = re.findall(r"<h2>([^<]*)</h2>", made)
    assert titles == [
        "Summary", "Evaluations", "Events and warnings", "Metrics over steps", "Time by part",
        "Samples, before and after", "Settings",
    ]  # fmt: skip
    for words in (
        "HuggingFaceTB/SmolLM2-135M-Instruct", "my_rewards:kind, my_rewards:brief", "60 of 60",
        "clip_fraction is 0.34 in the mean of 5 steps", "Look closer when: it runs away",
        "In a run that goes well: below 50.", "Band: ± reward_std.",
        "Band: response_length_p10 to response_length_p90; dotted: response_length_p50.",
        "Band: ratio_p01 to ratio_p99", "Responses to the same prompts",
        "settings differ from PPOConfig's defaults",
    ):  # fmt: skip
        assert words in found.text
    assert "://" not in made.replace("http://www.w3.org/2000/svg", "")  # it loads nothing


def test_a_policy_allows_the_own_style_and_script_alone(tmp_path):
    made, _ = parsed(write_run(tmp_path / "kind"))
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', made)[1].replace(
        "&#x27;", "'"
    )
    style = re.search(r"<style>(.*?)</style>", made, re.DOTALL)[1]
    script = re.search(r"<script>(.*?)</script>", made, re.DOTALL)[1]
    hashes = [
        base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()
        for part in (style, script)
    ]
    assert policy == (
        f"default-src 'none'; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'; "
        "base-uri 'none'; form-action 'none'"
    )
    assert made.index("Content-Security-Policy") < made.index("<style>")
    assert "innerHTML" not in script
    assert not re.search(
        r"\sstyle=|\son\w+=", re.sub(r"<script>.*?</script>", "", made, flags=re.S)
    )


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_of_a_run_becomes_markup(tmp_path, text):
    folder = tmp_path / "run"
    line = sample_lines(3, 0.5, random.Random(0))[0]
    line |= {"prompt": text, "completion": text, "score": text, "rewards": {text: text},
             "columns": {text: [text], "other": {text: text}}}  # fmt: skip
    line["tokens"]["text"][0] = text
    chat = line | {"prompt": [{"role": text, "content": text}], "step": 4, "completion": {text: 1}}
    write_run(folder, steps=10, policy=text, reward=[text, text], prompts=text, kl_in=text)
    write_config(folder, **{text: text, "policy": text})
    write_lines(folder / "samples.jsonl", [line, chat])
    write_lines(folder / "evaluation_samples.jsonl", [line, chat | {"prompt": text}])
    draw = random.Random(0)
    lines = [metrics_line(s, 10, draw) | {text: s, f"reward/{text}/mean": s, f"time/{text}": 1}
             for s in range(1, 11)]  # fmt: skip
    write_lines(folder / "metrics.jsonl", lines)
    write_lines(
        folder / "evaluations.jsonl",
        [evaluation_line(s, 10, draw) | {text: s, "reward": s} for s in (0, 10)],
    )
    event = {"step": 1, "time": 0, "level": text, "source": text, "text": text}
    write_lines(folder / "events.jsonl", [event])
    made, found = parsed(folder)
    shown = [t for t in found.texts if "alert(" in t or "display:none" in t or "CDATA" in t]
    if text.isprintable():
        assert len(shown) > 10  # as a text it is there
    for character in "\x00\x1b\x07\u202e\u2066\ud800\u2028":
        assert character not in made
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', made)[1]
    assert not set(data) & set("<>&\u2028\u2029")
    json.loads(data)


@pytest.mark.parametrize("name", ["<img src=x onerror=alert(1)>", '" onclick="alert(1)" x="'])
def test_a_folder_with_a_hostile_name(tmp_path, name):
    folder = write_run(tmp_path / name, steps=5)
    made, found = parsed(folder, write_run(tmp_path / "other", steps=5))
    assert name in found.text
    assert 'aria-label="The one evaluation of other"' in made  # names are in attributes


def test_embedded_json_cannot_end_its_script():
    text = "</script><!--&\u2028\u2029"
    made = embedded({text: text})
    assert not set(made) & set("<>&\u2028\u2029")
    assert json.loads(made) == {text: text}
    with pytest.raises(ValueError, match="not JSON compliant"):
        embedded(float("nan"))


def test_the_same_folder_makes_the_same_page(tmp_path, monkeypatch):
    write_run(tmp_path / "a" / "kind", steps=12)
    write_run(tmp_path / "elsewhere" / "kind", steps=12)
    made = page(read_runs([tmp_path / "a" / "kind"]))
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        assert page(read_runs([tmp_path / "elsewhere" / "kind"])) == made
    finally:
        monkeypatch.undo()
        time.tzset()
    assert str(tmp_path) not in made


def test_several_runs_share_the_charts(tmp_path):
    first = write_run(tmp_path / "kind")
    second = write_run(tmp_path / "hasty", seed=3, learning_rate=5e-4, kl_in="loss", every=0)
    made, found = parsed(first, second)
    data = json.loads(re.search(r'id="data">(.*?)</script>', made)[1])
    assert data["names"] == ["kind", "hasty"]
    assert [line["run"] for line in data["charts"]["chart-0"]] == [0, 1]
    chart = re.search(r'<svg class="chart"[^>]*id="chart-0".*?</svg></svg>|<figure>.*?</figure>',
                      made[made.index('id="curves"'):], re.DOTALL)[0]  # fmt: skip
    for part in ("smooth r0", "smooth r1", "band r0", "band r1", "raw r0", "raw r1"):
        assert f'class="{part}"' in chart
    differences = made[made.index("What differs between the runs") :]
    rows = re.findall(r'<th scope="row">(\w+)</th><td>([^<]*)</td><td>([^<]*)</td>',
                      differences[: differences.index("</table>")])  # fmt: skip
    assert rows == [("learning_rate", "0.0002", "0.0005"), ("kl_in", "reward", "loss")]
    assert "kind" in found.text


def test_settings_that_differ_from_the_defaults_are_marked(tmp_path):
    made, _ = parsed(
        write_run(tmp_path / "kind", steps=5, clip_epsilon=0.3, adam_betas=[0.9, 0.95])
    )
    marked = re.findall(r"<mark>(\w+)</mark></th><td>([^<]*)</td><td>([^<]*)</td>", made)
    assert ("clip_epsilon", "0.3", "0.2") in marked
    assert ("adam_betas", "0.9, 0.95", "0.9, 0.999") in marked
    assert {name for name, _, _ in marked} == {
        "learning_rate", "kl_penalty", "critic", "num_layers_unfrozen", "clip_epsilon",
        "adam_betas",
    }  # fmt: skip


def test_evaluations_have_error_bars_and_changes(tmp_path):
    folder = write_run(tmp_path / "kind", steps=20, every=0)
    lines = [
        {"step": 0, "time": 0, "reward": 0.25, "standard_error": 0.05, "response_length": 24},
        {"step": 20, "time": 9, "reward": 0.75, "standard_error": 0.02, "response_length": 18},
    ]
    write_lines(folder / "evaluations.jsonl", lines)
    made, found = parsed(folder)
    assert len(re.findall(r'class="bar r0"', made)) == 2
    assert ("reward", "0.25\xa0±\xa00.05", "0.75\xa0±\xa00.02", "+0.5") in rows_of(made)
    assert ("response_length", "24", "18", "-6") in rows_of(made)
    assert "0.25 → 0.75" in found.text


def rows_of(made):
    return re.findall(r'<th scope="row">(\w+)</th>' + "<td>([^<]*)</td>" * 3, made)


def test_evaluation_json_stands_for_two_evaluations(tmp_path):
    folder = write_run(tmp_path / "demo", steps=7, every=0)
    both = {"before": {"reward": 0.25, "kl": 0.0}, "after": {"reward": 0.75, "kl": 7.5}}
    (folder / "evaluation.json").write_text(json.dumps(both))
    made, _ = parsed(folder)
    assert ("kl", "0", "7.5", "+7.5") in rows_of(made)
    assert '<th scope="col">step 7</th>' in made


def test_samples_of_the_same_prompt_stand_side_by_side(tmp_path):
    folder = write_run(tmp_path / "kind", steps=10)
    first = [
        {"step": 0, "prompt": f"p{i}", "completion": f"before {i}", "score": i} for i in range(3)
    ]
    last = [{"step": 10, "prompt": f"p{i}", "completion": f"after {i}", "score": None}
            for i in (2, 0)]  # fmt: skip
    write_lines(folder / "evaluation_samples.jsonl", first + last)
    made, _ = parsed(folder)
    articles = re.findall(r"<article>.*?</article>", made, re.DOTALL)
    assert "before 0" in articles[0]
    assert "after 0" in articles[0]
    assert "before 2" in articles[1]
    assert "after 2" in articles[1]
    assert "before 1" not in made  # no response at the end
    assert "step 1</span>" in articles[2]  # of training, which alone has tokens


def test_tokens_have_colours_and_numbers(tmp_path):
    folder = write_run(tmp_path / "kind", steps=4, every=0)
    tokens = {"text": ["a", "b\n", "c", "d"], "log_ratio": [-2.0, 0.0, 2.0, None],
              "value": [1.0, 2.0, 3.0, 2.0], "advantage": [0.5]}  # fmt: skip
    line = {"step": 1, "prompt": "p", "completion": "ab\nc", "score": 1.0, "tokens": tokens}
    write_lines(folder / "samples.jsonl", [line])
    made, found = parsed(folder)
    spans = re.findall(r'<span class="(t[^"]*)" tabindex="0" data-n="([^"]*)">([^<]*)</span>', made)
    assert spans == [
        ("t l-5 v-5", "log ratio to the reference -2, value 1", "a"),
        ("t l0 v0", "log ratio to the reference 0, value 2", "b↵\n"),
        ("t l5 v5", "log ratio to the reference 2, value 3", "c"),
        ("t v0", "value 2", "d"),
    ]
    # the list of advantages has another length: there is no switch for it
    assert re.findall(r'<input type="radio" name="colours" id="by-(\w+)"', made) == [
        "log_ratio", "value", "none",
    ]  # fmt: skip
    assert "(middle 2)" in found.text


def test_a_few_extreme_tokens_leave_the_others_their_colours():
    values = [0.1 * (-1) ** i for i in range(200)] + [50.0]
    tokens = {"text": ["x"] * len(values), "log_ratio": values}
    (scale,) = scales([{"step": 1, "tokens": tokens}]).values()
    assert [scale.level(value) for value in (-0.1, 0.0, 0.05, 0.1, 50.0)] == [-5, 0, 2, 5, 5]
    spread = {"text": ["x"] * 100, "log_ratio": [i / 100 for i in range(100)]}
    assert scales([{"step": 1, "tokens": spread}])["log_ratio"].reach == 0.98


def test_a_page_of_a_long_run_is_small(tmp_path):
    """All that is drawn and shown is bounded."""
    long = "x" * 1_000_000
    folder = write_run(tmp_path / "long", steps=300)
    line = sample_lines(300, 1, random.Random(0))[0] | {"prompt": long}
    line |= {"completion": long, "columns": {f"c{i}": long[:9999] for i in range(500)}}
    line["tokens"] = {"text": [long[:999]] * 5000, "log_ratio": [0.1] * 5000}
    lines = [line | {"prompt": f"{i}{long}"} for i in range(3)]
    lines.append({"step": 300, "prompt": "p", "completion": long, "score": 1})
    write_lines(folder / "samples.jsonl", lines)
    (folder / "evaluation_samples.jsonl").unlink()
    write_lines(
        folder / "evaluations.jsonl",
        [{"step": s} | {f"e{i}{long[:9000]}": s for i in range(300)} for s in (0, 300)],
    )
    events = [{"step": i, "level": "WARNING", "text": long[:20_000]} for i in range(400)]
    write_lines(folder / "events.jsonl", events)
    steps = [metrics_line(s, 300, random.Random(s)) for s in range(1, 301)]
    many = {f"reward/r{i}/mean": i for i in range(300)}
    for line in steps:
        line |= {name: value + line["step"] % 7 for name, value in many.items()}
    write_lines(folder / "metrics.jsonl", steps)
    write_config(folder, policy=long[:50_000], **{f"k{i}": long[:400] for i in range(310)})
    made, found = parsed(folder)
    assert len(made.encode()) < 5_000_000
    assert max(map(len, found.texts)) < samples.LONGEST_COMPLETION + 100
    assert found.tags.count("figure") < curves.MOST_CHARTS + 40
    assert "k100" in found.text
    assert "k309" not in found.text
    assert "more metrics have no chart here" in found.text
    assert "The first 200 events are left out." in found.text
    assert f"({1_000_001 - samples.LONGEST_PROMPT:,} characters more)" in found.text


def test_a_run_without_steps(tmp_path):
    folder = tmp_path / "new"
    folder.mkdir()
    write_config(folder)
    _, found = parsed(folder)
    assert "No step is done yet." in found.text
    assert "0 of 60" in found.text


def test_the_command_writes_into_the_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = write_run(tmp_path / "kind", steps=5)
    main(["report", "kind"])
    assert capsys.readouterr().out == "kind/report.html\n"
    assert (folder / "report.html").read_text("utf-8") == page(read_runs([folder]))
    write_run(tmp_path / "other", steps=5)
    main(["report", "kind", "other"])
    assert capsys.readouterr().out == "report.html\n"
    assert "other" in (tmp_path / "report.html").read_text("utf-8")
    main(["report", "kind", "--output", "pages/a.html"])
    assert (tmp_path / "pages" / "a.html").exists()


def test_a_report_that_fails_leaves_the_former_one(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "kind", steps=5)
    main(["report", str(folder)])
    before = (folder / "report.html").read_bytes()
    monkeypatch.setattr("ppo_fast.report.page.times", lambda runs: 1 / 0)
    with pytest.raises(SystemExit):
        main(["report", str(folder)])
    assert (folder / "report.html").read_bytes() == before
    assert not [*folder.glob(".ppo_fast-*")]
