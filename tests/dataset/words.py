"""A tokenizer of whole words and tiny models that were made with it, in folders as the hub has them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<user>", "<assistant>", "<system>", "<end>")
WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "plus", "is", "what", "why", "Because", ".")
PAD, BOS, EOS, UNK, USER, ASSISTANT, SYSTEM, END = range(len(SPECIAL))
TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end> {% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
# As templates of models that think do: what was said before the last turn is written otherwise.
REWRITING = (
    "{% for m in messages %}<{{ m.role }}> {% if loop.last or m.role == 'user' %}{{ m.content }} {% endif %}<end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def write_tokenizer(folder: Path, template: str | None = None, words: Sequence[str] = WORDS, **special: Any) -> Path:
    """A tokenizer's folder. `special`: of PreTrainedTokenizerFast, e.g. eos_token=None."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(WordLevel({word: i for i, word in enumerate((*SPECIAL, *words))}, unk_token="<unk>"))
    made.pre_tokenizer = WhitespaceSplit()
    named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | special
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, **{k: v for k, v in named.items() if v is not None})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def write_bytes_tokenizer(folder: Path, merges: Sequence[str], **special: Any) -> Path:
    """A byte-level tokenizer as GPT-2's: every byte, those merges (printable characters, parted by a space) and the words above."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    joined = [(a, b) for a, b in (merge.split() for merge in merges)]
    symbols = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in joined)]
    made = Tokenizer(BPE({symbol: i for i, symbol in enumerate(symbols)}, joined))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"} | special
    PreTrainedTokenizerFast(tokenizer_object=made, **named).save_pretrained(folder)
    return folder


def write_model(
    folder: Path, seed: int = 0, words: Sequence[str] = WORDS, rows: int | None = None, tokenizer: bool = True, **sizes: Any
) -> Path:
    """A Llama with fresh weights beside its tokenizer, which is written unless it is there; `rows` of its matrix, which may be padded."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    if tokenizer:
        write_tokenizer(folder, words=words)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(seed)
    config = LlamaConfig(
        **shape | {"vocab_size": rows or len(SPECIAL) + len(words), "max_position_embeddings": 64, "initializer_range": 0.3, **sizes},
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def ids(text: str) -> list[int]:
    return [(*SPECIAL, *WORDS).index(word) for word in text.split()]


def write_jsonl(file: Path, rows: Iterable[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def pairs(count: int = 12) -> list[dict[str, str]]:
    """Questions and answers of uneven length."""
    return [
        {
            "prompt": f"what is {WORDS[i % 8]} plus {WORDS[(3 * i) % 8]}",
            "completion": " ".join(WORDS[(i + j) % 8] for j in range(1 + i % 3)),
        }
        for i in range(count)
    ]
