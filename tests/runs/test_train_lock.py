"""Two trainings do not write checkpoints to one folder at a time."""

from __future__ import annotations

import pytest
from tiny_trainer import PROMPTS, names, tiny_trainer


def test_a_second_training_in_the_folder_is_refused(tmp_path):
    first, second = tiny_trainer(critic="baseline"), tiny_trainer(critic="baseline")
    run = {"num_steps": 1, "batch_size": 2, "checkpoint_dir": tmp_path, "progress": False}

    def meanwhile(step):
        with pytest.raises(RuntimeError, match=r"checkpoint_dir: .* is in use by another run"):
            second.train(PROMPTS, **run)

    first.train(PROMPTS, on_step=meanwhile, checkpoint_freq=1, **run)
    assert names(tmp_path) == ["ppo_checkpoint_step_1.pt"]
    second.train(PROMPTS, **run)
