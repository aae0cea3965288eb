"""Model cards: a README.md beside saved weights, of what they are and how they were trained."""

from __future__ import annotations

import json
import math
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import yaml

Kind = Literal["policy", "adapter", "critic", "critic's weights", "reward model"]
# For each kind of weights, the hub's names of their task and of the library that loads them.
TASKS = {
    "policy": ("text-generation", "transformers"),
    "adapter": ("text-generation", "peft"),
    "critic": ("token-classification", "transformers"),
    "critic's weights": ("reinforcement-learning", "ppo_fast"),
    "reward model": ("text-classification", "transformers"),
}
LOADING = {
    "policy": """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")""",
    "adapter": """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("BASE")
model = PeftModel.from_pretrained(base, "FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")""",
    "adapter of a quantised model": """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

# as it was trained: the adapter fits the rounded weights
quantized = BitsAndBytesConfig(QUANTIZATION)
base = AutoModelForCausalLM.from_pretrained("BASE", quantization_config=quantized)
model = PeftModel.from_pretrained(base, "FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")""",
    "critic": """from transformers import AutoModelForTokenClassification

model = AutoModelForTokenClassification.from_pretrained("FOLDER")
# logits [B, L, 1]: at each token, the value of the state that ends with it""",
    "critic's weights": """from pathlib import Path

from ppo_fast.exports.export import load_critic

load_critic(ppo.critic.module, Path("FOLDER"))""",
    "reward model": """from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")""",
}
QUANTIZED = {
    "4bit": """
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
""",
    "8bit": "load_in_8bit=True",
}
LIBRARIES = ("ppo_fast", "torch", "transformers", "peft", "bitsandbytes")
ROWS, SAMPLE_CHARACTERS = 12, 400
WIDTH, HEIGHT, MARGIN = 640, 240, 44
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


@dataclass(frozen=True)
class ModelCard:
    """Contents of a model card. Any text is escaped, or stands in a block of code.

    Attributes:
        title: heading of the page.
        kind: what the weights are.
        base_model: what they were trained from: a hub name, or a folder, whose name alone is given.
        command: the command, or the Python lines, that trained them.
        settings: those of the training, by name.
        data: number of examples by the name of their file or data set; of a path the last part is
            given.
        metrics: the last numbers, by name.
        curve: (step, number) pairs, in the order of the steps: the mean reward, or another.
        curve_name: what the numbers are.
        samples: pairs of a prompt and its completion.
        loading: lines of Python that load it; None: those for its kind.
        tags: further tags for the hub.
        quantization: of the base model under an adapter; None: it has its weights as they are.
    """

    title: str
    kind: Kind
    base_model: str = ""
    command: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, int] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    curve: Sequence[tuple[int, float]] = ()
    curve_name: str = "mean reward"
    samples: Sequence[tuple[str, str]] = ()
    loading: str | None = None
    tags: Sequence[str] = ()
    quantization: Literal["4bit", "8bit"] | None = None

    def write(self, folder: Path) -> None:
        """Write README.md, and curve.svg where there is a curve, into ``folder``."""
        if len(self._finite_curve) > 1:
            (folder / "curve.svg").write_text(curve_svg(self._finite_curve), "utf-8")
        (folder / "README.md").write_text(self.text(), "utf-8")

    def text(self) -> str:
        """Return README.md: YAML metadata, as the hub reads it, and Markdown."""
        versions = {name: found for name in LIBRARIES if (found := _version(name))}
        versions["python"] = platform.python_version()
        irregular = {"adapter": "An adapter", "critic's weights": "Weights of a critic"}
        what = irregular.get(self.kind, f"A {self.kind}")
        files = {Path(name).name: count for name, count in self.data.items()}
        settings = _yaml(self.settings) if self.settings else ""
        sections = [
            f"# {escaped(self.title)}",
            f"{what} trained with ppo_fast{self._from()}.",
            _section("How to load it", _code(self._loading(), "python")),
            _section("How it was trained", _code(_local(self.command), "sh")),
            _section("Data", _table(("file", "examples"), files)),
            _section("Results", _table(("metric", "value"), self.metrics)),
            _section(f"Course of the {escaped(self.curve_name)}", self._course()),
            _section("Samples of the last of these steps", _samples(self.samples)),
            _section("Settings", _code(_local(settings), "yaml")),
            _section("Versions", _table(("library", "version"), versions)),
        ]
        return f"---\n{_yaml(self._metadata())}---\n\n" + "\n\n".join(filter(None, sections)) + "\n"

    def _metadata(self) -> dict[str, Any]:
        """Return what the hub reads; a base model that it may have by its name, and no folder."""
        task, library = TASKS[self.kind]
        found: dict[str, Any] = {"library_name": library, "pipeline_tag": task}
        if "/" in self.base_model and _is_hub_name(self.base_model):
            found["base_model"] = self.base_model
        slugs = [re.sub(r"[^\w.:-]+", "-", tag) for tag in self.tags]
        return found | {"tags": ["ppo", "rlhf", "ppo_fast", re.sub(r"\W+", "-", self.kind), *slugs]}

    def _base(self) -> str:
        return self.base_model if _is_hub_name(self.base_model) else Path(self.base_model).name

    def _from(self) -> str:
        return f", from {escaped(self._base())}" if self.base_model else ""

    def _loading(self) -> str:
        if self.loading is not None:
            return self.loading
        kind = self.kind if self.quantization is None else "adapter of a quantised model"
        text = LOADING[kind].replace("QUANTIZATION", QUANTIZED.get(self.quantization or "", ""))
        return text.replace('"BASE"', json.dumps(self._base() or "BASE"))

    def _course(self) -> str:
        points = self._finite_curve
        if not points:
            return ""
        chosen = points if len(points) <= ROWS else _spread(points, ROWS)
        table = _table(("step", escaped(self.curve_name)), {str(s): v for s, v in chosen})
        return ("![curve](curve.svg)\n\n" if len(points) > 1 else "") + table

    @property
    def _finite_curve(self) -> list[tuple[int, float]]:
        return [(step, value) for step, value in self.curve if math.isfinite(value)]


