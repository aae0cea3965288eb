"""Policy losses: ours against those of TRL's GRPO and RLOO trainers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from oracles import trl_side as trl
from oracles.cases import Case, for_cases, with_gradients
from oracles.ledger import line, loss_and_gradients_agree
from oracles.ours import policy_loss
from torch import Tensor

LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo")
LONGEST, TOKENS_OF_STEP = 32, 50
GRPO_LOSS = "GRPOTrainer._compute_loss"


def aggregation(loss_type: str, rows: int) -> dict[str, Any]:
    """Return our settings that divide as TRL's loss of this type does."""
    if loss_type == "grpo":
        return {"aggregation": "seq-mean-token-mean", "normalizer": rows}
    if loss_type == "dr_grpo":
        return {"aggregation": "seq-mean-token-sum", "normalizer": rows * LONGEST}
    normalizer = None if loss_type == "bnpo" else TOKENS_OF_STEP
    return {"aggregation": "token-mean", "normalizer": normalizer}


def loss_of_grpo(stub: Any, case: Case, **inputs: Tensor) -> Callable[..., Tensor]:
    """Return a stub's loss as a function of log-probs, and of entropies if they count, [B, T]."""
    inputs["num_items_in_batch"] = torch.tensor(TOKENS_OF_STEP)
    zeros = torch.zeros(case.rows, case.steps, dtype=case.dtype)
    return lambda x, entropy=zeros: trl.grpo_loss(stub, x, entropy, case.floats, **inputs)


@for_cases(600)
def test_grpo(case):
    loss_type = case.draw.choice(LOSSES)
    clip = case.draw.choice(((0.2, 0.2), (0.1, 0.28)))
    delta, beta = case.draw.choice((None, 1.5, 3.0)), case.draw.choice((0.0, 0.04))
    old, advantages = case.logprobs(), case.same_in_rows()
    ref, logprobs = case.near(old), case.near(old)
    stub = trl.grpo(
        loss_type=loss_type, clip=clip, delta=delta, beta=beta, max_completion_length=LONGEST
    )
    inputs = {"old_per_token_logps": old, "ref_per_token_logps": ref}
    theirs = loss_of_grpo(stub, case, advantages=advantages[:, 0], **inputs)
    settings = {"clip": clip, "dual_clip": delta, "kl_coef": beta, "ref_logprobs": ref}
    settings |= {"kl_estimator": "k3", "kl_clamp": False}
    mine = policy_loss(case, advantages, old, **settings, **aggregation(loss_type, case.rows))
    options = f"{loss_type}; with and without beta, delta"
    loss_and_gradients_agree(
        line("TRL", GRPO_LOSS, "ppo_loss", options),
        with_gradients(mine, logprobs),
        with_gradients(theirs, logprobs),
    )


@for_cases(masks=("empty rows",))
def test_rows_without_tokens(case):
    old, advantages = case.logprobs(), case.same_in_rows()
    logprobs = case.near(old)
    stub = trl.grpo(loss_type="grpo", clip=(0.2, 0.2))
    theirs = loss_of_grpo(stub, case, advantages=advantages[:, 0], old_per_token_logps=old)
    mine = policy_loss(case, advantages, old, aggregation="seq-mean-token-mean")
    share = float(case.mask.any(1).sum()) / case.rows
    loss_and_gradients_agree(
        line(
            "TRL",
            GRPO_LOSS,
            "ppo_loss",
            "rows without tokens",
            "the mean of grpo counts rows without a valid token, ours only by a normalizer",
        ),
        (x * share for x in with_gradients(mine, logprobs)),
        with_gradients(theirs, logprobs),
    )


@for_cases()
def test_sequence_ratio(case):
    loss_type = case.draw.choice(LOSSES)
    clip = case.draw.choice(((3e-4, 4e-4), (0.1, 0.2)))
    old, advantages = case.logprobs(), case.same_in_rows()
    logprobs = case.near(old)
    stub = trl.grpo(loss_type=loss_type, level="sequence", clip=clip, max_completion_length=LONGEST)
    theirs = loss_of_grpo(stub, case, advantages=advantages[:, 0], old_per_token_logps=old)
    settings = {"clip": clip, "ratio": "sequence", **aggregation(loss_type, case.rows)}
    options = f"{loss_type}, importance_sampling_level='sequence'"
    loss_and_gradients_agree(
        line("TRL", GRPO_LOSS, "ppo_loss ratio='sequence'", options),
        with_gradients(policy_loss(case, advantages, old, **settings), logprobs),
        with_gradients(theirs, logprobs),
    )


