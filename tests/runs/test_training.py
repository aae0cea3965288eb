"""PPOTrainer.train: its result, its batches, checkpoints on the way, Ctrl-C and errors."""

from __future__ import annotations

import signal
import threading
from collections import Counter

import pytest
import torch
from tiny_trainer import PROMPTS, changed, count_letters, tiny_trainer, weights

from ppo_fast.runs import checkpoint, loop

QUIET = {"progress": False}
HISTORY = ["policy_losses", "value_losses", "kl_divergences", "mean_rewards", "step_avg_rewards"]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def batches_of(trainer):
    """The prompts of every later step."""
    seen = []
    score = trainer.reward_model
    trainer.reward_model = lambda prompts, texts: (seen.append(prompts), score(prompts, texts))[1]
    return seen


# The result


def test_result():
    trainer = tiny_trainer()
    steps = []
    result = trainer.train(PROMPTS, num_steps=3, batch_size=2, on_step=steps.append, **QUIET)
    assert result.keys() == {
        "training_history",
        "final_stats",
        "final_avg_reward",
        "final_kl_divergence",
        "interrupted",
    }
    history = result["training_history"]
    assert sorted(history) == sorted(HISTORY)
    for name, metric in {
        "policy_losses": "policy_loss",
        "value_losses": "value_loss",
        "kl_divergences": "kl_divergence",
        "mean_rewards": "mean_reward",
    }.items():
        assert history[name] == [step.metrics[metric] for step in steps]
        assert len(history[name]) == 3
    assert [step.number for step in steps] == [1, 2, 3]
    assert all(len(step.scores) == len(step.rollout.completions) == 2 for step in steps)
    assert all(step.rollout.trunk_states is None for step in steps)
    rewards = history["mean_rewards"]
    assert len(set(rewards)) == 3
    running = [sum(rewards[: n + 1]) / (n + 1) for n in range(3)]
    assert history["step_avg_rewards"] == pytest.approx(running)
    final = result["final_stats"]
    assert trainer.stats.items() <= final.items()
    assert trainer.get_statistics().items() <= final.items()
    assert {"avg_reward", "avg_kl_divergence", "avg_policy_loss", "avg_value_loss"} <= final.keys()
    assert result["final_avg_reward"] == pytest.approx(running[-1])
    assert result["final_kl_divergence"] == steps[-1].metrics["kl_divergence"]
    assert result["interrupted"] is False


def test_statistics_run_on_over_calls():
    trainer = tiny_trainer()
    rewards = []
    for _ in range(2):
        result = trainer.train(PROMPTS, num_steps=2, batch_size=2, **QUIET)
        rewards += result["training_history"]["mean_rewards"]
        assert len(result["training_history"]["policy_losses"]) == 2
    assert result["final_stats"]["total_steps"] == 4
    assert result["final_avg_reward"] == pytest.approx(sum(rewards) / 4)


def test_arguments_reach_the_steps():
    trainer = tiny_trainer()
    optimizer_steps = []
    trainer.policy_optimizer.register_step_post_hook(lambda *a: optimizer_steps.append(1))
    trainer.train(
        PROMPTS,
        num_steps=2,
        batch_size=3,
        num_epochs_per_batch=3,
        max_length=2,
        temperature=0.5,
        **QUIET,
    )
    assert len(optimizer_steps) == 6
    assert trainer.last_rollout.sampling.max_length == 2
    assert trainer.last_rollout.sampling.temperature == 0.5
    assert len(trainer.last_rollout.prompts) == 3


@pytest.mark.parametrize("progress", [True, False])
def test_progress_bar(capsys, monkeypatch, progress):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    tiny_trainer().train(PROMPTS, num_steps=2, batch_size=2, progress=progress)
    shown = capsys.readouterr().err
    assert ("2/2" in shown) == progress
    assert ("reward" in shown) == progress


