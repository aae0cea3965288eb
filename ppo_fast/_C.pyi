"""Compiled CPU kernels. Tensors are addresses (``Tensor.data_ptr()``); 0 stands for None. Dtypes
are the codes of ``ppo_fast.ops.launch.DTYPE_CODES``."""

def instruction_set() -> str: ...
def instruction_sets() -> list[str]: ...
def use_instruction_set(name: str) -> None: ...
def prefer_huge_pages(*, start: int, num_bytes: int) -> None: ...
def gae(
    *,
    dtype: int,
    rewards: int,
    values: int,
    mask: int,
    dones: int,
    bootstrap_value: int,
    lam: int,
    gamma: float,
    advantages: int,
    returns: int,
    num_rows: int,
    num_steps: int,
    num_threads: int,
) -> None: ...
def logprobs_forward(
    *,
    dtype: int,
    logits: int,
    outer_stride: int,
    inner: int,
    inner_stride: int,
    num_rows: int,
    vocab_size: int,
    labels: int,
    mask: int,
    temperature: float,
    logprobs: int,
    entropy: int,
    stats: int,
    num_threads: int,
) -> None: ...
def logprobs_backward(
    *,
    dtype: int,
    logits: int,
    outer_stride: int,
    inner: int,
    inner_stride: int,
    num_rows: int,
    vocab_size: int,
    labels: int,
    mask: int,
    temperature: float,
    entropy: int,
    stats: int,
    grad_logprobs: int,
    grad_entropy: int,
    grad_logits: int,
    num_threads: int,
) -> None: ...
