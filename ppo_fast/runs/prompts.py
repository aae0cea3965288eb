"""Check the prompts of a run before its first step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from ppo_fast.checks import check_counts
from ppo_fast.data.examples import Example, Stream, as_examples, is_stream
from ppo_fast.rewards.scorer import Scorer
from ppo_fast.rollout.texts import Texts

logger = logging.getLogger(__name__)


def check_run_prompts(
    prompts: Any,
    texts: Texts,
    scorer: Scorer,
    check_columns: Callable[[set[str]], None],
    max_length: int,
    others: Mapping[str, Any],
) -> list[Example] | Stream:
    """Check all prompts of a run, and that rewards find their columns and servers.

    Args:
        prompts: as ``PPO.train`` takes them.
        texts: turns them into ids.
        scorer: calls the rewards.
        check_columns: raises ValueError if a reward or the environment lacks one.
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
        check_columns(set(examples[0].columns))
        scorer.check_servers()
        return stream
    examples = as_examples(prompts)
    columns = {name for example in examples for name in example.columns}
    check_columns(columns)
    scorer.check_servers()
    for name in sorted(columns):
        count = sum(name not in example.columns for example in examples)
        if count and scorer.takes(name):
            logger.warning(
                "%d of %d rows have no column %r: rewards get None there",
                count,
                len(examples),
                name,
            )
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


@contextmanager
def counted_drops(prompts: list[Example] | Stream) -> Iterator[None]:
    """After the block, log how many rows of a stream were dropped."""
    try:
        yield
    finally:
        if isinstance(prompts, Stream) and prompts.dropped:
            logger.warning(
                "long_prompts='drop': %d rows of the stream were too long and dropped",
                len(prompts.dropped),
            )