def test_an_evaluation_between_steps_changes_no_later_draw():
    alone, watched = tiny_trainer(), tiny_trainer()
    alone.train(PROMPTS, num_steps=3, batch_size=2, **QUIET)
    watched.train(
        PROMPTS,
        num_steps=3,
        batch_size=2,
        on_step=lambda _: watched.compute_values(*evaluated(watched)),
        **QUIET,
    )
    assert watched.progress.sequences_outside == 9
    assert not changed(watched.policy_model, weights(alone.policy_model))


def evaluated(trainer):
    rollout = trainer.rollout(PROMPTS[:3])
    return rollout.prompts, rollout.completions


def test_rollouts_outside_of_steps_differ():
    trainer = tiny_trainer()
    first, second = (trainer.rollout(PROMPTS).completions for _ in range(2))
    assert first != second


# Batches


def test_every_prompt_comes_once_before_any_comes_again():
    trainer = tiny_trainer()
    seen = batches_of(trainer)
    trainer.train(PROMPTS, num_steps=5, batch_size=2, **QUIET)
    assert [len(batch) for batch in seen] == [2] * 5
    drawn = [prompt for batch in seen for prompt in batch]
    rounds = drawn[:5], drawn[5:]
    for order in rounds:
        assert sorted(order) == sorted(PROMPTS)
    assert rounds[0] != rounds[1], "each round in an order of its own"
    assert PROMPTS not in rounds, "a random order"


def test_order_follows_the_seed():
    orders = []
    for seed in (0, 0, 1):
        trainer = tiny_trainer(seed=seed)
        seen = batches_of(trainer)
        trainer.train(PROMPTS, num_steps=1, batch_size=5, **QUIET)
        orders.append(seen[0])
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("batch_size", [5, 6, 100])
def test_a_batch_larger_than_the_list_is_the_list(batch_size):
    trainer = tiny_trainer()
    seen = batches_of(trainer)
    trainer.train(PROMPTS, num_steps=2, batch_size=batch_size, **QUIET)
    assert [Counter(batch) for batch in seen] == [Counter(PROMPTS)] * 2


# Checkpoints


def test_checkpoints_come_every_few_steps(tmp_path):
    folder = tmp_path / "not" / "there" / "yet"
    trainer = tiny_trainer()
    trainer.train(PROMPTS, 5, 2, checkpoint_dir=str(folder), checkpoint_freq=2, **QUIET)
    assert names(folder) == ["ppo_checkpoint_step_2.pt", "ppo_checkpoint_step_4.pt"]
    # steps count on over calls
    trainer.train(PROMPTS, 1, 2, checkpoint_dir=folder, checkpoint_freq=2, **QUIET)
    assert names(folder)[-1] == "ppo_checkpoint_step_6.pt"


def test_no_folder_no_checkpoints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_trainer().train(PROMPTS, 1, 2, checkpoint_freq=1, **QUIET)
    assert names(tmp_path) == []


# Ctrl-C


def ctrl_c_at(step, times=1):
    """A reward that is interrupted in one step."""
    calls = []

    def reward(prompts, completions):
        calls.append(1)
        if len(calls) == step:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
        return count_letters(prompts, completions)

    return reward


@pytest.fixture
def handler():
    """The handler of SIGINT, which must be the same before and after the test."""
    before = signal.getsignal(signal.SIGINT)
    yield before
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_finishes_the_step_and_keeps_it(tmp_path, handler, caplog):
    undisturbed = tiny_trainer()
    undisturbed.train(PROMPTS, num_steps=2, batch_size=2, **QUIET)
    trainer = tiny_trainer(ctrl_c_at(2))
    result = trainer.train(PROMPTS, num_steps=9, batch_size=2, checkpoint_dir=tmp_path, **QUIET)
    assert result["interrupted"] is True
    assert len(result["training_history"]["mean_rewards"]) == 2
    assert trainer.stats == undisturbed.stats
    assert not changed(trainer.policy_model, weights(undisturbed.policy_model))
    assert names(tmp_path) == ["ppo_checkpoint_step_2.pt"]
    said = caplog.text
    assert "Ctrl-C" in said
    assert str(tmp_path / "ppo_checkpoint_step_2.pt") in said
    assert "step 2" in said
    fresh = tiny_trainer()
    assert fresh.load_checkpoint(tmp_path / "ppo_checkpoint_step_2.pt") == 2
    assert not changed(fresh.policy_model, weights(trainer.policy_model))


