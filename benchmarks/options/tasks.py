"""Two small tasks, each with a tiny language model that has had a short supervised start."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

STARTS = Path(__file__).parents[2] / "runs" / "options"  # models after their supervised start
PAD, EOS = "<pad>", "<eos>"


@dataclass(frozen=True)
class Task:
    """A task.

    name: its name.
    tokenizer: the model's.
    example: draws (prompt, response) for the supervised start.
    reward: the reward of whole responses.
    token_reward: a module that gives a reward for each token; None: there is none.
    start_steps: supervised steps of 256 examples.
    steps, batch_size, max_length: of PPO.
    """

    name: str
    tokenizer: PreTrainedTokenizerFast
    example: Callable[[torch.Generator], tuple[str, str]]
    reward: Callable[[Sequence[str], Sequence[str]], list[float]]
    token_reward: nn.Module | None
    start_steps: int
    steps: int
    batch_size: int
    max_length: int

    def prompts(self, count: int, seed: int) -> list[str]:
        generator = torch.Generator().manual_seed(seed)
        return [self.example(generator)[0] for _ in range(count)]


def tokenizer_of(tokens: Sequence[str], separator: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are characters (no separator) or words between spaces."""
    found = Tokenizer(WordLevel({t: i for i, t in enumerate([PAD, EOS, *tokens])}, unk_token=PAD))
    pattern = Regex(r"\s+") if separator else ""
    behaviour = "removed" if separator else "isolated"
    found.pre_tokenizer = pre_tokenizers.Split(pattern, behaviour)
    if not separator:
        found.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=found, pad_token=PAD, eos_token=EOS)


# Sums of two numbers of two digits: the reward is 1 where the answer is right.


def sum_example(generator: torch.Generator) -> tuple[str, str]:
    a, b = torch.randint(10, 100, (2,), generator=generator).tolist()
    return f"{a}+{b}=", str(a + b)


def sum_reward(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    pairs = zip(prompts, completions, strict=True)
    return [float(c == str(sum(map(int, p[:-1].split("+"))))) for p, c in pairs]


# Sentences of words that each follow some others: the reward is the mean of the words' valences.

NUM_WORDS, FOLLOWERS = 96, 8
WORDS = [f"w{i}" for i in range(NUM_WORDS)]


@cache
def language() -> tuple[Tensor, Tensor]:
    """Return the words that may follow each word [NUM_WORDS, FOLLOWERS], and words' valences."""
    generator = torch.Generator().manual_seed(1)
    followers = torch.stack(
        [torch.randperm(NUM_WORDS, generator=generator)[:FOLLOWERS] for _ in range(NUM_WORDS)]
    )
    return followers, torch.rand(NUM_WORDS, generator=generator) * 2 - 1


def sentence_example(generator: torch.Generator) -> tuple[str, str]:
    followers, _ = language()
    words = [int(torch.randint(NUM_WORDS, (), generator=generator))]
    for _ in range(int(torch.randint(10, 18, (), generator=generator))):
        words.append(int(followers[words[-1], torch.randint(FOLLOWERS, (), generator=generator)]))
    texts = [WORDS[word] for word in words]
    return " ".join(texts[:3]), " ".join(texts[3:])


def sentence_reward(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """Return the sum of valences of each completion's words, by 4; at most 16 words are sampled."""
    _, valence = language()
    rows = [[float(valence[int(w[1:])]) for w in c.split() if w[0] == "w"] for c in completions]
    return [sum(row) / 4 for row in rows]


class WordReward(nn.Module):
    """The same reward, on each word."""

    def __init__(self) -> None:
        super().__init__()
        table = torch.cat([torch.zeros(2), language()[1] / 4])
        self.table = nn.Parameter(table, requires_grad=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.table[input_ids]


TASKS = {
    task.name: task
    for task in (
        Task(
            name="sums",
            tokenizer=tokenizer_of("0123456789+=", ""),
            example=sum_example,
            reward=sum_reward,
            token_reward=None,
            start_steps=200,
            steps=40,
            batch_size=128,
            max_length=4,
        ),
        Task(
            name="sentences",
            tokenizer=tokenizer_of(WORDS, " "),
            example=sentence_example,
            reward=sentence_reward,
            token_reward=WordReward(),
            start_steps=300,
            steps=20,
            batch_size=64,
            max_length=16,
        ),
    )
}


def new_model(task: Task) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(task.tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=task.tokenizer.eos_token_id,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def started_model(task: Task) -> LlamaForCausalLM:
    """Return the task's model after its supervised start, which is computed once."""
    folder = STARTS / task.name
    if not folder.exists():
        model = new_model(task)
        train_supervised(model, task)
        model.save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def train_supervised(model: LlamaForCausalLM, task: Task, batch_size: int = 256) -> None:
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    for _ in range(task.start_steps):
        input_ids, labels = batch_of(task, generator, batch_size)
        loss = model(input_ids=input_ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def batch_of(task: Task, generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
    """Return padded ids [B, L] of examples and labels, -100 at prompts and padding."""
    encode: Any = task.tokenizer
    rows, labels = [], []
    for _ in range(count):
        prompt, response = task.example(generator)
        first = encode(prompt)["input_ids"]
        last = [*encode(response)["input_ids"], task.tokenizer.eos_token_id]
        rows.append(torch.tensor(first + last))
        labels.append(torch.tensor([-100] * len(first) + last))
    pad = nn.utils.rnn.pad_sequence
    return pad(rows, batch_first=True), pad(labels, batch_first=True, padding_value=-100)
