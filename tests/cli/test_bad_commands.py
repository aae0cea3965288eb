"""Commands that cannot be run end in one line that names the flag, and status 2."""

from __future__ import annotations

import logging
import shutil
import sys
import time

import pytest
from command_line import PROMPTS, arguments, fails_in_a_line, lines, write
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from tiny_models import VOCAB_SIZE, tiny_classifier, tiny_tokenizer
from transformers import AutoModelForSequenceClassification

from ppo_fast.cli.main import COMMANDS, main, parse
from ppo_fast.models.pretrained import check_model
from ppo_fast.rewards.load import load_reward

# Commands and flags


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("trian", "did you mean train?"),
        ("dmeo", "did you mean demo?"),
        ("qqq", f"expected one of {', '.join(COMMANDS)}"),
    ],
)
def test_an_unknown_command_names_the_nearest(capsys, given, hint):
    expected = f"no command '{given}'; {hint}"
    assert fails_in_a_line(capsys, given) == expected
    assert fails_in_a_line(capsys, given, "--help") == expected, "no help of another command"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gamma", "2"], "--gamma: got 2.0, expected a number in [0, 1]"),
        (["--num-epochs", "0"], "--num-epochs: got 0, expected a whole number >= 1"),
        (["--critic", "top"], "--critic='top' is trained above a frozen trunk"),
        (["--top-p", "0"], "--top-p: got 0.0"),
        (["--device", "cud"], "--device: got 'cud', expected 'cpu', 'cuda', 'cuda:1', ... or"),
    ],
)
def test_a_value_out_of_range_names_its_flag(place, capsys, flags, message):
    assert fails_in_a_line(capsys, *arguments(*flags, device="cpu")).startswith(message)
    write(place / "run.yaml", "batch_size: 3")
    said = fails_in_a_line(capsys, *arguments("--config", "run.yaml", *flags, device="cpu"))
    assert said.startswith(message)


def test_a_plan_out_of_range_names_its_flag(place, capsys):
    said = fails_in_a_line(capsys, "plan", "--policy", "model", "--gamma", "2")
    assert said == "--gamma: got 2.0, expected a number in [0, 1]"


def test_an_error_is_one_line_without_control_characters(place, capsys):
    write(place / "my_reward.py", r"def length(p, c): raise ValueError('a\n\x1b[31mb')" + "\n")
    assert r"raised ValueError: a \x1b[31mb (" in fails_in_a_line(capsys, *arguments())


# Config files


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"gamma: [1\nb: }\n", "--config: run.yaml line 2, column 2 is not YAML: expected ','"),
        (b"\tgamma: 1", "--config: run.yaml line 1, column 1 is not YAML: found character"),
        (b"gamma: 1\n\xff", "--config: run.yaml is not YAML: 'utf-8' codec can't decode byte"),
        (b"a: !!python/object:os.x {}", "--config: run.yaml line 1, column 4 is not YAML: could"),
        (b"num_steps: abc", "run.yaml line 1: num_steps: got 'abc', expected a whole number"),
        (b"num_steps: 1.5", "run.yaml line 1: num_steps: got 1.5, expected a whole number"),
        (b"resume: 3", "--config: run.yaml line 1: resume: got 3, expected true or false"),
        (b"lora_rank: yes", "lora_rank: got True, expected a whole number, or null"),
        (b"output_dir: [a]", "--config: run.yaml line 1: output_dir: got ['a'], expected a path"),
        (b"adam_betas: 3", "--config: run.yaml line 1: adam_betas: got 3, expected two numbers"),
        (b"gamma: 2", "--config: run.yaml line 1: gamma: got 2, expected a number in [0, 1]"),
    ],
)
def test_a_config_file_that_cannot_be_read(place, capsys, text, message):
    (place / "run.yaml").write_bytes(text)
    assert message in fails_in_a_line(capsys, "train", "--config", "run.yaml")


def test_numbers_in_a_config_file_can_be_names(place):
    write(place / "run.yaml", "output_dir: 1\nreward_label: 2\nvalue_model:\nlora_rank: 4")
    run = parse(["train", "--config", "run.yaml"])
    assert (str(run.output_dir), run.reward_label) == ("1", "2")
    assert (run.value_model, run.lora_rank) == (None, 4)


# Prompts


def test_a_long_field_of_a_csv_file_is_a_prompt(place):
    rows = "".join(f"{prompt},{'a' * 140_000}\n" for prompt in PROMPTS)
    write(place / "p.csv", f"prompt,notes\n{rows}")
    main(arguments(prompts="p.csv", num_steps=1))
    assert {row["prompt"] for row in lines(place / "run/samples.jsonl")} <= set(PROMPTS)


