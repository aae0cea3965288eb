"""Check the prompts of a run before its first step."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

from ppo_fast.checks import check_counts
from ppo_fast.data.examples import Example, Stream, as_examples, is_stream
from ppo_fast.rewards.scorer import Scorer
from ppo_fast.rollout.texts import Texts

logger = logging.getLogger(__name__)


def check_run_prompts(
    prompts: Any, texts: Texts, scorer: Scorer, max_length: int, others: Mapping[str, Any]
) -> list[Example] | Stream:
    """Check all prompts of a run, and that rewards find their columns and servers.

    Args:
        prompts: as ``PPO.train`` takes them.
        texts: turns them into ids.
        scorer: calls the rewards.
        max_length: max tokens of a response.
        others: models besides the policy that read the sequences, by name.

    Returns:
        The prompts as examples, without those that ``long_prompts="drop"`` drops; of a stream, the
            first is checked, and the others will be when they are read.

    Raises:
        TypeError, ValueError: a prompt or a column does not fit.
    """
    check_counts(max_length=max_length)
    fitting = partial(texts.fitting, max_length=max_length, others=others)
    if isinstance(prompts, Stream) or is_stream(prompts):
        stream = prompts if isinstance(prompts, Stream) else Stream(prompts)
        stream = Stream(stream.rows, stream.column, fitting)
        examples, _ = stream.take(0, 1)
        scorer.check(examples[0].columns)
        return stream
    examples = as_examples(prompts)
    scorer.check({name for example in examples for name in example.columns})
    found = fitting(examples)
    if not found:
        raise ValueError(f"prompts: all {len(examples)} are too long; see max_prompt_length")
    if len(found) < len(examples):
        logger.warning(
            "long_prompts='drop': %d of %d prompts are too long and dropped",
            len(examples) - len(found),
            len(examples),
        )
    return found