def test_ctrl_c_between_steps(tmp_path, handler):
    trainer = tiny_trainer()
    result = trainer.train(
        PROMPTS,
        num_steps=9,
        batch_size=2,
        checkpoint_dir=tmp_path,
        on_step=lambda step: signal.raise_signal(signal.SIGINT),
        **QUIET,
    )
    assert result["interrupted"] is True
    assert names(tmp_path) == ["ppo_checkpoint_step_1.pt"]


def test_ctrl_c_without_a_folder_says_where_the_weights_are(handler, caplog):
    trainer = tiny_trainer(ctrl_c_at(1))
    result = trainer.train(PROMPTS, num_steps=9, batch_size=2, **QUIET)
    assert result["interrupted"] is True
    assert "the weights are in the policy" in caplog.text


def test_ctrl_c_finishes_the_write_in_hand(tmp_path, handler, monkeypatch):
    write = torch.save

    def interrupted_write(*args):
        signal.raise_signal(signal.SIGINT)
        write(*args)

    monkeypatch.setattr(torch, "save", interrupted_write)
    trainer = tiny_trainer()
    # the write when stopping would be interrupted again: the second Ctrl-C
    monkeypatch.setattr(loop, "_keep", lambda *args: None)
    result = trainer.train(
        PROMPTS, num_steps=9, batch_size=2, checkpoint_dir=tmp_path, checkpoint_freq=2, **QUIET
    )
    assert result["interrupted"] is True
    assert names(tmp_path) == ["ppo_checkpoint_step_2.pt"]
    assert checkpoint.load(tmp_path / "ppo_checkpoint_step_2.pt")["step"] == 2


def test_second_ctrl_c_stops_at_once(tmp_path, handler):
    trainer = tiny_trainer(ctrl_c_at(3, times=2))
    with pytest.raises(KeyboardInterrupt):
        trainer.train(
            PROMPTS, num_steps=9, batch_size=2, checkpoint_dir=tmp_path, checkpoint_freq=1, **QUIET
        )
    assert names(tmp_path) == ["ppo_checkpoint_step_1.pt", "ppo_checkpoint_step_2.pt"]
    assert trainer.stats["total_steps"] == 2


def test_second_ctrl_c_in_a_write_leaves_no_partial_file(tmp_path, handler, monkeypatch):
    trainer = tiny_trainer()
    trainer.train(PROMPTS, 1, 2, checkpoint_dir=tmp_path, checkpoint_freq=1, **QUIET)
    before = (tmp_path / "ppo_checkpoint_step_1.pt").read_bytes()

    def broken_off(payload, file):
        file.write(b"half of a checkpoint")
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(torch, "save", broken_off)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(PROMPTS, 9, 2, checkpoint_dir=tmp_path, checkpoint_freq=1, **QUIET)
    assert names(tmp_path) == ["ppo_checkpoint_step_1.pt"]
    assert (tmp_path / "ppo_checkpoint_step_1.pt").read_bytes() == before


def test_handler_of_the_user_comes_back(handler):
    mine = lambda number, frame: None  # noqa: E731
    signal.signal(signal.SIGINT, mine)
    try:
        tiny_trainer().train(PROMPTS, 1, 2, **QUIET)
        assert signal.getsignal(signal.SIGINT) is mine
        with pytest.raises(RuntimeError):
            tiny_trainer(failing_at(1)).train(PROMPTS, 1, 2, **QUIET)
        assert signal.getsignal(signal.SIGINT) is mine
    finally:
        signal.signal(signal.SIGINT, handler)


def test_trains_outside_the_main_thread(handler):
    results = []
    thread = threading.Thread(
        target=lambda: results.append(tiny_trainer().train(PROMPTS, 1, 2, **QUIET))
    )
    thread.start()
    thread.join()
    assert results[0]["interrupted"] is False


