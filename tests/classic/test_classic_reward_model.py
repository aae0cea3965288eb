"""The classic interface for reward models: its names, arguments and results."""

from __future__ import annotations

import inspect
import logging
import math
import sys

import pytest
import torch
from tiny_models import tiny_tokenizer
from tiny_pairs import tiny_pairs
from tiny_trainer import changed, names, tiny_reward_model, weights

from ppo_fast import RewardModel as OurRewardModel
from ppo_fast.classic.reward_model import (
    RewardModel,
    RewardModelTrainer,
    compute_reward_loss,
    evaluate_reward_model,
    train_reward_model,
)
from ppo_fast.models.setup import disable_dropout

TOKENIZER = tiny_tokenizer()
DATA, OTHERS = (
    [
        {"prompt": r["prompt"], "response_chosen": r["chosen"], "response_rejected": r["rejected"]}
        for r in tiny_pairs(count, seed)
    ]
    for count, seed in ((60, 0), (20, 1))
)
FAST = {"learning_rate": 5e-3, "batch_size": 8}


def test_signatures_are_those_of_the_original():
    assert RewardModel is OurRewardModel
    arguments = {
        train_reward_model: "reward_model training_data tokenizer num_epochs=3 batch_size=4 "
        "learning_rate=1e-05 device=None validation_data=None max_length=512 "
        "gradient_accumulation_steps=1 log_interval=10",
        evaluate_reward_model: "reward_model evaluation_data tokenizer device batch_size=4 "
        "max_length=512",
        RewardModelTrainer: "reward_model tokenizer device=None learning_rate=1e-05 batch_size=4",
        RewardModelTrainer.train: "self training_data num_epochs=3 validation_split=0.1 "
        "validation_data=None save_dir=None save_best_only=True early_stopping_patience=None",
        compute_reward_loss: "reward_chosen reward_rejected",
        RewardModel.get_rewards: "self prompts responses tokenizer device max_length=512",
    }
    for function, expected in arguments.items():
        found = [
            name if p.default is p.empty else f"{name}={p.default}"
            for name, p in inspect.signature(function).parameters.items()
        ]
        assert " ".join(found) == expected


def test_the_loss():
    found = compute_reward_loss(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0]))
    assert float(found) == pytest.approx((math.log1p(math.exp(-1)) + math.log1p(math.exp(2))) / 2)


def test_training_and_evaluation():
    model = tiny_reward_model()
    disable_dropout(model)
    result = train_reward_model(model, DATA, TOKENIZER, validation_data=OTHERS, **FAST)
    assert result["epochs"] == [1, 2, 3]
    assert {len(values) for values in result.values()} == {3}
    assert result.keys() == {
        "losses",
        "accuracy",
        "epochs",
        "validation_losses",
        "validation_accuracy",
    }
    assert result["losses"][0] > 2 * result["losses"][-1]
    assert result["validation_accuracy"][-1] >= 0.95
    loss, accuracy = evaluate_reward_model(model, OTHERS, TOKENIZER, "cpu")
    assert loss == pytest.approx(result["validation_losses"][-1], rel=1e-4)
    assert accuracy == result["validation_accuracy"][-1]
    rewards = [
        model.get_rewards(
            [r["prompt"] for r in OTHERS], [r[side] for r in OTHERS], TOKENIZER, "cpu"
        )
        for side in ("response_chosen", "response_rejected")
    ]
    assert float(compute_reward_loss(*rewards)) == pytest.approx(loss, rel=1e-4), "the same tokens"


def test_accumulated_steps_are_larger_batches():
    runs = []
    for sizes in ({"batch_size": 2, "gradient_accumulation_steps": 3}, {"batch_size": 6}):
        model = tiny_reward_model()
        train_reward_model(model, DATA[:12], TOKENIZER, 1, learning_rate=1e-3, **sizes)
        runs.append(weights(model))
    for name, weight in runs[0].items():
        torch.testing.assert_close(weight, runs[1][name], rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="gradient_accumulation_steps: got 0"):
        train_reward_model(model, DATA, TOKENIZER, gradient_accumulation_steps=0)


def test_log_lines(caplog):
    with caplog.at_level(logging.INFO):
        train_reward_model(tiny_reward_model(), DATA[:24], TOKENIZER, 1, log_interval=3)
    assert [r.getMessage()[:7] for r in caplog.records] == ["step 3:", "step 6:"]


def test_get_rewards_cuts_the_beginning_with_a_warning(caplog):
    model = tiny_reward_model().eval()
    found = model.get_rewards(["x" * 40, "a"], [" was", " so"], TOKENIZER, "cpu", max_length=20)
    ids = torch.tensor([TOKENIZER("x" * 40 + " was")["input_ids"][-20:]])
    torch.testing.assert_close(found[:1], model(ids).detach(), rtol=1e-5, atol=1e-5)
    (record,) = caplog.records
    assert "the beginning of 1 of 2 texts is cut, to max_length=20" in record.getMessage()


