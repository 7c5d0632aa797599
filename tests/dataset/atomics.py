"""ATOMIC-10x in small: a file in the schema of the released one, and a tokenizer of its words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RELATIONS = ("xWant", "xNeed", "HinderedBy")
TAILS = ("to rest", "to thank PersonY", "a coin", "PersonX is ill")
HEADS = {"train": range(8), "val": range(8, 10), "test": range(10, 13)}


def rows() -> list[dict[str, Any]]:
    """Every head with every relation and tail; kept at 0.5 is every second of them, at 0.8 three of four."""
    found = []
    for split, numbers in HEADS.items():
        for number in numbers:
            for relation in RELATIONS:
                for i, tail in enumerate(TAILS):
                    flags = {"rec_0.5": i % 2 == 0, "rec_0.8": i != 3, "rec_0.9": True}
                    head = f"PersonX gives PersonY {number} coins"
                    found.append({"head": head, "relation": relation, "tail": tail, "split": split, **flags, "p_valid_model": 1 - i / 4})
    return found


def write_triples(file: Path, triples: list[dict[str, Any]] | None = None) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in triples or rows()))
    return file


def write_tokenizer(folder: Path) -> Path:
    """Whole words and single marks, as a tokenizer of transformers."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from kdrun.dataset.names import FIRST_NAMES

    text = " ".join(f"<head> {row['head']} </head> <relation> {row['relation']} </relation> [GEN] {row['tail']}" for row in rows())
    split = pre_tokenizers.WhitespaceSplit()
    words = dict.fromkeys(word for word, _ in split.pre_tokenize_str(f"{text} {' '.join(FIRST_NAMES)}"))
    inside = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<end>", "<unknown>", *words])}, unk_token="<unknown>"))
    inside.pre_tokenizer = split
    PreTrainedTokenizerFast(tokenizer_object=inside, eos_token="<end>", unk_token="<unknown>").save_pretrained(str(folder))
    return folder