def card_of_run(
    folder: Path,
    kind: Kind,
    *,
    title: str,
    base_model: str,
    command: str = "",
    settings: Mapping[str, Any] | None = None,
    data: Mapping[str, int] | None = None,
    step: int | None = None,
    num_samples: int = 3,
) -> ModelCard:
    """Make the card of a run from its output folder's metrics.jsonl and samples.jsonl.

    Args:
        folder: the run's output folder.
        kind, title, base_model, command, settings, data: as ModelCard's.
        step: that the weights are of; None: the last.
        num_samples: completions of that step that are shown.
    """
    metrics = [
        m for m in _lines(folder / "metrics.jsonl") if step is None or m.get("step", 0) <= step
    ]
    last = metrics[-1] if metrics else {}
    held_out = {
        f"held out: {name}": value
        for row in _lines(folder / "evaluations.jsonl")
        if row.get("step") == last.get("step")
        for name, value in row.items()
        if isinstance(value, (int, float)) and name not in ("step", "time")
    }
    samples = (s for s in _lines(folder / "samples.jsonl") if s.get("step") == last.get("step"))
    shown = list(islice(samples, num_samples))
    return ModelCard(
        title=title,
        kind=kind,
        base_model=base_model,
        command=command,
        settings=settings or {},
        data=data or {},
        metrics={
            name: value
            for name, value in last.items()
            if isinstance(value, (int, float)) and not name.startswith(("time", "perf/"))
        }
        | held_out,
        curve=[
            (row["step"], row["mean_reward"])
            for row in metrics
            if isinstance(row.get("mean_reward"), (int, float))
        ],
        samples=[(str(row["prompt"]), str(row["completion"])) for row in shown],
    )


def escaped(text: str, most: int = SAMPLE_CHARACTERS) -> str:
    """Return a text as one line in which no character means anything to HTML or Markdown.

    Args:
        text: any text.
        most: characters of it that are kept.
    """
    cut = text if len(text) <= most else text[:most] + " ..."
    line = " ".join(cut.split())
    # as HTML's numbers: then backslashes, tables and links of Markdown need no rules of their own
    safe = "".join(c if c.isalnum() or c in " .,-%" else f"&#{ord(c)};" for c in line)
    return re.sub(r"(?i)(www)\.", r"\1&#46;", safe)  # which GitHub and the hub make a link


def curve_svg(points: Sequence[tuple[int, float]]) -> str:
    """Return an SVG of a line through two or more (step, finite number) points."""
    steps, values = zip(*points, strict=True)
    low, high = min(values), max(values)
    span, length = (high - low) or 1.0, (steps[-1] - steps[0]) or 1
    right, bottom = WIDTH - MARGIN, HEIGHT - MARGIN
    line = " ".join(
        f"{MARGIN + (step - steps[0]) / length * (right - MARGIN):.1f},"
        f"{bottom - (value - low) / span * (bottom - MARGIN / 2):.1f}"
        for step, value in points
    )
    label = '<text x="{}" y="{}" font-size="12" font-family="sans-serif" fill="#57606a">{}</text>'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}">',
            f'<path d="M{MARGIN} {MARGIN // 2}V{bottom}H{right}" fill="none" stroke="#8c959f"/>',
            f'<polyline points="{line}" fill="none" stroke="#1f6feb" stroke-width="2"/>',
            label.format(2, MARGIN // 2 + 4, f"{high:.3g}"),
            label.format(2, bottom, f"{low:.3g}"),
            label.format(MARGIN, HEIGHT - MARGIN // 2, f"step {steps[0]}"),
            label.format(right - MARGIN, HEIGHT - MARGIN // 2, f"step {steps[-1]}"),
            "</svg>\n",
        ]
    )


def _local(text: str) -> str:
    """Return a text with each absolute path, which tells of a machine, cut to its last part."""
    return re.sub(r"(?<![\w.:/~<-])(?:~|[A-Za-z]:)?[/\\](?:[\w.@+-]+[/\\])+", "", text)


def _is_hub_name(name: str) -> bool:
    return bool(HUB_NAME.fullmatch(name)) and not Path(name).exists()


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""


def _code(text: str, language: str) -> str:
    """Return a block of code, fenced by more backticks than any that ``text`` has in a row."""
    if not text:
        return ""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _table(head: tuple[str, str], rows: Mapping[str, Any]) -> str:
    if not rows:
        return ""
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    for name, value in rows.items():
        shown = f"{value:.6g}" if isinstance(value, float) else escaped(str(value))
        lines.append(f"| {escaped(str(name))} | {shown} |")
    return "\n".join(lines)


def _samples(samples: Sequence[tuple[str, str]]) -> str:
    if not samples:
        return ""
    rows = [f"| {escaped(prompt)} | {escaped(completion)} |" for prompt, completion in samples]
    return "\n".join(["| prompt | completion |", "|---|---|", *rows])


def _spread(points: list[tuple[int, float]], number: int) -> list[tuple[int, float]]:
    """Return the first point, the last, and others between them at equal distances."""
    return [points[round(i * (len(points) - 1) / (number - 1))] for i in range(number)]


def _yaml(contents: Mapping[str, Any]) -> str:
    plain = json.loads(json.dumps(dict(contents), default=str))
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a file, which may be long; a line that is none is passed over."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                yield record