# Errors


def failing_at(step):
    calls = []

    def reward(prompts, completions):
        calls.append(1)
        if len(calls) == step:
            raise ConnectionError("the judge is asleep")
        return count_letters(prompts, completions)

    return reward


def test_an_error_keeps_what_was_trained(tmp_path, handler, caplog):
    undisturbed = tiny_trainer()
    undisturbed.train(PROMPTS, num_steps=2, batch_size=2, **QUIET)
    trainer = tiny_trainer(failing_at(3))
    with pytest.raises(RuntimeError, match="the judge is asleep") as caught:
        trainer.train(PROMPTS, num_steps=9, batch_size=2, checkpoint_dir=tmp_path, **QUIET)
    assert isinstance(caught.value.__cause__, ConnectionError)
    assert names(tmp_path) == ["ppo_checkpoint_step_2.pt"]
    said = caplog.text
    assert "step 2" in said
    assert str(tmp_path / "ppo_checkpoint_step_2.pt") in said
    fresh = tiny_trainer()
    assert fresh.load_checkpoint(tmp_path / "ppo_checkpoint_step_2.pt") == 2
    assert not changed(fresh.policy_model, weights(undisturbed.policy_model))


def test_going_on_after_an_error_repeats_the_step(tmp_path):
    undisturbed = tiny_trainer()
    expected = undisturbed.train(PROMPTS, num_steps=4, batch_size=2, **QUIET)
    trainer = tiny_trainer(failing_at(3))
    with pytest.raises(RuntimeError):
        trainer.train(PROMPTS, num_steps=4, batch_size=2, checkpoint_dir=tmp_path, **QUIET)
    resumed = tiny_trainer()
    resumed.load_checkpoint(tmp_path / "ppo_checkpoint_step_2.pt")
    for again in (trainer, resumed):  # the same trainer, and one from the checkpoint
        found = again.train(PROMPTS, num_steps=2, batch_size=2, **QUIET)
        history = found["training_history"]["mean_rewards"]
        assert history == expected["training_history"]["mean_rewards"][2:]
        assert not changed(again.policy_model, weights(undisturbed.policy_model))


def test_an_error_before_the_first_step_writes_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="asleep"):
        tiny_trainer(failing_at(1)).train(PROMPTS, 9, 2, checkpoint_dir=tmp_path, **QUIET)
    assert names(tmp_path) == []


def test_an_error_of_on_step_keeps_what_was_trained(tmp_path):
    def full_disk(step):
        raise OSError("no space left")

    trainer = tiny_trainer()
    with pytest.raises(OSError, match="no space left"):
        trainer.train(PROMPTS, 9, 2, checkpoint_dir=tmp_path, on_step=full_disk, **QUIET)
    assert names(tmp_path) == ["ppo_checkpoint_step_1.pt"]


def test_an_error_amid_an_update_leaves_the_checkpoint_of_its_step(tmp_path, monkeypatch):
    trainer = tiny_trainer()
    arguments = {"batch_size": 2, "checkpoint_dir": tmp_path, "checkpoint_freq": 1, **QUIET}
    trainer.train(PROMPTS, num_steps=1, **arguments)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()

    def half_an_update(*args, **kwargs):
        next(trainer.policy_model.parameters()).data.zero_()
        raise FloatingPointError("nan")

    monkeypatch.setattr("ppo_fast.learning.learner.Learner._train_on", half_an_update)
    with pytest.raises(FloatingPointError):
        trainer.train(PROMPTS, num_steps=1, **arguments)
    assert file.read_bytes() == whole


def test_a_file_of_another_run_does_not_count_as_written(tmp_path, handler):
    stale = tmp_path / "ppo_checkpoint_step_1.pt"
    stale.write_bytes(b"of another run")
    trainer = tiny_trainer(failing_at(2))
    with pytest.raises(RuntimeError):
        trainer.train(PROMPTS, num_steps=3, batch_size=2, checkpoint_dir=tmp_path, **QUIET)
    assert tiny_trainer().load_checkpoint(stale) == 1
