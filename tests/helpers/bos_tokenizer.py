"""A tokenizer that adds BOS and EOS by itself."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = ["<s>", "</s>", "<think>", "▁the", "▁film", "▁was", "n't", "▁", "g", "ood"]


def sentencepiece_like(template="<s> $A </s>"):
    """A tokenizer whose decoder drops the space before the first word, as Llama 2's does."""
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="▁"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = [("<s>", 0), ("</s>", 1)]
    tokenizer.post_processor = processors.TemplateProcessing(template, special_tokens=special)
    tokenizer.add_special_tokens(WORDS[:3])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
