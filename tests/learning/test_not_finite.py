"""NaN and infinity reach no weight, no moment and no checkpoint."""

import pytest
import torch
from tiny_trainer import PROMPTS, changed, count_letters, tiny_trainer, weights
from whole_state import assert_is, everything

from ppo_fast.nonfinite import NotFiniteError


def poison(module, times, factor=float("nan")):
    """Spoil the gradient of a module's first weight in the backward passes that ``times`` has."""
    name, weight = next(iter(module.named_parameters()))
    calls = iter(range(1000))
    weight.register_hook(lambda g: g * factor if next(calls) in times else g)
    return name


@pytest.mark.parametrize("critic", ["model", "head"])
def test_neither_moves_where_the_value_functions_gradient_is_nan(critic):
    trainer = tiny_trainer(critic=critic, num_minibatches=1)
    value = trainer.critic.module
    before = weights(trainer.policy_model), weights(value)
    name = poison(value, {0})
    message = rf"^step 1: .*value nan; .*the first .* is that of {name} of the value; likely cause"
    with pytest.raises(NotFiniteError, match=message):
        trainer.train_step(PROMPTS)
    assert not changed(trainer.policy_model, before[0])
    assert not changed(value, before[1])


def test_apart_the_policy_has_moved_when_the_value_models_gradient_is_nan():
    trainer = tiny_trainer(check_gradients_together=False)
    before = weights(trainer.policy_model), weights(trainer.value_model)
    poison(trainer.value_model, {0})
    with pytest.raises(NotFiniteError, match="value nan"):
        trainer.train_step(PROMPTS)
    assert changed(trainer.policy_model, before[0])
    assert not changed(trainer.value_model, before[1])


def test_both_ways_train_the_same():
    ends = []
    for together in (True, False):
        trainer = tiny_trainer(check_gradients_together=together)
        for _ in range(2):
            trainer.train_step(PROMPTS)
        ends.append(everything(trainer))
    assert_is(trainer, ends[0])


def test_skip_leaves_out_an_optimizer_step_for_both():
    trainer = tiny_trainer(on_nonfinite="skip", num_epochs=3)
    poison(trainer.value_model, {1})
    metrics = trainer.train_step(PROMPTS)
    assert metrics["skipped_optimizer_steps"] == 1
    counts = {
        int(entry["step"])
        for optimizer in (trainer.policy_optimizer, trainer.value_optimizer)
        for entry in optimizer.state.values()
    }
    assert counts == {2}, "two of three, for the policy and for the value model"
    assert all(torch.isfinite(torch.tensor(number)) for number in metrics.values())
    assert trainer.train_step(PROMPTS)["skipped_optimizer_steps"] == 0


def test_what_is_left_out_is_said(caplog):
    trainer = tiny_trainer(on_nonfinite="skip")
    poison(trainer.policy_model, {0})
    trainer.train_step(PROMPTS)
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("step 1: the loss is ")
    assert said.endswith("this optimizer step is left out (on_nonfinite='skip')")


def test_the_message_names_the_weight_whose_gradient_is_nan():
    trainer = tiny_trainer()
    weight = dict(trainer.policy_model.named_parameters())["model.norm.weight"]
    weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(NotFiniteError, match=r"the first .* is that of model\.norm\.weight of the"):
        trainer.train_step(PROMPTS)


@pytest.mark.parametrize("which", ["policy", "value"])
def test_each_of_both_is_counted(which):
    """Optimizer steps of the other one do not hide that one is never changed."""
    options = {"num_epochs": 1, "value_epochs": 2} if which == "policy" else {"num_epochs": 2}
    together = which == "policy"
    trainer = tiny_trainer(
        on_nonfinite="skip", max_skipped=2, check_gradients_together=together, **options
    )
    poison(getattr(trainer, f"{which}_model"), range(99))
    with pytest.raises(NotFiniteError, match="so were the 2 before, left out"):
        trainer.train(PROMPTS, 4, 5, progress=False)


def test_after_an_error_counting_begins_anew():
    trainer = tiny_trainer(on_nonfinite="skip", max_skipped=1, num_epochs=2)
    poison(trainer.policy_model, {0, 1, 2})
    with pytest.raises(NotFiniteError):
        trainer.train_step(PROMPTS)
    assert trainer.train_step(PROMPTS)["skipped_optimizer_steps"] == 1


def test_skip_ends_after_too_many_in_a_row():
    trainer = tiny_trainer(on_nonfinite="skip", max_skipped=2, num_epochs=2)
    poison(trainer.policy_model, {1, 2, 3})
    trainer.train_step(PROMPTS)
    with pytest.raises(NotFiniteError, match=r"^step 2: .*; so were the 2 before, left out"):
        trainer.train_step(PROMPTS)


def test_the_message_names_a_weight_that_is_nan_already():
    trainer = tiny_trainer()
    experience = trainer.make_experience(trainer.rollout(PROMPTS))
    with torch.no_grad():
        trainer.policy_model.model.layers[1].mlp.up_proj.weight[0, 0] = float("inf")
    cause = r"likely cause: model\.layers\.1\.mlp\.up_proj\.weight of the policy holds NaN"
    with pytest.raises(NotFiniteError, match=cause):
        trainer.update(experience)


def test_the_message_names_what_is_not_finite_in_the_experience():
    trainer = tiny_trainer()
    experience = trainer.make_experience(trainer.rollout(PROMPTS))
    experience.returns[0, 0] = float("inf")
    with pytest.raises(NotFiniteError, match="likely cause: returns of the experience hold NaN"):
        trainer.update(experience)


