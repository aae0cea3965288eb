"""torch's global settings (default device, TF32, cuDNN attention) and the trainer."""

from __future__ import annotations

import threading

import pytest
import torch
from tiny_models import tiny_classifier, tiny_model
from tiny_trainer import PROMPTS, tiny_reward_model, tiny_trainer

from ppo_fast.learning.make_experience import computes_in_float32
from ppo_fast.models.attention import without_cudnn_attention
from ppo_fast.models.language_model import LanguageModel
from ppo_fast.models.precision import TF32_TOLERANCE, TOLERANCE, tolerance, uses_tf32

CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize(
    "options",
    [
        {"critic": "model"},
        {"critic": "head", "num_layers_unfrozen": 1},
        {"critic": "top", "num_layers_unfrozen": 1},
        {"critic": "baseline", "top_k": 20},
    ],
    ids=lambda options: options["critic"],
)
@pytest.mark.parametrize("reward", ["function", "model", "classifier"])
def test_a_step_does_not_depend_on_the_default_device(options, reward):
    """A user's program may call ``torch.set_default_device("cuda")``. Here the default is "meta",
    whose tensors have no values, so that a tensor made there by mistake raises an error."""
    rewards = {"model": tiny_reward_model, "classifier": tiny_classifier}
    arguments = [rewards[reward]()] if reward in rewards else []
    metrics = []
    for device in ("cpu", "meta"):
        trainer = tiny_trainer(*arguments, **options)
        with torch.device(device):
            metrics.append(trainer.train_step(PROMPTS))
    for name in metrics[0]:
        if not name.startswith(("time/", "perf/")):
            assert metrics[1][name] == metrics[0][name], name


def cudnn_attention_allowed(module, *_):
    allowed.append(torch.backends.cuda.cudnn_sdp_enabled())


allowed: list[bool] = []


@pytest.mark.parametrize("critic", ["model", "head"])
def test_no_pass_of_a_step_may_choose_cudnn_attention(critic):
    allowed.clear()
    trainer = tiny_trainer(tiny_reward_model(), critic=critic, gradient_checkpointing=True)
    models = [trainer.policy_model, trainer.reference_model, trainer.reward_model]
    models += [] if trainer.value_model is None else [trainer.value_model]
    for model in models:
        layer = next(m for m in model.modules() if type(m).__name__.endswith("DecoderLayer"))
        layer.register_forward_pre_hook(cudnn_attention_allowed)
    assert torch.backends.cuda.cudnn_sdp_enabled()
    trainer.train_step(PROMPTS)
    passes = len(allowed)
    responses, _ = trainer.generate_responses(PROMPTS)
    trainer.compute_rewards(PROMPTS, responses)
    trainer.compute_values(PROMPTS, responses)
    trainer.get_logprobs(PROMPTS, responses)
    trainer.get_reference_logprobs(PROMPTS, responses)
    assert len(allowed) > passes > 4
    assert not any(allowed)
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_cudnn_attention_is_allowed_again_after_an_error():
    def failing(prompts, completions):
        raise OSError("no answer")

    trainer = tiny_trainer(failing)
    with pytest.raises(RuntimeError, match="no answer"):
        trainer.train_step(PROMPTS)
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_cudnn_attention_is_off_until_the_last_thread_is_done():
    inside, leave = threading.Event(), threading.Event()

    def other():
        with without_cudnn_attention():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with without_cudnn_attention():
        thread.start()
        assert inside.wait(10)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    leave.set()
    thread.join()
    assert torch.backends.cuda.cudnn_sdp_enabled()


@pytest.fixture
def matmul():
    settings = torch.backends.cuda.matmul
    if not hasattr(settings, "fp32_precision"):
        pytest.skip("PyTorch 2.8 has the older interface alone")
    before = settings.fp32_precision
    yield settings
    settings.fp32_precision = before


def test_tf32_is_seen_by_either_interface(matmul):
    assert not uses_tf32(CUDA)
    matmul.fp32_precision = "tf32"  # after this torch refuses to read allow_tf32
    assert uses_tf32(CUDA)
    assert not uses_tf32(torch.device("cpu"))
    assert tolerance(torch.float32, CUDA) == TF32_TOLERANCE
    assert tolerance(torch.float32, torch.device("cpu")) == TOLERANCE[torch.float32]
    assert tolerance(torch.float64, CUDA) == TOLERANCE[torch.float64]


def test_a_policy_on_the_cpu_computes_in_float32_whatever_is_set_for_gpus(matmul):
    policy = LanguageModel(tiny_model())
    matmul.fp32_precision = "tf32"
    assert computes_in_float32(policy)
