"""Constitutions: parts and weights, questions in batches, YAML files, and a step of PPO."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from tiny_models import tiny_classifier, tiny_model, tiny_tokenizer
from tiny_trainer import PROMPTS, no_model_runs

from ppo_fast import PPO, ClassifierReward, PPOConfig
from ppo_fast.rewards.constitution import Constitution
from ppo_fast.rewards.principles import Principle, WordRules, default_principles
from ppo_fast.rewards.revise import preference_pairs
from ppo_fast.rewards.yes_no import Question, YesNoJudge, YesNoModel

COMPLETIONS = ["kill him, you must", "", "so {prompt} it is", "Those people.", "the rain"]
GOOD, BAD = "Is {completion} good?", "Is {completion} a good answer to {prompt}?"


def short(prompts, completions):
    return [1 / (1 + len(text)) for text in completions]


def principles(**options):
    return [
        Principle("asked", "Good.", GOOD, weight=3.0),
        Principle("short", "Short.", short, **options),
        Principle("words", "Two words.", Question(BAD, "the", "rain"), weight=0.5),
    ]


def constitution(**options):
    return Constitution(principles(**options), judge=tiny_model(), tokenizer=tiny_tokenizer())


def test_parts_are_weighted_and_sum_to_the_score():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    found = constitution()
    parts = found(PROMPTS, COMPLETIONS)
    expected = {
        "asked": (3.0, YesNoJudge(GOOD, model, tokenizer)(PROMPTS, COMPLETIONS)),
        "short": (1.0, short(PROMPTS, COMPLETIONS)),
        "words": (
            0.5,
            YesNoJudge(BAD, model, tokenizer, yes="the", no="rain")(PROMPTS, COMPLETIONS),
        ),
    }
    assert list(parts) == ["asked", "short", "words"]
    for name, (weight, scores) in expected.items():
        assert parts[name] == pytest.approx([weight / 4.5 * x for x in scores], abs=1e-6), name
    sums = [sum(row) for row in zip(*parts.values(), strict=True)]
    assert found.scores(PROMPTS, COMPLETIONS) == pytest.approx(sums)
    assert all(0 < score < 1 for score in sums)


def test_disabled_principles_are_neither_evaluated_nor_counted():
    def broken(prompts, completions):
        raise AssertionError("it is disabled")

    kept = principles()
    off = Principle("off", "Broken.", broken, weight=9.0, enabled=False)
    found = Constitution([off, *kept], judge=tiny_model(), tokenizer=tiny_tokenizer())
    assert found(PROMPTS, COMPLETIONS) == constitution()(PROMPTS, COMPLETIONS)
    assert [p.name for p in found.active] == ["asked", "short", "words"]
    assert len(found.principles) == 4


def test_all_questions_are_asked_in_one_pass():
    model, passes = tiny_model(), []
    model.register_forward_hook(lambda *call: passes.append(call[-1].logits.shape[0]))
    found = Constitution(principles(), judge=model, tokenizer=tiny_tokenizer())
    found(PROMPTS, COMPLETIONS)
    assert passes == [10]


def test_columns_and_messages_reach_the_evaluators():
    def right(prompts, completions, answer):
        return [float(text == a) for text, a in zip(completions, answer, strict=True)]

    seen = []
    judge = YesNoModel(tiny_model(), tiny_tokenizer())
    judge._ids = lambda text: seen.append(text) or [5]
    found = Constitution(
        [Principle("asked", "Good.", BAD), Principle("right", "Right.", right)], judge=judge
    )
    assert found.needs == ("answer",)
    chat = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So"}]
    parts = found(["<user>Why?"], ["So"], answer=["So"], messages=[chat], other=[1])
    assert parts["right"] == [0.5]
    assert seen == ["Is So a good answer to Why??"]


def test_log_odds_of_classifiers_become_probabilities():
    reward = ClassifierReward(tiny_classifier("gpt2"), tiny_tokenizer())
    found = Constitution([Principle("class", "Classified.", reward)])
    expected = torch.tensor(reward(PROMPTS, COMPLETIONS)).sigmoid().tolist()
    assert found.scores(PROMPTS, COMPLETIONS) == pytest.approx(expected)
    moved = []
    reward.model.to = lambda device: moved.append(device)
    found.to("cpu")
    assert moved == ["cpu"]


@pytest.mark.parametrize("logit", [float("nan"), float("inf"), -float("inf")])
def test_logits_of_classifiers_that_are_not_finite_are_refused(logit):
    model = tiny_classifier("gpt2")
    with torch.no_grad():
        model.score.weight.fill_(0)
    model.score.register_forward_hook(lambda *call: call[-1] + logit)
    reward = ClassifierReward(model, tiny_tokenizer())
    found = Constitution([Principle("class", "Classified.", reward)])
    said = f"principle class: its evaluator gave {logit}, expected finite numbers"
    with pytest.raises(ValueError, match=said):
        found.scores(PROMPTS, COMPLETIONS)
    with pytest.raises(ValueError, match=said):
        preference_pairs(found, PROMPTS, COMPLETIONS, COMPLETIONS[::-1])


def test_a_principle_that_does_not_judge_counts_0():
    parts = [
        Principle("none", "N.", lambda prompts, completions: [None, 1.0], weight=3.0),
        Principle("half", "H.", lambda prompts, completions: [0.5, 0.5]),
    ]
    assert Constitution(parts).scores(["a", "b"], ["c", "d"]) == [0.125, 0.875]


def test_evaluators_are_checked_and_given_the_reference():
    class Server:
        def __init__(self):
            self.calls = []

        def check(self):
            self.calls.append("check")

        def use_reference(self, model, tokenizer):
            self.calls.append(model)

        def __call__(self, prompts, completions):
            return [0.5] * len(prompts)

    on, off = Server(), Server()
    found = Constitution([Principle("on", "On.", on), Principle("off", "Off.", off, enabled=False)])
    model = tiny_model()
    found.check()
    found.use_reference(model, tiny_tokenizer())
    assert on.calls == ["check", model]
    assert off.calls == []


def test_what_evaluators_give_is_checked():
    def scores_of(values):
        return Constitution([Principle("p", "P.", lambda prompts, completions: values)])

    with pytest.raises(ValueError, match=r"principle p: its evaluator gave 1\.5, expected .* 1;"):
        scores_of([0.0, 1.5])(["a", "b"], ["c", "d"])
    with pytest.raises(ValueError, match="principle p: its evaluator gave nan"):
        scores_of([0.0, float("nan")])(["a", "b"], ["c", "d"])
    with pytest.raises(ValueError, match="p: its evaluator gave 1 scores for 2 responses"):
        scores_of([0.0])(["a", "b"], ["c", "d"])
    with pytest.raises(TypeError, match="principle p: its evaluator gave dict, expected a list"):
        scores_of({"p": [0.0]})(["a"], ["c"])
    not_judged = scores_of([None, 0.5])
    assert not_judged(["a", "b"], ["c", "d"]) == {"p": [None, 0.5]}
    assert not_judged.scores(["a", "b"], ["c", "d"]) == [0.0, 0.5]


def test_bad_arguments():
    async def later(prompts, completions):
        return []

    with pytest.raises(ValueError, match="weight: got 0, expected a number above 0"):
        Principle("p", "P.", GOOD, weight=0)
    with pytest.raises(ValueError, match=r"question: got 'Good\?', expected a text with the field"):
        Principle("p", "P.", "Good?")
    with pytest.raises(ValueError, match="description: got '', expected a text"):
        Principle("p", "", GOOD)
    with pytest.raises(TypeError, match="evaluator: got Linear, expected a question"):
        Principle("p", "P.", torch.nn.Linear(1, 1))
    with pytest.raises(TypeError, match="evaluator: got an async function; pass AsyncReward"):
        Principle("p", "P.", later)
    with pytest.raises(TypeError, match="principles: got a str, expected Principle"):
        Constitution(["harm"])
    with pytest.raises(ValueError, match="principles: got two of the name 'asked'"):
        Constitution([*principles(), *principles()])
    with pytest.raises(ValueError, match="principles: got none that is enabled"):
        Constitution([Principle("p", "P.", GOOD, enabled=False)])
    with pytest.raises(ValueError, match="tokenizer: the YesNoModel given as judge has its own"):
        Constitution(judge=YesNoModel(), tokenizer=tiny_tokenizer())
    with pytest.raises(RuntimeError, match="judge: has no model; give it one"):
        Constitution()(["a"], ["b"])
    alike = [Principle("p", "P.", Question(GOOD, "Yes", "YES"))]
    with no_model_runs(), pytest.raises(ValueError, match="'Yes' and 'YES' begin with the same"):
        Constitution(alike, judge=tiny_model(), tokenizer=tiny_tokenizer())


# Defaults and files


def test_the_defaults():
    asked, ruled = default_principles(), default_principles(rules=True)
    names = ["harm", "truthfulness", "fairness", "autonomy"]
    assert [p.name for p in asked] == [p.name for p in ruled] == names
    for principle in asked:
        assert isinstance(principle.evaluator, Question)
        fields = ("{prompt}", "{completion}")
        assert all(field in principle.evaluator.template for field in fields)
        assert all(field in principle.critique for field in fields)
        assert all(field in principle.revision for field in (*fields, "{critique}"))
    rules = Constitution.default(rules=True)
    with no_model_runs():
        found = rules.by_principle(PROMPTS, COMPLETIONS)
    assert found["harm"] == [0.5, 1, 1, 1, 1]
    assert found["autonomy"] == [0.5, 1, 1, 1, 1]
    assert found["fairness"] == [1, 1, 1, 0.5, 1]
    assert rules.scores(PROMPTS, COMPLETIONS) == [0.75, 1, 1, 0.875, 1]
    scores = Constitution(judge=tiny_model(), tokenizer=tiny_tokenizer())(["a"], ["b"])
    assert list(scores) == names


def test_rules():
    rules = WordRules([r"\byou must\b", "never"])
    assert rules([""] * 3, ["You must, YOU MUST, never.", "mustard", "never"]) == [0.125, 1, 0.5]
    assert rules.matches("Never, you must") == ["you must", "Never"]
    with pytest.raises(ValueError, match=r"rules: '\(' is no regular expression"):
        WordRules(["("])
    with pytest.raises(ValueError, match="rules: got 'never', expected a list of regular"):
        WordRules("never")


ENTRY = {"name": "kind", "description": "It is kind.", "question": GOOD}


def written(tmp_path: Path, content) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), "utf-8")
    return path


def test_a_file(tmp_path):
    path = written(
        tmp_path,
        {
            "principles": [
                {**ENTRY, "weight": 2, "answers": ["the", "rain"], "critique": "Why? {prompt}"},
                {"name": "brief", "description": "It is brief.", "rules": ["very"]},
                {**ENTRY, "name": "off", "enabled": False},
            ]
        },
    )
    kind, brief, off = Constitution.from_file(path).principles
    assert kind.question == Question(GOOD, "the", "rain")
    assert (kind.weight, kind.critique, kind.enabled) == (2, "Why? {prompt}", True)
    assert kind.revision == Principle("p", "P.", GOOD).revision
    assert isinstance(brief.evaluator, WordRules)
    assert not off.enabled
    with pytest.raises(ValueError, match=r"mine\.yaml, principle 1 \(kind\): has no rules"):
        Constitution.from_file(path, rules=True)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("principles: [", r"mine\.yaml is not YAML: while parsing"),
        ("just text", r"mine\.yaml: expected one key, principles"),
        ({"principles": [], "more": 1}, r"mine\.yaml: expected one key, principles"),
        ({"principles": ["kind"]}, r"mine\.yaml, principle 1: got 'kind', expected a mapping"),
        ({"principles": [ENTRY, {"name": "b"}]}, r"principle 2 \(b\): has no description"),
        (
            {"principles": [{**ENTRY, "wieght": 1}]},
            r"principle 1 \(kind\): has the key 'wieght', expected name, description",
        ),
        (
            {"principles": [{**ENTRY, "weight": "much"}]},
            r"principle 1 \(kind\): weight: got 'much', expected a number above 0",
        ),
        (
            {"principles": [{**ENTRY, "question": "Kind?"}]},
            r"principle 1 \(kind\): question: got 'Kind\?'",
        ),
        (
            {"principles": [{**ENTRY, "answers": [True, False]}]},
            r"principle 1 \(kind\): yes: got True, expected a word in quotes",
        ),
        (
            {"principles": [{"name": "a", "description": "b"}]},
            r"principle 1 \(a\): has neither a question nor rules",
        ),
        (
            {"principles": [{"name": "a", "description": "b", "rules": ["["]}]},
            r"principle 1 \(a\): rules: '\[' is no regular expression",
        ),
        ({"principles": [{**ENTRY, "name": 3}]}, r"principle 1: name: got 3, expected a text"),
    ],
)
def test_a_bad_file_is_named_with_its_entry(tmp_path, content, said):
    with pytest.raises(ValueError, match=said) as caught:
        Constitution.from_file(written(tmp_path, content))
    assert len(str(caught.value).splitlines()) == 1


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"constitution: no file .*none\.yaml"):
        Constitution.from_file(tmp_path / "none.yaml")


# In a trainer


def test_a_step_of_ppo_asks_the_frozen_reference():
    found = Constitution(principles())
    config = PPOConfig(critic="head", max_length=4, num_epochs=1, learning_rate=1e-2)
    ppo = PPO(tiny_model(), tiny_tokenizer(), found, config=config)
    assert found.judge.model is ppo.reference.model
    steps = []
    ppo.train(PROMPTS, num_steps=2, batch_size=4, progress=False, on_step=steps.append)
    for step in steps:
        names = [f"reward/constitution/{name}/mean" for name in ("asked", "short", "words")]
        parts = [step.metrics[name] for name in names]
        assert sum(parts) == pytest.approx(step.metrics["mean_reward"], abs=1e-5)
    rollout = steps[-1].rollout
    again = constitution().scores(rollout.prompts, rollout.completions)
    assert again == pytest.approx(steps[-1].scores.tolist(), abs=1e-5), "the start's judgement"
