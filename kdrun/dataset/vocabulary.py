"""What turns text into token ids and back: a tokenizer of the hub, or the symbols of a made-up world."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

_BYTE_LEVEL = "ByteLevel"  # the decoder of GPT-2's kind, whose tokens spell bytes as printable characters
_SPACE = "\u2581"  # of SentencePiece


class Vocabulary(Protocol):
    """Token ids are 0 to `size` - 1; ids above it are padding of a model's matrix and no tokens."""

    @property
    def size(self) -> int: ...

    @property
    def eos(self) -> int | None:
        """Ends a text."""

    @property
    def pad(self) -> int:
        """Fills rows up; never scored, never attended to by what is scored."""

    @property
    def digest(self) -> str:
        """Two vocabularies with the same digest give every text the same ids."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without a beginning or an end of text."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included."""

    def text(self, ids: Sequence[int]) -> str:
        """What people read: without special tokens."""


@dataclass(frozen=True)
class Symbols:
    """A vocabulary of written-out symbols, parted by spaces."""

    names: tuple[str, ...]
    eos: int | None = None
    pad: int = 0

    @property
    def size(self) -> int:
        return len(self.names)

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.names).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Raises ValueError for a word that is no symbol."""
        ids = {name: i for i, name in enumerate(self.names)}
        words = text.split()
        unknown = [word for word in words if word not in ids]
        if unknown:
            raise ValueError(f"no symbol of this vocabulary: {', '.join(unknown)}")
        return [ids[word] for word in words]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(self.names[i] for i in ids)

    def text(self, ids: Sequence[int]) -> str:
        return self.decode(ids)


@dataclass(frozen=True, eq=False)
class Tokenized:
    """The vocabulary of a tokenizer of transformers."""

    tokenizer: Any

    @property
    def size(self) -> int:
        return len(self.tokenizer)

    @property
    def eos(self) -> int | None:
        return self.tokenizer.eos_token_id

    @property
    def pad(self) -> int:
        # Many published tokenizers have no padding; any id will do, since padding is never scored.
        own = self.tokenizer.pad_token_id
        return own if own is not None else (self.eos or 0)

    @property
    def digest(self) -> str:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        content = backend.to_str() if backend is not None else json.dumps(self.tokenizer.get_vocab(), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids)))

    def meanings(self) -> list[tuple[bool, bytes]]:
        """What each id stands for: (whether it is a special token, the bytes that it writes; of a special one its name)."""
        names = self.tokenizer.convert_ids_to_tokens(list(range(self.size)))
        special, backend = set(self.tokenizer.all_special_ids), getattr(self.tokenizer, "backend_tokenizer", None)
        by_bytes = _BYTE_LEVEL in repr(getattr(backend, "decoder", ""))
        return [(i in special, str(name).encode() if i in special else _written(str(name), by_bytes)) for i, name in enumerate(names)]

    def text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


def _written(name: str, by_bytes: bool) -> bytes:
    """The bytes that a token of a fast tokenizer writes: <0x0A> is a byte that SentencePiece has no character for."""
    if by_bytes:
        table = _byte_of()
        return bytes(table[c] for c in name) if all(c in table for c in name) else name.encode()
    if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
        return bytes.fromhex(name[3:5])
    return name.replace(_SPACE, " ").encode()


@cache
def _byte_of() -> dict[str, int]:
    """By the character that stands for it: printable Latin-1 for itself, the others from 256 on (GPT-2's public code)."""
    plain = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}
