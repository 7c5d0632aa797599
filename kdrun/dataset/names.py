"""People in general, and people by name: PersonX and PersonY of ATOMIC's events for names, and back.

Language models speak better of Alex than of PersonX, so Symbolic Knowledge Distillation (arXiv 2110.07178) puts names in before it asks and
takes them out of what was said. Words are replaced whole, so that a name inside another word stays. The list of first names is ours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch

from kdrun import rng

PEOPLE = ("PersonX", "PersonY", "PersonZ")
QUERY = ("Alex", "Chris")  # of the open question in the authors' prompts
FIRST_NAMES = (
    "Alex", "Avery", "Blake", "Cameron", "Casey", "Charlie", "Chris", "Dakota", "Drew", "Eden", "Emerson", "Finley", "Harper", "Hayden",
    "Jamie", "Jordan", "Jules", "Kelly", "Kendall", "Lee", "Logan", "Morgan", "Parker", "Peyton", "Quinn", "Reese", "Riley", "River",
    "Robin", "Rowan", "Sage", "Sam", "Sawyer", "Skyler", "Taylor",
)  # fmt: skip


def named(text: str, names: Mapping[str, str]) -> str:
    """The text with each person's name, {"PersonX": "Alex"}."""
    return _replaced(text, names)


def scrubbed(text: str, names: Mapping[str, str]) -> str:
    """The inverse: scrubbed(named(s)) == s where none of the names is a word of s. Raises ValueError where two people have one name."""
    people = {name: person for person, name in names.items()}
    if len(people) < len(names):
        raise ValueError(f"two people are called {', '.join(names.values())}: their names cannot be taken back")
    return _replaced(text, people)


def draw_names(text: str, key: int, number: int, people: Sequence[str] = PEOPLE) -> dict[str, str]:
    """Different random names for the people, none of them a word of the text; the draw is `number` of those of `key`."""
    words = {*re.findall(r"\w+", text)}
    order = rng.bits(key, number, torch.arange(len(FIRST_NAMES))).argsort(stable=True).tolist()
    free = [FIRST_NAMES[i] for i in order if FIRST_NAMES[i] not in words]
    if len(free) < len(people):
        raise ValueError(f"{len(free)} first names are free for {len(people)} people")
    return dict(zip(people, free, strict=False))


def _replaced(text: str, words: Mapping[str, str]) -> str:
    if not words:
        return text
    pattern = "|".join(re.escape(word) for word in words)
    return re.sub(rf"\b(?:{pattern})\b", lambda match: words[match.group()], text)
