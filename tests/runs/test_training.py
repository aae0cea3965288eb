"""PPOTrainer.train: its result, its batches, and checkpoints on the way."""

from __future__ import annotations

from collections import Counter

import pytest
from tiny_trainer import PROMPTS, changed, names, tiny_trainer, weights

QUIET = {"progress": False}
HISTORY = ["policy_losses", "value_losses", "kl_divergences", "mean_rewards", "step_avg_rewards"]


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
        "stopped_by",
        "evaluations",
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


def test_statistics_are_lists_and_their_means(tmp_path):
    trainer = tiny_trainer()
    assert trainer.get_statistics() == trainer.stats | dict.fromkeys(
        ("avg_policy_loss", "avg_value_loss", "avg_kl_divergence", "avg_reward"), 0.0
    )
    steps = [trainer.train_step(PROMPTS) for _ in range(3)]
    lists = {
        "policy_losses": "policy_loss",
        "value_losses": "value_loss",
        "kl_divergences": "kl_divergence",
        "mean_rewards": "mean_reward",
        "mean_advantages": "mean_advantage",
    }
    expected = {name: [step[metric] for step in steps] for name, metric in lists.items()}
    assert trainer.stats == {"total_steps": 3} | expected
    found = trainer.get_statistics()
    assert found["avg_reward"] == pytest.approx(sum(expected["mean_rewards"]) / 3)
    found["mean_rewards"].append(7.0)
    assert trainer.stats == {"total_steps": 3} | expected, "a copy"
    again = tiny_trainer()
    again.load_checkpoint(trainer.save_checkpoint(tmp_path, 3))
    assert again.stats == trainer.stats


def test_statistics_of_older_checkpoints():
    """They held sums over the steps: the means stay."""
    trainer = tiny_trainer()
    state = trainer.progress.state_dict()
    state["stats"] = {"total_steps": 4.0, "total_reward": 2.0, "total_kl_divergence": 1.0}
    state["stats"] |= {"total_policy_loss": -0.4, "total_value_loss": 8.0}
    trainer.progress.load_state_dict(state)
    found = trainer.get_statistics()
    means = (found["avg_reward"], found["avg_kl_divergence"], found["avg_value_loss"])
    assert means == (0.5, 0.25, 2.0)
    trainer.train_step(PROMPTS)
    assert trainer.stats["total_steps"] == len(trainer.stats["mean_rewards"]) == 5


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


def test_checkpoints_come_every_few_steps_and_after_the_last(tmp_path):
    folder = tmp_path / "not" / "there" / "yet"
    trainer = tiny_trainer()
    trainer.train(PROMPTS, 5, 2, checkpoint_dir=str(folder), checkpoint_freq=2, **QUIET)
    assert names(folder) == [f"ppo_checkpoint_step_{step}.pt" for step in (2, 4, 5)]
    # steps count on over calls
    trainer.train(PROMPTS, 1, 2, checkpoint_dir=folder, checkpoint_freq=2, **QUIET)
    assert names(folder)[-1] == "ppo_checkpoint_step_6.pt"


def test_no_folder_no_checkpoints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_trainer().train(PROMPTS, 1, 2, checkpoint_freq=1, **QUIET)
    assert names(tmp_path) == []