def test_prompts_that_are_no_text(place, capsys):
    (place / "p.txt").write_bytes(b"\xff\xff\n")
    said = fails_in_a_line(capsys, *arguments(prompts="p.txt"))
    assert said.startswith("--prompts: p.txt cannot be read ('utf-8' codec can't decode")


# Models


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("modle", "--policy: no folder modle (did you mean model?), and HF_HUB_OFFLINE is set"),
        ("my_folder/modle", "--policy: no folder my_folder/modle (did you mean my_folder/model?)"),
        ("qqq/", "--policy: no folder qqq/"),
        ("a b", "--policy: no folder a b, and this is no name of the hub's"),
        ("my_folder", "--policy: the folder my_folder holds no model: no config.json"),
        ("prompts.txt", "--policy: prompts.txt is a file, expected a model's folder"),
    ],
)
@pytest.mark.parametrize("command", ["train", "plan", "env"])
def test_a_mistyped_model_folder(place, capsys, monkeypatch, command, given, message):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (place / "my_folder/model").mkdir(parents=True)
    command = arguments(policy=given) if command == "train" else [command, "--policy", given]
    assert fails_in_a_line(capsys, *command) == message


def hub_that_raises(monkeypatch, error):
    asked = []

    def model_info(self, repo_id, **_):
        asked.append(repo_id)
        if error is not None:
            raise error

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "model_info", model_info)
    return asked


def http_error(kind):
    error = kind.__new__(kind)
    Exception.__init__(error, "from the hub")
    return error


def test_a_hub_that_cannot_be_reached_is_asked_once(place, capsys, monkeypatch):
    asked = hub_that_raises(monkeypatch, ConnectionError("[Errno -2] Name not known"))
    start = time.perf_counter()
    said = fails_in_a_line(capsys, *arguments(policy="org/modle"))
    assert said == (
        "--policy: no folder org/modle, and the hub cannot be reached ([Errno -2] Name not known)"
    )
    assert asked == ["org/modle"]
    assert time.perf_counter() - start < 10, "not the half minute of five more tries"


def test_names_that_the_hub_has_not(place, monkeypatch):
    hub_that_raises(monkeypatch, http_error(RepositoryNotFoundError))
    with pytest.raises(FileNotFoundError, match="the hub has no model of this name that you may"):
        check_model("policy", "org/name")


@pytest.mark.parametrize("error", [None, http_error(HfHubHTTPError)])
def test_names_of_the_hub_are_left_to_from_pretrained(place, monkeypatch, error):
    asked = hub_that_raises(monkeypatch, error)
    check_model("policy", "org/name")
    check_model("policy", "gpt2")
    assert asked == ["org/name", "gpt2"]


def test_a_folder_is_never_asked_of_the_hub(place, monkeypatch):
    asked = hub_that_raises(monkeypatch, RuntimeError("asked"))
    check_model("policy", "model")
    assert asked == []


@pytest.mark.parametrize("flag", ["policy", "value_model", "reward"])
def test_truncated_weights(place, capsys, flag):
    shutil.copytree("model", "broken")
    whole = (place / "broken/model.safetensors").read_bytes()
    (place / "broken/model.safetensors").write_bytes(whole[: len(whole) // 2])
    said = fails_in_a_line(capsys, *arguments(**{flag: "broken"}))
    name = flag.replace("_", "-")
    assert said.startswith(f"--{name}: broken cannot be loaded (SafetensorError: ")


def test_a_model_config_that_is_no_json(place, capsys):
    write(place / "model/config.json", "{")
    for command in (arguments(), ["plan", "--policy", "model"]):
        assert fails_in_a_line(capsys, *command).startswith("--policy: model cannot be loaded (")


# Rewards

SCORE = "def score(prompts, completions):\n    return [1.0] * len(prompts)\n"


@pytest.mark.parametrize("name", ["./rew.py", "rew.py", "sub/rew.py", "sub/rew", "{place}/rew.py"])
def test_a_reward_in_a_file(place, name):
    (place / "sub").mkdir()
    for folder in (place, place / "sub"):
        write(folder / "rew_helper.py", SCORE)
        write(folder / "rew.py", "from rew_helper import score\n")
    try:
        main(arguments(reward=f"{name.format(place=place)}:score", num_steps=1))
    finally:
        for module in ("rew", "rew_helper"):
            sys.modules.pop(module, None)
    assert [row["score"] for row in lines(place / "run/samples.jsonl")] == [1.0, 1.0]


def test_a_file_may_have_the_name_of_an_imported_module(place):
    write(place / "json.py", SCORE)
    before = sys.modules["json"]
    assert load_reward("./json.py:score", "cpu")(["a"], ["b"]) == [1.0]
    assert sys.modules["json"] is before


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("./no.py:score", "--reward: no file no.py"),
        ("./my_reward.py:lenght", "file ./my_reward.py has no function 'lenght'; did you mean l"),
        ("my_reward.py", "--reward: got 'my_reward.py', expected my_reward.py:FUNCTION"),
        ("my_reward:", "--reward: got 'my_reward:', expected MODULE:FUNCTION or FILE.py:FUNCTION"),
        (":length", "--reward: got ':length', expected MODULE:FUNCTION or FILE.py:FUNCTION"),
        ("model", "--reward: model holds no sequence classifier: it has no weights score.weight"),
    ],
)
def test_a_reward_that_is_not_there(place, capsys, caplog, given, message):
    logging.getLogger("transformers").setLevel("ERROR")  # its report of missing weights
    assert message in fails_in_a_line(capsys, *arguments(reward=given))


