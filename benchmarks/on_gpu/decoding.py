"""Check and time decoding with CUDA graphs.

It is compared with the same steps from Python, one pass of the plain model, and ``generate``. Also
measured are the cost of captures and the state after a capture that fails.

python benchmarks/on_gpu/decoding.py [--models=SmolLM2-135M,Llama-1B] [--parts=values,speed] [--cpu]
"""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from common import DEVICE, ON_GPU, attempt, note, parser, random_llama, seconds, synchronize
from recorded_ops import as_on_a_gpu, recorded_ops

from ppo_fast.models.attention import without_cudnn_attention
from ppo_fast.models.language_model import LanguageModel
from ppo_fast.rollout import LocalEngine, Rollout, Sampling, decode
from ppo_fast.rollout.buffers import KeptBuffers
from ppo_fast.rollout.speedups import cuda_graph_check
from ppo_fast.rollout.speedups.cuda_graphs import Capture, as_it_is, cuda_graphs, first_line
from ppo_fast.rollout.speedups.slot_check import steps_can_attend

ROWS, PROMPT, NEW = (32, 128, 128) if ON_GPU else (4, 8, 6)
FEW = 32 if ON_GPU else 6  # new tokens where every step is launched from Python
captures = cuda_graphs if ON_GPU else recorded_ops


