"""Help, version and completion of ppo-fast, and the groups of train's flags."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import tyro
from command_line import arguments, fails_in_a_line, flat, help_of

from ppo_fast import PPOConfig, __version__
from ppo_fast.cli.groups import GROUP_OF, GROUPS, TrainFlags, flags_of, train_of
from ppo_fast.cli.main import COMMANDS, main, parse
from ppo_fast.cli.train import Train

completes_flags = pytest.mark.skipif(
    tyro.__version__ == "1.0.0", reason="tyro 1.0.0 completes commands alone, and has no fish"
)
NAMES = [item.name for item in fields(Train) if item.name != "ppo"]
NAMES += [item.name for item in fields(PPOConfig)]


def groups_in_help(capsys, monkeypatch):
    """Flags in each box of train's help."""
    monkeypatch.setenv("COLUMNS", "120")
    found, title = {}, None
    for line in help_of(capsys, "train").splitlines():
        if box := re.match(r"\W*((\w+ )?options)\W*$", line):
            title = box[1]
        if flag := re.match(r"[│ ] +(--[a-z][a-z-]+)", line):
            found.setdefault(title, []).append(flag[1].removeprefix("--").replace("-", "_"))
    return found


def test_every_flag_of_train_is_in_its_group(capsys, monkeypatch):
    found = groups_in_help(capsys, monkeypatch)
    found.pop("options", None)  # -h
    assert list(found) == [f"{group} options" for group in GROUPS]
    shown = {flag: title for title, flags in found.items() for flag in flags}
    assert sorted(shown) == sorted(NAMES)
    assert shown["policy"] == "run options"
    assert shown["gamma"] == "algorithm options"
    for name, group in GROUP_OF.items():
        assert shown[name] == f"{group} options", "a name in GROUPS that is no setting"


def test_the_list_of_commands_has_their_first_sentences(capsys):
    said = flat(help_of(capsys))
    assert "Print the memory that several ways of training a policy take" in said
    assert "A margin is added" not in said
    assert "A margin is added" in flat(help_of(capsys, "plan"))


def test_the_help_of_a_flag_is_its_docstring(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    shown = " ".join(help_of(capsys, "train").replace("│", " ").split())
    assert "--gamma FLOAT Discount per token. 1: a response's score counts in full" in shown
    assert "--keep-last {None}|INT Number of checkpoints that are kept, the newest; None" in shown


def test_flags_become_the_same_command_as_before():
    config = PPOConfig(gamma=0.5, adam_betas=(0.1, 0.2), critic="head", stop_strings=("a",))
    train = replace(Train(policy="x", reward=("a", "b"), keep_last=3), ppo=config)
    assert train_of(flags_of(train)) == train
    assert train_of(TrainFlags()) == Train()
    assert parse(arguments("--gamma", "0.5")).ppo.gamma == 0.5


def test_the_version_takes_nothing_heavy(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"ppo-fast {__version__}\n"


@pytest.mark.parametrize("argv", [["--version"], ["--help"], ["train", "--help"]])
def test_help_and_version_load_no_torch(argv):
    code = (
        "import sys\nfrom ppo_fast.cli.main import main\n"
        f"try: main({argv})\nexcept SystemExit as end: assert not end.code\n"
        "print([m for m in ('torch', 'transformers', 'datasets', 'numpy') if m in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.splitlines()[-1] == "[]"


def test_a_reader_that_goes_away_ends_the_help():
    code = "from ppo_fast.cli.main import main; main(['train', '--help'])"
    command = f'{sys.executable} -c "{code}" | head -1; exit ${{PIPESTATUS[0]}}'
    said = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert said.stdout.startswith("usage: ")
    assert said.stderr == ""
    assert said.returncode == 0


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["train", "--gama=1"], "no flag --gama of train; did you mean --gamma?"),
        (["train", "--no-resum"], "no flag --no-resum of train; did you mean --no-resume?"),
        (["train", "--num_step", "3"], "no flag --num-step of train; did you mean --num-steps?"),
        (["train", "--qqq"], "no flag --qqq of train; ppo-fast train --help lists them"),
        (["env", "--polcy", "m"], "no flag --polcy of env; did you mean --policy?"),
        (["plan", "--policy", "m", "--gama", "1"], "no flag --gama of plan; did you mean --gamma?"),
        (["reward", "--par", "m"], "no flag --par of reward; did you mean --pairs?"),
    ],
)
def test_a_mistyped_flag_is_one_line(capsys, argv, said):
    assert fails_in_a_line(capsys, *argv) == said


def completions(capsys, shell):
    with pytest.raises(SystemExit) as caught:
        main(["completion", shell])
    assert not caught.value.code
    return capsys.readouterr().out


@completes_flags
def test_bash_completes_commands_and_flags(capsys, tmp_path):
    script = tmp_path / "completion.bash"
    script.write_text(completions(capsys, "bash"), "utf-8")
    subprocess.run(["bash", "-n", script], check=True)

    def complete(*words):
        quoted = " ".join(f"'{word}'" for word in words)
        lines = (
            f"source {script}; COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}",
            "$(complete -p ppo-fast | sed 's/.*-F \\([^ ]*\\) .*/\\1/')",
            'printf "%s\\n" "${COMPREPLY[@]}"',
        )
        run = ["bash", "-c", "\n".join(lines)]
        path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
        return subprocess.run(
            run, capture_output=True, text=True, check=True, env={"PATH": path}
        ).stdout.split()

    assert set(COMMANDS) <= set(complete("ppo-fast", ""))
    assert complete("ppo-fast", "train", "--gam") == ["--gamma"]
    assert complete("ppo-fast", "train", "--kl-in", "r") == ["reward"]
    assert complete("ppo-fast", "train", "--output-d") == ["--output-dir"]


@completes_flags
@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_have_a_script_with_our_flags(capsys, shell, tmp_path):
    script = completions(capsys, shell)
    assert "ppo-fast" in script
    for name in ("gae-lambda", "output-dir", "num-steps"):
        assert name in script
    if shutil.which(shell):
        (tmp_path / "script").write_text(script, "utf-8")
        subprocess.run([shell, "-n", tmp_path / "script"], check=True)


def test_an_unknown_shell(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["completion", "csh"])
    assert caught.value.code == 2
