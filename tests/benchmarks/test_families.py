"""benchmarks/families: tiny models of every family, and the page about them."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

import pytest

from ppo_fast.models.language_model import LanguageModel

ROOT = Path(__file__).parents[2]
LOCKED = re.search(r"^transformers==(\S+)", (ROOT / "constraints.txt").read_text(), re.M).group(1)

# shrinking a config depends on its class; another version of transformers has other classes
locked = pytest.mark.skipif(
    version("transformers") != LOCKED, reason=f"the families are those of transformers {LOCKED}"
)


@locked
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_usual_sizes_are_made_small(name):
    from families.cases import CASES
    from families.configs import LAYERS, tiny_model

    model = tiny_model(CASES[name])
    assert sum(weight.numel() for weight in model.parameters()) < 400_000
    assert model.config.num_hidden_layers == LAYERS
    assert model.config.hidden_size == 64
    again = tiny_model(CASES[name]).state_dict()
    assert all(weight.equal(again[name]) for name, weight in model.state_dict().items())


@locked
def test_every_kind_of_layer_is_in_a_tiny_model():
    from families.cases import CASES
    from families.configs import tiny_config

    assert {*tiny_config(CASES["gemma3_text"]).layer_types} == {
        "sliding_attention",
        "full_attention",
    }
    assert tiny_config(CASES["gemma3"]).text_config.sliding_window < 10


@locked
def test_attention_to_some_blocks_of_keys_is_padded():
    """MiniMax M3 hands its blocks to attention; of rows as short as a probe's it chooses all."""
    from families.cases import CASES
    from families.configs import tiny_model

    passes = LanguageModel(tiny_model(CASES["minimax_m3_vl_text+sparse"])).passes
    assert "packed attention has no block_indices" in str(passes.why_padded)


@locked
def test_all_is_right_with_llama():
    from families.case import run_case
    from families.cases import CASES
    from families.checks import CHECKS
    from families.run import state

    found = run_case(CASES["llama"])
    assert {check: result[0] for check, result in found["results"].items()} == dict.fromkeys(
        CHECKS, "right"
    )
    assert found["head"]["fused"]
    assert found["decoding"] == {"name": "3 of 3 layers", "why_not": None}
    assert state(found) == "right"


@locked
def test_what_is_wrong_is_found(monkeypatch):
    """Another temperature in the truth."""
    from families import checks
    from families.cases import CASES

    true_logprobs = checks.true_logprobs
    monkeypatch.setattr(checks, "true_logprobs", lambda *args: 1.02 * true_logprobs(*args))
    subject = checks.Subject(CASES["llama"])
    for check in (checks.check_rollout, checks.check_logprobs, checks.check_gradients):
        assert check(subject).outcome == "wrong"


def test_the_page_names_every_type():
    page = (ROOT / "docs" / "families.md").read_text("utf-8")
    assert f"transformers {LOCKED}," in page, "run make families"
    if version("transformers") == LOCKED:
        from families.cases import CASES

        assert re.findall(r"^\| (\S+) \|", page, re.M)[1:] == list(CASES)