def make_prompts(policy: LanguageModel, *, ragged: bool) -> list[list[int]]:
    vocab_size = policy.text_config.vocab_size
    g = torch.Generator().manual_seed(1)
    lengths = torch.randint(PROMPT // 2, PROMPT + 1, (ROWS,), generator=g).tolist()
    lengths = lengths if ragged else [PROMPT] * ROWS
    return [torch.randint(2, vocab_size, (n,), generator=g).tolist() for n in lengths]


def run(
    policy: LanguageModel,
    prompts: list[list[int]],
    sampling: Sampling,
    capture: Capture | None,
    **options: Any,
) -> Rollout:
    seeds = torch.arange(len(prompts))
    return decode(
        policy, prompts, sampling, seeds=seeds, eos_ids=[], pad_id=0, capture=capture, **options
    )


@torch.no_grad()
def one_pass_logprobs(model: Any, rollout: Rollout) -> torch.Tensor:
    """Return the log-probs of the drawn tokens, computed a row at a time."""
    rows = []
    pairs = zip(rollout.tokens.sequences(), rollout.tokens.prompt_lengths.tolist(), strict=True)
    for ids, p in pairs:
        logits = model(input_ids=ids[None], use_cache=False).logits[0, p - 1 : -1].float()
        rows.append(logits.log_softmax(-1).gather(1, ids[p:, None])[:, 0])
    return torch.stack(rows)


def values(name: str, dtype: torch.dtype, model: Any, policy: LanguageModel) -> None:
    """Check that replayed steps draw what steps from Python do, and compare with one pass."""
    note("decoding: attention", model=name, dtype=dtype, own_kernel=steps_can_attend(policy))
    if ON_GPU:
        took, reason = seconds(lambda: cuda_graph_check.why_not(policy, cuda_graphs))
        note("decoding: graph check", model=name, dtype=dtype, reason=reason, seconds=took)
    ragged = [FEW - (i * 7) % (FEW // 2) for i in range(ROWS)]
    prompts = make_prompts(policy, ragged=True)
    for title, sampling, options in (
        ("plain", Sampling(FEW), {}),
        ("ragged, slots", Sampling(FEW), {"slots": ROWS // 2, "max_lengths": ragged}),
        ("top_k, top_p", Sampling(FEW, temperature=0.7, top_k=50, top_p=0.9), {}),
    ):
        with attempt("decoding: values"):
            steps = run(policy, prompts, sampling, as_it_is, **options)
            found = run(policy, prompts, sampling, captures(DEVICE), **options)
            error = None
            if title == "plain":
                with without_cudnn_attention():
                    exact = one_pass_logprobs(model, found)
                error = (found.logprobs - exact).abs().max().item()
            note(
                "decoding: values",
                model=name,
                dtype=dtype,
                case=title,
                same_tokens=torch.equal(found.tokens.response_ids, steps.tokens.response_ids),
                same_bits=torch.equal(found.logprobs, steps.logprobs),
                logprobs_off_one_pass_by=error,
            )


def generate(model: Any, prompts: list[list[int]], new: int, **options: Any) -> torch.Tensor:
    """Run transformers' ``generate`` on prompts of one length; return the new tokens."""
    ids = torch.tensor(prompts, device=DEVICE)
    return model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        min_new_tokens=new,
        pad_token_id=0,
        **options,
    )[:, ids.shape[1] :]


def greedy(name: str, dtype: torch.dtype, model: Any, policy: LanguageModel) -> None:
    """Compare greedy tokens with ``generate``'s; in half precision, ties may differ."""
    prompts = make_prompts(policy, ragged=False)
    ours = run(policy, prompts, Sampling(FEW, top_k=1), captures(DEVICE)).tokens.response_ids
    with without_cudnn_attention():
        theirs = generate(model, prompts, FEW, do_sample=False)
    same = (ours == theirs).long().cumprod(1).sum(1).float()
    note(
        "decoding: greedy beside generate",
        model=name,
        dtype=dtype,
        rows_equal=int((same == FEW).sum()),
        mean_tokens_until_they_differ=same.mean().item(),
        of=FEW,
    )


def speed(name: str, dtype: torch.dtype, model: Any, policy: LanguageModel) -> None:
    prompts = make_prompts(policy, ragged=False)
    spent: list[float] = []

    def timed(capture: Capture) -> Capture:
        def around(step: Callable[[], None]) -> Callable[[], None]:
            took, replay = seconds(lambda: capture(step))
            spent.append(took)
            return replay

        return around

    def plain_generate() -> None:
        with without_cudnn_attention():
            generate(model, prompts, FEW, do_sample=True, top_k=0)

    sides = {
        "graphs": (NEW, lambda: run(policy, prompts, Sampling(NEW), timed(captures(DEVICE)))),
        "steps from Python": (FEW, lambda: run(policy, prompts, Sampling(FEW), None)),
        "generate": (FEW, plain_generate),
    }
    for title, (new, side) in sides.items():
        with attempt("decoding: speed"):
            first = seconds(side)[0]
            spent.clear()
            second = seconds(side)[0]
            note(
                "decoding: speed",
                model=name,
                dtype=dtype,
                side=title,
                tokens_s=round(ROWS * new / second),
                first_s=first,
                second_s=second,
                captures=len(spent),
                captures_s=sum(spent),
            )


def kept(name: str, dtype: torch.dtype, model: Any, policy: LanguageModel) -> None:
    """Compare rollouts on reused buffers and graphs with fresh ones, as weights change in place."""
    buffers, sampling = KeptBuffers(2**40), Sampling(FEW)
    prompts = make_prompts(policy, ragged=True)
    for rollout in range(3):
        took, found = seconds(
            lambda: run(policy, prompts, sampling, captures(DEVICE), kept=buffers)
        )
        expected = run(policy, prompts, sampling, captures(DEVICE))
        note(
            "decoding: kept graphs",
            model=name,
            dtype=dtype,
            rollout=rollout,
            seconds=took,
            same_tokens=torch.equal(found.tokens.response_ids, expected.tokens.response_ids),
            same_bits=torch.equal(found.logprobs, expected.logprobs),
        )
        for parameter in model.parameters():
            parameter.mul_(1.01)


def one_step(name: str, dtype: torch.dtype, model: Any, policy: LanguageModel) -> None:
    """Measure the milliseconds of a replay, and of a whole step."""
    if not ON_GPU:
        return
    events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def recording(step: Callable[[], None]) -> Callable[[], None]:
        replay = cuda_graphs(DEVICE)(step)

        def again() -> None:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            replay()
            end.record()
            events.append((start, end))

        return again

    prompts = make_prompts(policy, ragged=False)
    took, _ = seconds(lambda: run(policy, prompts, Sampling(NEW), recording))
    replays = sorted(start.elapsed_time(end) for start, end in events)
    median = replays[len(replays) // 2]
    weights = sum(p.nbytes for p in {id(p): p for p in policy.model.parameters()}.values())
    note(
        "decoding: a step",
        model=name,
        dtype=dtype,
        replays=len(replays),
        median_ms=median,
        all_of_it_ms=1e3 * took / NEW,
        weights_gb_s=weights / median / 1e6,
    )


def memory(name: str, dtype: torch.dtype, model: Any, policy: LanguageModel) -> None:
    """Measure the memory that rollouts leave allocated."""
    if not ON_GPU:
        return
    engine = LocalEngine(policy, eos_ids=list, pad_id=0, cuda_graphs=True)
    prompts = make_prompts(policy, ragged=False)
    left = []
    for _ in range(6):
        engine.generate(prompts, Sampling(8), seeds=torch.arange(ROWS))
        gc.collect()
        torch.cuda.empty_cache()
        left.append((torch.cuda.memory_allocated() // 2**20, torch.cuda.memory_reserved() // 2**20))
    note("decoding: MiB left (allocated, reserved)", model=name, dtype=dtype, left=left)


def with_tf32(name: str, dtype: torch.dtype, model: Any, policy: LanguageModel) -> None:
    """Try a rollout with float32 weights and TF32 products, a common setting for training."""
    if not ON_GPU or dtype != torch.float32:
        return
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        fresh = LanguageModel(model)
        run(fresh, make_prompts(fresh, ragged=True), Sampling(4), None)
        note("decoding: TF32", model=name, fused=fresh.fused, rollout="works")
    except ValueError as error:
        note("decoding: TF32", model=name, raises=str(error)[:300])
    finally:
        torch.backends.cuda.matmul.fp32_precision = "ieee"


def failed_capture() -> None:
    """Record the state after capturing a step that waits for the device, and the message."""
    policy = LanguageModel(random_llama("tiny", torch.float32))
    x = torch.ones(4, device=DEVICE)
    before, told = torch.cuda.current_stream(), "no error"
    try:
        cuda_graphs(DEVICE)(lambda: (x * 2).sum().item())
    except RuntimeError as error:
        told = first_line(error)
    found: dict[str, Any] = {"told": told}
    found["stream_restored"] = before == torch.cuda.current_stream()
    block = torch.empty(2**28, dtype=torch.uint8, device=DEVICE)
    del block
    reserved = torch.cuda.memory_reserved()
    torch.cuda.empty_cache()
    found["memory_is_freed"] = torch.cuda.memory_reserved() < reserved
    found["randn_works"] = bool(torch.randn(4, device=DEVICE).isfinite().all())
    found["a_later_capture"] = cuda_graph_check.why_not(policy, cuda_graphs) or "works"

    def waits(*_: Any) -> None:
        x.sum().item()

    handle = policy.body.register_forward_pre_hook(waits)  # type: ignore[union-attr]
    found["a_model_that_waits"] = cuda_graph_check.why_not(policy, cuda_graphs)
    handle.remove()
    found["and_then"] = cuda_graph_check.why_not(policy, cuda_graphs) or "works"
    note("decoding: a failed capture", **found)


PARTS = {
    "values": values,
    "greedy": greedy,
    "tf32": with_tf32,
    "speed": speed,
    "kept": kept,
    "one_step": one_step,
    "memory": memory,
}


def main() -> None:
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
    logging.getLogger("ppo_fast").setLevel(logging.INFO)
    arguments = parser()
    arguments.add_argument("--models", default="SmolLM2-135M,Llama-1B" if ON_GPU else "tiny")
    arguments.add_argument("--parts", default=",".join([*PARTS, "failed"]))
    asked = arguments.parse_args()
    names = asked.models.split(",")
    wanted = {name: part for name, part in PARTS.items() if name in asked.parts.split(",")}
    for name, dtype in [(names[0], torch.float32), *((name, torch.bfloat16) for name in names)]:
        with attempt("decoding"), torch.no_grad():
            model = random_llama(name, dtype)
            policy = LanguageModel(model)
            for title, part in wanted.items():
                if dtype == torch.bfloat16 or title in ("values", "greedy", "tf32"):
                    with attempt(f"decoding: {title}"):
                        part(name, dtype, model, policy)
        model = policy = None
        gc.collect()
        if ON_GPU:
            torch.cuda.empty_cache()
    if ON_GPU and "failed" in asked.parts:
        with torch.no_grad(), attempt("decoding: a failed capture"):
            failed_capture()


if __name__ == "__main__":
    with nullcontext() if ON_GPU else as_on_a_gpu():
        main()
    synchronize()
