"""The code in docs/rewards.md runs, and its table names what there is."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from local_server import local_server
from tiny_models import tiny_model, tiny_tokenizer

import ppo_fast.rewards

PAGE = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text("utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def answer(body):
    if "messages" in body:
        return {"choices": [{"message": {"content": '{"score": 4}'}}]}
    return {"scores": [float(a) for a in body["answer"]]}


@pytest.mark.filterwarnings("ignore")
def test_the_code_runs_in_its_order(monkeypatch):
    pytest.importorskip("httpx")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    names = {"policy": tiny_model(layers=1, hidden=32), "tokenizer": tiny_tokenizer()}
    with local_server(answer) as server:
        for code in BLOCKS:
            exec(code.replace("http://localhost:8000", server.url), names)
            if "rows" in code or "polite" in code:
                names["ppo"].step(names["rows"], max_length=4)
    assert names["scores"] == [5.0, 0.4]
    metrics = names["step"].metrics
    together = metrics["reward/correct/mean"] + 0.2 * metrics["reward/short/mean"]
    assert metrics["mean_reward"] == pytest.approx(together, abs=1e-5)
    assert together != 0
    assert names["reward"](["p"], ["Please."]) == [1.0]


def test_every_reward_is_in_the_table():
    # in the text around it
    others = {"AsyncReward", "TryAgain", "Principle", "WordRules", "Question", "YesNoModel"}
    others |= {"preference_pairs", "supervised_pairs"}
    for name in ppo_fast.rewards.__all__:
        assert re.search(rf"^\| .*`{name}\b" if name not in others else name, PAGE, re.MULTILINE)


def test_public_names_are_importable():
    assert set(ppo_fast.rewards.__all__) <= set(dir(ppo_fast.rewards))
    assert set(ppo_fast.rewards._MODULES) == set(ppo_fast.rewards.__all__)
    for name in ppo_fast.rewards.__all__:
        found = getattr(ppo_fast.rewards, name)
        assert getattr(found, "__name__", None) == name or found.name == name
    with pytest.raises(AttributeError, match=r"'ppo_fast.rewards' has no attribute 'exact_mach'"):
        _ = ppo_fast.rewards.exact_mach


def test_matching_texts_needs_no_torch():
    code = "from ppo_fast.rewards import exact_match, numeric_match, AsyncReward, HTTPReward"
    code = f"import sys; {code}; HTTPReward('http://a/b'); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "numpy"} & set(done.stdout.split())
