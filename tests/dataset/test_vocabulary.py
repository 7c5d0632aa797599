"""Text to ids and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kdrun.dataset.vocabulary import Symbols, Tokenized, Vocabulary

WORDS = ("the", "cat", "sat")


def tokenizer(words: Sequence[str] = WORDS, **special: str) -> Any:
    """A tokenizer of transformers, of whole words."""
    ids = {word: i for i, word in enumerate(["<unk>", *words])}
    core = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", **special)


@pytest.mark.parametrize("vocabulary", [Symbols(WORDS), Tokenized(tokenizer())], ids=["symbols", "tokenizer"])
def test_a_text_comes_back(vocabulary: Vocabulary) -> None:
    ids = vocabulary.encode("sat the cat the")
    assert len(ids) == 4
    assert ids[1] == ids[3]
    assert max(ids) < vocabulary.size
    assert vocabulary.decode(ids) == "sat the cat the"
    assert vocabulary.encode("") == []


def test_an_unknown_symbol_is_an_error_and_not_another_one() -> None:
    with pytest.raises(ValueError, match="dog"):
        Symbols(WORDS).encode("the dog")


def test_a_tokenizer_adds_no_beginning_and_no_end_and_decodes_its_special_tokens() -> None:
    made = Tokenized(tokenizer(bos_token="<s>", eos_token="</s>"))
    assert made.size == 6  # the added tokens count
    assert made.encode("the cat") == [1, 2]
    assert made.eos == 5
    assert made.decode([1, 5]) == "the </s>"


def test_padding_is_the_tokenizer_s_own_or_the_end_of_a_text_or_the_first_id() -> None:
    made = Tokenized(tokenizer(pad_token="cat", eos_token="</s>"))
    assert made.decode([made.pad]) == "cat"
    made = Tokenized(tokenizer(eos_token="</s>"))
    assert made.pad == made.eos == 4
    assert Tokenized(tokenizer()).pad == 0


def test_the_digest_tells_vocabularies_apart() -> None:
    same = [Tokenized(tokenizer()), Tokenized(tokenizer())]
    assert same[0].digest == same[1].digest
    others = [Tokenized(tokenizer(("the", "sat", "cat"))), Tokenized(tokenizer((*WORDS, "mat"))), Symbols(WORDS), Symbols(WORDS[::-1])]
    assert len({same[0].digest, *(other.digest for other in others)}) == 5
    assert Symbols(WORDS).digest == Symbols(WORDS).digest