@pytest.mark.parametrize("name", ["my_reward", "./my_reward.py"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\ndef length(:\n", "SyntaxError: invalid syntax ({place}/my_reward.py:2)"),
        ("x = 1\n1 / 0\n", "ZeroDivisionError: division by zero ({place}/my_reward.py:2)"),
        (
            "import json\nimport os\njson.loads('x')\n",
            "JSONDecodeError: Expecting value: line 1 column 1 (char 0) ({place}/my_reward.py:3)",
        ),
        (
            "import not_there_at_all\n",
            "ModuleNotFoundError: No module named 'not_there_at_all' ({place}/my_reward.py:1)",
        ),
        ("import sys\nsys.exit(3)\n", "SystemExit: 3 ({place}/my_reward.py:2)"),
    ],
)
def test_a_module_that_cannot_be_imported(place, capsys, name, text, message):
    write(place / "my_reward.py", text)
    said = fails_in_a_line(capsys, *arguments(reward=f"{name}:length"))
    assert said == f"--reward: importing {name} raised {message.format(place=place)}"


@pytest.fixture
def judge(place):
    """A folder with a classifier of three labels."""
    config = tiny_classifier(vocab_size=VOCAB_SIZE, layers=1, hidden=32).config
    config.id2label = {0: "bad", 1: "fair", 2: "good"}
    config.label2id = {name: i for i, name in config.id2label.items()}
    AutoModelForSequenceClassification.from_config(config).save_pretrained("judge")
    tiny_tokenizer().save_pretrained("judge")


def test_a_label_of_a_classifier(place, judge, capsys):
    said = fails_in_a_line(capsys, *arguments(reward="judge", num_steps=1))
    assert "has the labels bad, fair, good" in said
    assert "--reward-label" in said
    main(arguments("--reward-label", "good", reward="judge", num_steps=1))
    main(arguments("--reward-label", "2", reward="judge", num_steps=1, output_dir="by_index"))
    main(arguments("--reward-label", "bad", reward="judge", num_steps=1, output_dir="bad"))
    scores = {
        name: [row["score"] for row in lines(place / name / "samples.jsonl")]
        for name in ("run", "by_index", "bad")
    }
    assert scores["run"] == scores["by_index"] != scores["bad"]


def test_labels_that_are_not_there(place, judge, capsys):
    said = fails_in_a_line(capsys, *arguments("--reward-label", "best", reward="judge"))
    assert "got 'best', expected one of bad, fair, good" in said
    said = fails_in_a_line(capsys, *arguments("--reward-label", "good"))
    assert said == "--reward-label: my_reward:length is a function, which has no labels"


# Output folders


def test_an_output_folder_that_cannot_be_written(place, capsys):
    said = fails_in_a_line(capsys, *arguments(output_dir="prompts.txt"))
    assert said.startswith("--output-dir: prompts.txt cannot be written (")


def test_an_error_in_the_first_step_says_nothing_of_checkpoints(place, caplog, capsys):
    write(place / "my_reward.py", "def length(prompts, completions):\n    return 1 / 0\n")
    said = fails_in_a_line(capsys, *arguments())
    assert "reward_model length raised ZeroDivisionError" in said
    assert "checkpoint_dir" not in caplog.text
