"""Log-probs from hidden states and an LM head, by TRL and by ppo_fast."""

from __future__ import annotations

from functools import partial

import heads
from torch import Tensor
from trl.kernels.chunked_logprob import ChunkedLogProbFunction
from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE


def by_trl(work: heads.Work, entropy: bool, chunk_size: int) -> tuple[Tensor, ...]:
    asked = ("entropy",) if entropy else ()
    inputs = (work.hidden, work.weight, None, work.labels)
    outputs = ChunkedLogProbFunction.apply(*inputs, 1.0, chunk_size, None, 1.0, asked)
    return outputs[: 1 + entropy]


TRL = {
    f"TRL, chunks of {size} tokens of the vocabulary": partial(by_trl, chunk_size=size)
    for size in (_CHUNKED_LOGPROB_CHUNK_SIZE, 4096)
}
HEADS = heads.OURS | TRL
