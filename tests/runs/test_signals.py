"""SIGTERM, SIGUSR1 and time limits end or save a run after its step."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest
from command_line import arguments, lines
from tiny_models import tiny_model, tiny_tokenizer
from tiny_trainer import PROMPTS, changed, names, tiny_trainer, weights

from ppo_fast import PPO
from ppo_fast.cli.main import main
from ppo_fast.runs.signals import StoppedAtOnce, handled_signals
from ppo_fast.runs.time_limit import TimeLimit, seconds_of

QUIET = {"progress": False}


def at_step(number, *signals):
    def on_step(step):
        if step.number == number:
            for one in signals:
                signal.raise_signal(one)

    return on_step


def test_sigterm_ends_the_run_after_its_step(tmp_path, caplog):
    whole = tiny_trainer()
    whole.train(PROMPTS, num_steps=4, batch_size=2, **QUIET)
    trainer = tiny_trainer()
    options = {"batch_size": 2, "checkpoint_dir": tmp_path, **QUIET}
    result = trainer.train(PROMPTS, 4, on_step=at_step(2, signal.SIGTERM), **options)
    assert (result["interrupted"], result["stopped_by"]) == (True, "SIGTERM")
    assert names(tmp_path) == ["ppo_checkpoint_step_2.pt"]
    assert "stopped by SIGTERM after step 2" in caplog.text
    resumed = tiny_trainer()
    resumed.load_checkpoint(tmp_path / "ppo_checkpoint_step_2.pt")
    resumed.train(PROMPTS, 2, **options)
    assert not changed(resumed.policy_model, weights(whole.policy_model))
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_second_signal_stops_at_once():
    with handled_signals():
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(StoppedAtOnce) as caught:
            signal.raise_signal(signal.SIGTERM)
    assert caught.value.number == signal.SIGTERM


def test_sigusr1_writes_a_checkpoint_and_goes_on(tmp_path):
    result = tiny_trainer().train(
        PROMPTS,
        4,
        2,
        checkpoint_dir=tmp_path,
        checkpoint_freq=4,
        on_step=at_step(3, signal.SIGUSR1),
        **QUIET,
    )
    assert result["stopped_by"] is None
    assert names(tmp_path) == ["ppo_checkpoint_step_3.pt", "ppo_checkpoint_step_4.pt"]


def test_another_thread_handles_nothing():
    found = []

    def run():
        with handled_signals() as received:
            found.append((received.stop, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [(None, signal.SIG_DFL)]


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    tiny_trainer().train(
        PROMPTS, 5, 2, checkpoint_dir=tmp_path, checkpoint_freq=1, keep_last=2, **QUIET
    )
    assert names(tmp_path) == ["ppo_checkpoint_step_4.pt", "ppo_checkpoint_step_5.pt"]
    with pytest.raises(ValueError, match="keep_last: got 0"):
        tiny_trainer().train(PROMPTS, 1, keep_last=0, **QUIET)


# Time


def test_no_step_begins_that_would_end_too_late(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("ppo_fast.runs.time_limit.time.monotonic", lambda: now[0])
    limit, fits = TimeLimit(60), []
    with limit.evaluation():
        now[0] += 15
    assert limit.fits(evaluates=True), "the first step always begins"
    for seconds in (20, 1, 4):
        limit.begin_step()
        now[0] += seconds
        limit.step_done()
        fits.append(limit.fits(evaluates=False))
    assert fits == [True] * 3, "40 s are gone, and a step takes 20 at most"
    assert not limit.fits(evaluates=True), "with an evaluation of 15"
    now[0] += 0.1
    assert not limit.fits(evaluates=False)
    assert TimeLimit(None).fits(evaluates=True)


def test_an_evaluation_does_not_count_as_a_part_of_a_step(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("ppo_fast.runs.time_limit.time.monotonic", lambda: now[0])
    limit = TimeLimit(100)
    limit.begin_step()
    now[0] += 10
    with limit.evaluation():
        now[0] += 50
    limit.step_done()
    assert limit.fits(evaluates=False)
    now[0] += 30
    assert limit.fits(evaluates=False), "10 s are left, and a step takes 10"


def test_a_run_ends_at_its_time(tmp_path, caplog):
    result = tiny_trainer().train(PROMPTS, 50, 2, max_time=1e-3, checkpoint_dir=tmp_path, **QUIET)
    assert result["stopped_by"] == "max_time"
    assert names(tmp_path) == ["ppo_checkpoint_step_1.pt"]
    assert "stopped by max_time after step 1" in caplog.text


def test_times_in_words():
    assert [seconds_of(t) for t in ("90", "1.5", "1:30", "2:00:10")] == [90, 1.5, 90, 7210]


@pytest.mark.parametrize("text", ["", "a", "1:2:3:4", "-5", "0", "1:", "nan", "inf", "1e400"])
def test_what_is_no_time(text):
    with pytest.raises(ValueError, match=r"max_time: got .*, expected seconds, MM:SS or HH:MM:SS"):
        seconds_of(text)


@pytest.mark.parametrize("seconds", [0, -1, "5", float("nan"), float("inf"), True])
def test_what_is_no_limit(seconds):
    with pytest.raises(ValueError, match="max_time: got"):
        TimeLimit(seconds)


# The command


SIGNALLING = """
import signal
calls = []

