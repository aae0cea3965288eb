"""The code in docs/models.md runs, in its order."""

import re
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer
from tiny_trainer import PROMPTS, count_letters, names

from ppo_fast.exports import hub

pytest.importorskip("bitsandbytes", reason="quantised weights need bitsandbytes")

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text("utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.slow
def test_the_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pushed = []
    monkeypatch.setattr(hub, "push_to_hub", lambda *a: pushed.append(a))
    tiny_model().save_pretrained("base")
    known = {"model": tiny_model(), "tokenizer": tiny_tokenizer(), "reward": count_letters}
    known |= {"prompts": PROMPTS, "input_ids": torch.arange(8)[None]}
    for code in BLOCKS:
        exec(code, known)
        known.setdefault("float_ppo", known["ppo"])
    assert {"adapter_config.json", "README.md"} <= {*names(tmp_path / "out" / "adapter")}
    assert known["logits"].shape == (1, 8, 1)
    assert pushed == [(Path("out/adapter"), "org/name")]
    assert known["float_ppo"] is not known["ppo"]
