"""Compiled CPU kernels. Tensors are addresses (``Tensor.data_ptr()``); 0 stands for None."""

def gae_float32(
    *,
    rewards: int,
    values: int,
    mask: int,
    dones: int,
    bootstrap_value: int,
    lam: int,
    advantages: int,
    returns: int,
    num_rows: int,
    num_steps: int,
    gamma: float,
    num_threads: int,
) -> None: ...
def gae_float64(
    *,
    rewards: int,
    values: int,
    mask: int,
    dones: int,
    bootstrap_value: int,
    lam: int,
    advantages: int,
    returns: int,
    num_rows: int,
    num_steps: int,
    gamma: float,
    num_threads: int,
) -> None: ...