def test_a_gradient_whose_square_overflows_is_none():
    trainer = tiny_trainer(max_grad_norm=float("inf"))
    before = weights(trainer.policy_model)
    poison(trainer.policy_model, {0}, 1e30)
    with pytest.raises(NotFiniteError, match="policy inf"):
        trainer.train_step(PROMPTS)
    assert not changed(trainer.policy_model, before)


@pytest.mark.parametrize("options", [{}, {"critic": "head"}, {"kl_controller": "adaptive"}])
def test_an_update_is_undone_as_a_whole(options):
    settings = {"kl_target": 3.0} if "kl_controller" in options else {}
    trainer = tiny_trainer(undo_updates=True, num_epochs=3, **options, **settings)
    trainer.train_step(PROMPTS)
    before, coefficients = everything(trainer), trainer.learner.state_dict()
    poison(trainer.policy_model, {1})
    rollout = trainer.rollout(PROMPTS, seeds=torch.arange(5))
    with pytest.raises(NotFiniteError, match=r"The update was undone$"):
        trainer.update(trainer.make_experience(rollout))
    assert_is(trainer, before)
    assert trainer.learner.state_dict() == coefficients
    assert not trainer.amid_update
    trainer.train_step(PROMPTS)


def test_the_first_update_is_undone_to_no_moments():
    trainer = tiny_trainer(undo_updates=True)
    before = everything(trainer)
    poison(trainer.policy_model, {1})
    with pytest.raises(NotFiniteError, match=r"The update was undone$"):
        trainer.train_step(PROMPTS)
    assert_is(trainer, before)
    assert not trainer.policy_optimizer.state


def break_outputs(trainer):
    """Have the next optimizer step leave finite weights whose outputs are infinite."""

    def grow(*_):
        with torch.no_grad():
            trainer.policy_model.lm_head.weight.fill_(3e38)

    return trainer.policy_optimizer.register_step_post_hook(grow)


def test_an_update_whose_outputs_overflow_is_undone():
    trainer = tiny_trainer(undo_updates=True)
    before = everything(trainer)
    handle = break_outputs(trainer)
    with pytest.raises(NotFiniteError, match=r"outputs|loss"):
        trainer.train_step(PROMPTS, num_epochs_per_batch=1)
    assert_is(trainer, before)
    handle.remove()
    trainer.train_step(PROMPTS)


def test_coefficients_that_adapted_in_it_are_undone_too():
    trainer = tiny_trainer(undo_updates=True, kl_controller="adaptive", kl_target=3.0, kl_horizon=4)
    before = trainer.learner.state_dict()
    break_outputs(trainer)
    with pytest.raises(NotFiniteError, match="outputs"):
        trainer.train_step(PROMPTS, num_epochs_per_batch=1)
    assert trainer.learner.state_dict() == before


def test_the_loss_of_a_policy_beyond_target_kl_does_not_count(monkeypatch):
    """It is not trained on, and the value model is."""
    trainer = tiny_trainer(target_kl=0.1)
    learner, before = trainer.learner, weights(trainer.value_model)
    policy_loss = learner._policy_loss

    def infinite(*given):
        loss, states = policy_loss(*given)
        return loss + float("inf"), states

    monkeypatch.setattr(learner, "_policy_loss", infinite)
    monkeypatch.setattr(learner, "_is_far", lambda stats: True)
    trainer.train_step(PROMPTS)
    assert changed(trainer.value_model, before)


def test_weights_whose_outputs_overflow_reach_no_checkpoint(tmp_path):
    trainer = tiny_trainer()
    break_outputs(trainer)
    with pytest.raises(NotFiniteError, match="outputs of the policy are NaN or infinite"):
        trainer.train(PROMPTS, 3, 2, num_epochs_per_batch=1, checkpoint_dir=tmp_path,
                      checkpoint_freq=1)  # fmt: skip
    assert not list(tmp_path.glob("*.pt"))


class Sometimes:
    """A reward that gives NaN in some of its calls."""

    def __init__(self, bad):
        self.bad, self.calls = bad, 0

    def __call__(self, prompts, completions):
        self.calls += 1
        scores = count_letters(prompts, completions)
        return [float("nan")] * len(scores) if self.calls - 1 in self.bad else scores


def test_skip_takes_new_prompts_where_a_score_is_nan(caplog):
    reward = Sometimes({1, 2})
    trainer = tiny_trainer(reward, on_nonfinite="skip", max_skipped=2)
    result = trainer.train(PROMPTS, 3, 2)
    assert len(result["training_history"]["mean_rewards"]) == 3
    assert reward.calls == 5
    assert trainer.progress.prompts_drawn == 10, "those of the batches left out are not repeated"
    assert "got nan for the prompt" in caplog.text


def test_skip_stops_after_too_many_batches_in_a_row(tmp_path):
    trainer = tiny_trainer(Sometimes({1, 2, 3}), on_nonfinite="skip", max_skipped=2)
    with pytest.raises(NotFiniteError, match="got nan for the prompt"):
        trainer.train(PROMPTS, 3, 2, checkpoint_dir=tmp_path)
    assert [path.name for path in tmp_path.glob("*.pt")] == ["ppo_checkpoint_step_1.pt"]


def test_stop_ends_at_the_first_nan():
    trainer = tiny_trainer(Sometimes({1}))
    with pytest.raises(NotFiniteError, match="got nan for the prompt"):
        trainer.train(PROMPTS, 3, 2)
