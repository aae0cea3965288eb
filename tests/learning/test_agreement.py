"""A step warns where decoding and the update compute different log-probs."""

from __future__ import annotations

import warnings

import pytest
from tiny_trainer import PROMPTS, tiny_trainer

CASES = {
    "as sampled": {},
    "truncated": {"top_k": 20},
    "bfloat16": {"compute_dtype": "bfloat16"},
    "rounded trunk": {"num_layers_unfrozen": 1, "trunk_dtype": "bfloat16"},
    "rounded cache": {"kv_cache_dtype": "bfloat16"},
    "rounded cache in bfloat16": {"kv_cache_dtype": "bfloat16", "compute_dtype": "bfloat16"},
}


def trainer_of(case):
    return tiny_trainer(critic="head", layers=2, **CASES[case])


@pytest.mark.parametrize("case", CASES)
def test_no_warning_without_a_fault(case):
    metrics = trainer_of(case).train_step(PROMPTS)
    assert metrics["first_max_log_ratio"] < 1e-4
    assert ("sampling_logprob_difference" in metrics) == (case != "as sampled")
    if case == "truncated":
        assert metrics["sampling_logprob_difference_max"] < 1e-5
    elif case != "as sampled":
        assert 0 < metrics["sampling_logprob_difference"] < 0.01
        largest = metrics["sampling_logprob_difference_max"]
        assert metrics["sampling_logprob_difference"] <= largest < 0.1


@pytest.mark.parametrize("case", CASES)
def test_a_model_that_decodes_differently(case):
    trainer = trainer_of(case)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.rollout(PROMPTS)  # the checks of decoding pass

    def shift(module, args, kwargs, states):
        if kwargs.get("cache") is not None or kwargs.get("past_key_values") is not None:
            return states + 0.5
        return None

    trainer.policy_model.model.layers[1].register_forward_hook(shift, with_kwargs=True)
    words = (
        "ratios are not 1" if case == "as sampled" else "log-probs of decoding and of the update"
    )
    with pytest.warns(UserWarning, match=f"{words}.* LlamaForCausalLM differently"):
        trainer.train_step(PROMPTS)