@for_cases()
def test_cispo(case):
    """TRL's epsilon_high of CISPO is the largest ratio, and it has no smallest one."""
    largest = case.draw.choice((1.2, 5.0))
    old, advantages = case.logprobs(), case.same_in_rows()
    logprobs = case.near(old)
    stub = trl.grpo(loss_type="cispo", clip=(0.2, largest))
    theirs = loss_of_grpo(stub, case, advantages=advantages[:, 0], old_per_token_logps=old)
    settings = {"objective": "cispo", "clip": (1 - 1e-6, largest - 1)}
    mine = policy_loss(case, advantages, old, **settings, **aggregation("cispo", case.rows))
    loss_and_gradients_agree(
        line("TRL", GRPO_LOSS, "ppo_loss objective='cispo'", "cispo"),
        with_gradients(mine, logprobs),
        with_gradients(theirs, logprobs),
    )


@for_cases()
def test_weights(case):
    """The importance weights of vLLM's log-probs, and the tokens of highest entropy."""
    loss_type, share = case.draw.choice(LOSSES), case.draw.choice((1.0, 0.2, 0.5))
    old, advantages, entropy = case.logprobs(), case.same_in_rows(), case.normal().abs()
    ref, logprobs, weights = case.near(old), case.near(old), case.normal().abs()
    stub = trl.grpo(
        loss_type=loss_type,
        clip=(0.2, 0.2),
        beta=0.04,
        max_completion_length=LONGEST,
        top_entropy_quantile=share,
        use_vllm=True,
        vllm_importance_sampling_correction=True,
    )
    loss = loss_of_grpo(
        stub,
        case,
        advantages=advantages[:, 0],
        old_per_token_logps=old,
        ref_per_token_logps=ref,
        importance_sampling_ratio=weights,
    )
    if share < 1:
        weights = weights * stub.get_high_entropy_mask(entropy, case.floats, 1 - share)
    settings = {"kl_coef": 0.04, "kl_estimator": "k3", "kl_clamp": False, "ref_logprobs": ref}
    settings |= {"weights": weights, **aggregation(loss_type, case.rows)}
    options = "importance weights, beta" + (", top_entropy_quantile" if share < 1 else "")
    loss_and_gradients_agree(
        line("TRL", GRPO_LOSS, "ppo_loss weights", options),
        with_gradients(policy_loss(case, advantages, old, **settings), logprobs),
        with_gradients(lambda x: loss(x, entropy), logprobs),
    )


@for_cases()
def test_entropy_bonus(case):
    """TRL's bonus is of a mean over tokens, whatever the loss's type; so ours with such a type."""
    old, advantages = case.logprobs(), case.same_in_rows()
    logprobs, entropy = case.near(old), case.normal().abs()
    stub = trl.grpo(
        loss_type="bnpo", clip=(0.2, 0.2), entropy_coef=0.1, _entropy_bonus_enabled=True
    )
    theirs = loss_of_grpo(stub, case, advantages=advantages[:, 0], old_per_token_logps=old)
    loss_and_gradients_agree(
        line("TRL", GRPO_LOSS, "ppo_loss", "bnpo, entropy bonus"),
        with_gradients(policy_loss(case, advantages, old, entropy_coef=0.1), logprobs, entropy),
        with_gradients(theirs, logprobs, entropy),
    )


@for_cases(masks=("full", "padded", "holes"))
def test_rloo(case):
    """The ratio of whole sequences; one without tokens has ratio 1 and a term in TRL's."""
    clip = case.draw.choice(((0.2, 0.2), (0.1, 0.5)))
    old, advantages = case.logprobs(), case.same_in_rows()
    logprobs = old + case.normal(case.draw.choice((0.02, 0.3)))
    inputs = {"advantages": advantages[:, 0], "old_logps": (old * case.floats).sum(1)}
    found, of_theirs = with_gradients(
        lambda x: trl.rloo_loss(x, case.floats, clip, **inputs), logprobs
    )
    settings = {"clip": clip, "ratio": "sequence-product", "normalizer": case.rows}
    # The same term for each token: their mean is the value, their sum has the gradient.
    ours = {
        aggregation: with_gradients(
            policy_loss(case, advantages, old, aggregation=aggregation, **settings), logprobs
        )
        for aggregation in ("seq-mean-token-mean", "seq-mean-token-sum")
    }
    loss_and_gradients_agree(
        line("TRL", "RLOOTrainer._compute_loss", "ppo_loss ratio='sequence-product'", "RLOO"),
        (ours["seq-mean-token-mean"][0], ours["seq-mean-token-sum"][1]),
        (found, of_theirs),
        # TRL's log-ratio is a difference of two sums.
        slack=4 * torch.finfo(case.dtype).eps * float((old * case.floats).sum(1).abs().amax()),
    )