def test_the_trainer(tmp_path):
    model = tiny_reward_model()
    trainer = RewardModelTrainer(model, TOKENIZER, **FAST)
    result = trainer.train(
        DATA, num_epochs=2, save_dir=tmp_path / "new/folder", save_best_only=False
    )
    assert trainer.training_history == result
    assert result["epochs"] == [1, 2]
    assert names(tmp_path / "new/folder") == [
        "best_model.pt",
        "checkpoint_epoch_1.pt",
        "checkpoint_epoch_2.pt",
    ]
    found = trainer.evaluate(OTHERS)
    assert found.keys() == {"loss", "accuracy"}
    assert found["accuracy"] >= 0.9
    trainer.train(DATA, num_epochs=1, validation_split=0)
    assert trainer.training_history["epochs"] == [1, 2, 3]
    assert len(trainer.training_history["validation_losses"]) == 2
    trainer.load_checkpoint(tmp_path / "new/folder/checkpoint_epoch_2.pt")
    assert trainer.evaluate(OTHERS) == found
    assert trainer.training_history == result


def test_the_best_epoch_is_saved(tmp_path):
    """Validation pairs the other way round: each epoch is worse than the one before."""
    swapped = [
        r | {"response_chosen": r["response_rejected"], "response_rejected": r["response_chosen"]}
        for r in OTHERS
    ]
    model = tiny_reward_model()
    trainer = RewardModelTrainer(model, TOKENIZER, **FAST)
    result = trainer.train(
        DATA, 9, validation_data=swapped, save_dir=tmp_path, early_stopping_patience=2
    )
    assert result["epochs"] == [1, 2, 3]
    assert names(tmp_path) == ["best_model.pt"]
    restored = weights(model)
    trainer.load_checkpoint(tmp_path / "best_model.pt")
    assert not changed(model, restored)
    assert trainer.evaluate(swapped)["loss"] == pytest.approx(result["validation_losses"][0])


class Evil:
    def __reduce__(self):
        return (print, ("code was run",))


def test_files_that_are_no_checkpoints(tmp_path, capsys):
    trainer = RewardModelTrainer(tiny_reward_model(), TOKENIZER)
    before = weights(trainer.reward_model)
    torch.save(Evil(), tmp_path / "evil.pt")
    (tmp_path / "half.pt").write_bytes(b"PK\x03\x04")
    torch.save({"weights": 1}, tmp_path / "other.pt")
    others = {
        "list.pt": {"reward_model": [1, 2], "training_history": {}},
        "numbers.pt": {"reward_model": {"a": 1}, "training_history": {}},
        "history.pt": {"reward_model": before, "training_history": [1]},
        "losses.pt": {"reward_model": before, "training_history": {"losses": 1}},
        "rows.pt": [1],
        "tensor.pt": torch.zeros(2),
    }
    for name, contents in others.items():
        torch.save(contents, tmp_path / name)
    for name in ("evil.pt", "half.pt", "other.pt", *others):
        with pytest.raises(ValueError, match=f"{name} is no checkpoint of a RewardModelTrainer"):
            trainer.load_checkpoint(tmp_path / name)
    other = RewardModelTrainer(tiny_reward_model(), TOKENIZER)
    other.reward_model.reward_head[3] = torch.nn.Linear(256, 2)
    other.save_checkpoint(tmp_path / "wide.pt")
    with pytest.raises(ValueError, match="holds the weights of another model"):
        trainer.load_checkpoint(tmp_path / "wide.pt")
    with pytest.raises(FileNotFoundError, match="no file"):
        trainer.load_checkpoint(tmp_path / "missing.pt")
    assert "code was run" not in capsys.readouterr().out
    assert not changed(trainer.reward_model, before)
    assert trainer.training_history == {}


def test_the_plot(tmp_path, monkeypatch):
    trainer = RewardModelTrainer(tiny_reward_model(), TOKENIZER)
    with pytest.raises(ValueError, match="is empty; call train"):
        trainer.plot_training_history()
    trainer.training_history = {
        "losses": [0.7, 0.5],
        "accuracy": [0.5, 0.8],
        "epochs": [1, 2],
        "validation_losses": [0.7, 0.6],
        "validation_accuracy": [0.5, 0.7],
    }
    pytest.importorskip("matplotlib")
    figure = trainer.plot_training_history(tmp_path / "history.png")
    assert (tmp_path / "history.png").stat().st_size > 1000
    lines = {a.get_title(): [list(line.get_ydata()) for line in a.lines] for a in figure.axes}
    assert lines == {"Loss": [[0.7, 0.5], [0.7, 0.6]], "Accuracy": [[0.5, 0.8], [0.5, 0.7]]}
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match="pip install matplotlib"):
        trainer.plot_training_history()


def test_bad_arguments():
    with pytest.raises(ValueError, match="batch_size: got 0"):
        RewardModelTrainer(tiny_reward_model(), TOKENIZER, batch_size=0)
    with pytest.raises(ValueError, match=r'pairs\[0\]: has no "rejected"'):
        train_reward_model(
            tiny_reward_model(), [{"prompt": "a", "response_chosen": "b"}], TOKENIZER
        )