def reward(prompts, completions):
    calls.append(1)
    if len(calls) == 2:
        {action}
    return [float(len(text)) for text in completions]
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_model(layers=1, hidden=32).save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS), "utf-8")
    return tmp_path


def status(place, action, *flags):
    """The exit status of a run of three steps, whose reward does something in the second."""
    (place / "signalling.py").write_text(SIGNALLING.format(action=action))
    with pytest.raises(SystemExit) as caught:
        main(arguments(*flags, reward="signalling.py:reward", num_steps=3))
    return caught.value.code


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_stopped_command_says_how_to_go_on(place, capsys, name, code):
    assert status(place, f"signal.raise_signal(signal.{name})") == code
    out = capsys.readouterr().out
    assert "1 of 3 steps are left: --resume goes on" in out
    assert "trained policy" not in out
    assert not (place / "run/policy").exists()
    assert names(place / "run/checkpoints") == ["ppo_checkpoint_step_2.pt"]
    (place / "signalling.py").write_text(SIGNALLING.format(action="pass"))
    main(["train", "--config", "run/config.yaml", "--resume"])
    assert [row["step"] for row in lines(place / "run/metrics.jsonl")] == [1, 2, 3]
    assert (place / "run/policy/config.json").is_file()


def test_two_signals_stop_a_command_at_once(place, capsys):
    twice = "[signal.raise_signal(signal.SIGTERM) for _ in range(2)]"
    assert status(place, twice, "--checkpoint-freq", "1") == 143
    assert (
        "stopped at once; --resume goes on from the newest checkpoint, if any"
        in capsys.readouterr().err
    )
    assert names(place / "run/checkpoints") == ["ppo_checkpoint_step_1.pt"]


def test_the_time_of_a_command(place, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments("--max-time", "0.001", reward="signalling.py:reward"))
    assert caught.value.code == 2, "there is no such file yet"
    assert status(place, "pass", "--max-time", "0.001") == 75
    assert "2 of 3 steps are left: --resume goes on" in capsys.readouterr().out


def test_the_time_of_a_command_begins_with_it(place, monkeypatch, capsys):
    """What loads the models takes of it too."""
    (place / "signalling.py").write_text(SIGNALLING.format(action="pass"))
    seen = []
    train = PPO.train

    def noting(self, *arguments, **options):
        seen.append(options["max_time"])
        return train(self, *arguments, **options)

    monkeypatch.setattr(PPO, "train", noting)
    main(arguments("--max-time", "1:00:00", reward="signalling.py:reward"))
    assert 3000 < seen[0] < 3600


def test_a_resumed_command_finishes_what_is_missing(place, capsys, monkeypatch):
    (place / "signalling.py").write_text(SIGNALLING.format(action="pass"))

    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("ppo_fast.exports.export.export_policy", fail)
        with pytest.raises(SystemExit):
            main(arguments(reward="signalling.py:reward"))
    assert not (place / "run/policy").exists()
    main(["train", "--config", "run/config.yaml", "--resume"])
    assert "trained policy: run/policy" in capsys.readouterr().out
    assert len(lines(place / "run/metrics.jsonl")) == 2
    main(["train", "--config", "run/config.yaml", "--resume"])
    assert "nothing is left to do: all 2 steps are done" in capsys.readouterr().out


@pytest.mark.slow
def test_a_closed_pipe_does_not_end_a_run(place):
    (place / "signalling.py").write_text(SIGNALLING.format(action="pass"))
    argv = arguments(reward="signalling.py:reward", num_steps=3)
    code = f"from ppo_fast.cli.main import main; main({argv!r})"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert done.returncode == 0, done.stderr
    assert len(lines(place / "run/metrics.jsonl")) == 3
    assert (place / "run/policy/config.json").is_file()
