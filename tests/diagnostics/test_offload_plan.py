"""Plans of runs that offload, and the table of what fits on which GPU."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_config, tiny_model, tiny_tokenizer
from tiny_trainer import count_letters

from ppo_fast import PPOConfig, PPOTrainer
from ppo_fast.cli.main import main
from ppo_fast.diagnostics import what_fits
from ppo_fast.diagnostics.memory_plan import MemoryPlan, plan_memory
from ppo_fast.learning.streamed import PIECE_BYTES
from ppo_fast.models import offload

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
SMALL = {
    "model_type": "llama",
    "vocab_size": 307,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def plan(*names, **changes):
    sizes = {
        "policy": 1,
        "reference": 2,
        "value_function": 4,
        "gradients": 8,
        "optimizer": 16,
        "trunk_states": 32,
        "cache": 64,
        "copies": 128,
        "kept_rollout": 256,
        "activations": 512,
        "logits": 1024,
        "reward_model": 2048,
        "piece": 10,
    }
    return MemoryPlan(**sizes | changes, offload=names)


def test_the_peak_with_offload():
    always = 1 + 4 + 32
    update = 8 + 256 + 512 + 1024
    assert plan().peak == always + 2 + 16 + 2048 + update
    assert plan("optimizer").peak == always + 2 + 2048 + update
    assert plan("optimizer", "reference").peak == always + 2048 + update
    assert plan("optimizer", "reference").host == 16 + 2
    everything = plan("optimizer", "reference", "reward")
    assert everything.peak == always + 256 + 2048, "while the reward model scores"
    assert everything.host == 16 + 2 + 2048
    assert plan().host == 0
    rollout = plan("reward", cache=5000)
    assert rollout.peak == always + 2 + 16 + 5000 + 128
    step = plan("optimizer", activations=0, logits=0, optimizer=3000, piece=900)
    assert step.peak == always + 2 + 2048 + 256 + 8 + 900
    assert plan("optimizer", activations=0, logits=0, piece=900).peak == (
        always + 2 + 2048 + 256 + 8 + 16
    ), "all moments are less than a piece"


@pytest.mark.parametrize("settings", [{}, {"num_layers_unfrozen": 1}])
def test_what_a_plan_rests_is_what_a_run_rests(monkeypatch, settings):
    monkeypatch.setattr(offload, "MOVED", offload.MOVED | {"cpu"})
    names = ("optimizer", "reference")
    config = PPOConfig(critic="head", max_length=6, offload=names, **settings)
    found = plan_memory(
        tiny_config("llama", layers=3), config, batch_size=3, prompt_length=4, device="cuda"
    )
    assert found.offload == names
    policy = tiny_model(layers=3)
    trainer = PPOTrainer(policy, None, count_letters, tiny_tokenizer(), "cpu", config=config)
    trainer.step(["The film was"] * 3)
    moments = sum(
        value.nbytes
        for optimizer in trainer.learner.optimizers.values()
        for state in optimizer.state.values()
        for value in state.values()
        if torch.is_tensor(value) and value.dim()
    )
    assert found.host == pytest.approx(trainer.reference.resting.nbytes + moments, rel=0.01)


def test_plans_of_the_config():
    def planned(device="cuda", **options):
        config = PPOConfig(max_length=8, **options)
        shape = tiny_config("llama", layers=2)
        sizes = {"batch_size": 2, "prompt_length": 8, "reward_bytes": 7}
        return plan_memory(shape, config, device=device, **sizes)

    without, everything = planned(), planned(offload=("optimizer", "reference", "reward"))
    assert without.host == 0
    assert everything.host == without.optimizer + without.reference + 7
    assert everything.peak < without.peak
    assert planned("cpu", offload=("optimizer",)) == planned("cpu"), "nothing moves there"
    assert without.piece == PIECE_BYTES


def test_a_piece_is_at_least_a_weight():
    shape = tiny_config("llama", layers=1, hidden=512)
    shape.vocab_size = 2**17
    found = plan_memory(shape, PPOConfig(max_length=8), batch_size=2, prompt_length=8)
    assert found.piece == 8 * 2**17 * 512 > PIECE_BYTES


def rows_of(text):
    """The cells of a table's rows, without its title."""
    cells = [re.split(" *[│┃|] *", line.strip())[1:-1] for line in text.splitlines()]
    return [[cell.strip() for cell in row] for row in cells if row and any(row)]


def command(capsys, *arguments):
    capsys.readouterr()
    main(["plan", *arguments])
    return rows_of(capsys.readouterr().out)


def test_the_command_prints_what_rests(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "300")
    tiny_config("llama", layers=2, hidden=512).save_pretrained(tmp_path)
    arguments = ("--policy", str(tmp_path), "--max-length", "8")
    without = {row[0] for row in command(capsys, *arguments)}
    rows = {row[0]: row[1:] for row in command(capsys, *arguments, "--offload", "optimizer")}
    assert not any("host" in name for name in without)
    assert rows["in host memory: optimizer"] == rows["optimizer"]
    assert {"offload", "piece"}.isdisjoint(rows)


def test_the_command_prints_what_fits(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(what_fits, "SHAPES", {"tiny": SMALL, "small": SMALL})
    monkeypatch.setattr(what_fits, "GPUS", (0.001, 12))
    head, *rows = command(capsys, "--sizes", "--max-length", "8", "--lora-rank", "2")
    assert head[:4] == ["model", "way", "peak", "fits"]
    assert [row[0] for row in rows] == ["tiny"] * 4 + ["small"] * 4
    assert [row[1] for row in rows[:4]] == [
        "QLoRA of rank 2, 4 bits",
        "LoRA of rank 2",
        "4 top layers",
        "all layers",
    ]
    assert rows[:4] == [["tiny", *row[1:]] for row in rows[4:]]
    assert {row[3] for row in rows} <= {"0.001", "12"}


def test_the_smallest_gpu():
    def of(size):
        return what_fits.smallest(MemoryPlan(round(size * 1e9 / 1.1), *[0] * 10))

    expected = {1: "12", 11.99: "12", 12.1: "24", 47.9: "48", 79: "80", 81: "-"}
    assert {size: of(size) for size in expected} == expected


def test_without_peft_there_is_no_lora(monkeypatch):
    monkeypatch.setattr(what_fits.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(what_fits, "SHAPES", {"tiny": SMALL})
    config = PPOConfig(max_length=8, compute_dtype="bfloat16")
    ways = what_fits.what_fits(config, batch_size=2, prompt_length=8)
    assert [way.name for way in ways] == ["4 top layers", "all layers"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--policy: is required, but with --sizes"),
        (["--sizes", "--policy", "m"], "--sizes: plans models of usual sizes, not --policy m"),
        (["--policy", "m", "--offload", "policy"], "offload"),
    ],
)
def test_bad_commands(capsys, arguments, message):
    with pytest.raises(SystemExit):
        main(["plan", *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("size", what_fits.SHAPES)
def test_the_page_has_what_the_command_prints(size, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(what_fits, "SHAPES", {size: what_fits.SHAPES[size]})
    text = PAGE.read_text("utf-8")
    line = re.search(r"^ppo-fast plan (--sizes .*)$", text, re.MULTILINE)[1]
    assert [row for row in rows_of(text) if row[0] == size] == command(capsys, *line.split())[1:]
