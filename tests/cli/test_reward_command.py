"""``ppo-fast reward``: from a file of pairs to a reward that ``train`` takes."""

from __future__ import annotations

import json

import pytest
from command_line import arguments, fails, fails_in_a_line, lines
from tiny_models import tiny_classifier, tiny_tokenizer
from tiny_pairs import tiny_pairs
from tiny_trainer import names

from ppo_fast.cli.main import main
from ppo_fast.rewards.fit import train as fit
from ppo_fast.rewards.load import load_reward


@pytest.fixture
def pairs(place):
    text = "\n".join(json.dumps(row) for row in tiny_pairs(60))
    (place / "pairs.jsonl").write_text(text, "utf-8")
    return place


def command(*more, **changes):
    flags = {
        "model": "model",
        "pairs": "pairs.jsonl",
        "output_dir": "out",
        "learning_rate": 0.003,
        "num_epochs": 2,
        "device": "cpu",
    } | changes
    named = [(f"--{name.replace('_', '-')}", str(v)) for name, v in flags.items() if v is not None]
    return ["reward", *(part for pair in named for part in pair), *more]


@pytest.mark.parametrize("kind", ["causal LM", "classifier"])
def test_the_command_writes_a_reward_that_train_takes(pairs, capsys, kind):
    if kind == "classifier":
        tiny_classifier().save_pretrained("model")
    main(command("--held-out", "0.2", "--eval-steps", "3"))
    said = capsys.readouterr().out
    assert [line.split()[1] for line in said.splitlines() if "held out" in line] == ["3", "6"]
    assert "accuracy 1.0000" in said.splitlines()[1]
    assert names(pairs / "out") == ["metrics.jsonl", "model"]
    metrics = lines(pairs / "out/metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3, 4, 5, 6]
    assert metrics[-1]["held_out/accuracy"] == 1
    assert metrics[-1]["held_out/loss"] < 0.2
    good, bad = load_reward("out/model", "cpu")(["The film was"] * 2, [" there good", " there bad"])
    assert good > bad + 2
    main(arguments(reward="out/model", num_steps=1))


def test_pairs_of_a_csv_file_and_held_out_ones_of_another(pairs, capsys):
    for name, count in (("pairs.csv", 20), ("others.csv", 7)):
        rows = [",".join((*row.values(), "0.5")) for row in tiny_pairs(count)]
        (pairs / name).write_text("\n".join(["prompt,chosen,rejected,margin", *rows]))
    main(command("--held-out", "others.csv", "--use-margin", pairs="pairs.csv", num_epochs=1))
    assert "step 2  held out: loss" in capsys.readouterr().out, "20 pairs are two steps"


def test_settings_reach_the_training(pairs, monkeypatch):
    given = {}

    def train(model, tokenizer, rows, **options):
        given.update(options, model=model, rows=rows)
        raise ValueError("enough")

    monkeypatch.setattr(fit, "train_reward_model", train)
    with pytest.raises(SystemExit):
        main(command("--held-out", "None", "--lora-rank", "3", "--centering", "0.01"))
    assert given["held_out"] is None
    config = given["config"]
    assert (config.lora_rank, config.centering, config.learning_rate) == (3, 0.01, 0.003)
    assert type(given["model"]).__name__ == "LlamaForSequenceClassification"
    assert given["model"].config.num_labels == 1
    assert given["rows"] == tiny_pairs(60)


def test_a_run_that_fails_leaves_no_model(pairs, capsys, monkeypatch):
    from transformers import PreTrainedModel

    save = PreTrainedModel.save_pretrained

    def half(self, folder, **options):
        save(self, folder, **options)
        raise OSError("disk full")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", half)
    said = "ppo-fast: export: out/model cannot be written (disk full); what it held before stays"
    assert said in fails(capsys, *command(num_epochs=1)).splitlines()
    assert names(pairs / "out") == ["metrics.jsonl"]
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save)
    main(command(num_epochs=1))
    assert [row["step"] for row in lines(pairs / "out/metrics.jsonl")] == [1, 2, 3, 4], "of one run"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "--model: is required"),
        ({"pairs": None}, "--pairs: is required"),
        ({"model": "./modle"}, "--model: no folder ./modle"),
        ({"pairs": "missing.jsonl"}, "--pairs: no file missing.jsonl"),
        ({"held_out": "missing.jsonl"}, "--held-out: no file missing.jsonl"),
        ({"held_out": "1.5"}, "--held-out: got 1.5, expected a share in (0, 1)"),
        ({"batch_size": "0"}, "--batch-size: got 0, expected a whole number >= 1"),
        ({"num_layers_unfrozen": "9"}, "--num-layers-unfrozen: got 9, expected 1 to"),
        ({"device": "cud"}, "--device: got 'cud'"),
        ({"pairs": "prompts.txt"}, 'pairs[0]: has no "chosen"; it has the columns prompt'),
    ],
)
def test_bad_flags_are_one_line(pairs, capsys, changes, message):
    said = fails_in_a_line(capsys, *command(**changes))
    assert said.startswith(message)


@pytest.mark.parametrize("lost", ["score.weight", "model.norm.weight"])
def test_a_classifier_without_some_weights_is_refused(pairs, capsys, lost):
    classifier = tiny_classifier()
    state = {name: w for name, w in classifier.state_dict().items() if name != lost}
    classifier.save_pretrained("model", state_dict=state)
    capsys.readouterr()  # the bars of saving
    said = fails_in_a_line(capsys, *command())
    assert said == f"--model: model has no weights {lost}"


def test_a_row_that_is_no_pair_is_named(pairs, capsys):
    with (pairs / "pairs.jsonl").open("a") as file:
        file.write('\n{"prompt": "a", "chosen": "b"}')
    said = fails_in_a_line(capsys, *command())
    assert said == 'pairs[60]: has no "rejected"; it has the columns prompt, chosen'


def test_a_trained_model_is_not_overwritten(pairs, capsys):
    (pairs / "out/model").mkdir(parents=True)
    said = fails_in_a_line(capsys, *command())
    assert said == "--output-dir: out holds a trained model; name another folder"


def test_chats_come_by_the_template_of_the_model(pairs):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained("model")
    rows = [{s: [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r[s]}]
             for s in ("chosen", "rejected")} for r in tiny_pairs(20)]  # fmt: skip
    (pairs / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    main(command(num_epochs=1))
    assert load_reward("out/model", "cpu").format == "chat"


@pytest.mark.parametrize("held_out", ["0.2", "None"])
def test_a_card_says_how_the_model_was_trained(pairs, held_out):
    main(command("--held-out", held_out, "--eval-steps", "1"))
    card = (pairs / "out/model/README.md").read_text("utf-8")
    assert "pipeline_tag: text-classification" in card
    assert "| pairs&#46;jsonl | 60 |" in card or "| pairs.jsonl | 60 |" in card
    assert "accuracy" in card
    assert (pairs / "out/model/curve.svg").is_file()
