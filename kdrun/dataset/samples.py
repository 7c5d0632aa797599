"""From texts to tokens: how one tokenizer reads prompts with completions, conversations and plain text, and what of it is learned.

A teacher with a tokenizer of its own reads the same texts by a reader of its own. Where both cut a text alike is found by the offsets of
their tokens, so that what they say of a stretch between two common cuts can be compared (Universal Logit Distillation).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kdrun.dataset.tokens import Sample
from kdrun.dataset.vocabulary import Tokenized
from kdrun.errors import Problem, Refused

Template = bool | Literal["auto"]
Turn = Mapping[str, Any]  # {role: user | assistant | system, content: TEXT}


@dataclass(frozen=True)
class Reader:
    """One tokenizer and how it is used. `key`: where the configuration names it."""

    vocabulary: Tokenized
    template: Template = "auto"
    separator: str = "\n"  # between prompt and completion where no template is used
    offsets: bool = False  # whether samples say where their tokens end in the text
    key: str = "dataset.tokenizer"

    @property
    def chats(self) -> bool:
        """Whether prompts and completions become a conversation. Raises `Refused` where a template is asked for and there is none."""
        tokenizer = self.vocabulary.tokenizer
        has = getattr(tokenizer, "chat_template", None) is not None
        if self.template is True and not has:
            what = f"the tokenizer {tokenizer.name_or_path} has no chat template"
            raise Refused(Problem(what, "dataset.template", "", "dataset.template=false, or the tokenizer of the chat model"))
        return has and self.template is not False

    def pair(self, prompt: str, completion: str, where: str) -> Sample:
        """A prompt and its completion; the completion and its end are learned."""
        if self.chats:
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
            return self.conversation(turns, where)
        # Tokenised apart, so that where the prompt ends is where its ids end.
        end = [] if self.vocabulary.eos is None else [self.vocabulary.eos]
        first = self._begun() + self.vocabulary.encode(f"{prompt}{self.separator}")
        then = self.vocabulary.encode(completion) + end
        sample = Sample(first + then, [False] * len(first) + [True] * len(then))
        if not self.offsets:
            return sample
        ends = self._ends(completion, then[: len(then) - len(end)])
        if ends is None:
            return sample
        core = completion.strip()
        lead = completion.index(core)
        closing = [len(core) + 1] * len(end)
        return sample._replace(
            ends=[-1] * len(first) + [min(max(e - lead, 0), len(core)) for e in _closed(ends, len(completion))] + closing
        )

    def conversation(self, turns: Sequence[Turn], where: str, last: bool = False) -> Sample:
        """A conversation by the tokenizer's template; learned is what the assistant says (its `last` turn alone), the end of turn included.

        Raises `Refused` without a template, and for one that writes earlier turns otherwise once later ones follow.
        """
        if getattr(self.vocabulary.tokenizer, "chat_template", None) is None:
            remedy = "the tokenizer of a chat model, or columns prompt and completion instead of messages"
            raise Refused(Problem("conversations need a chat template, and the tokenizer has none", self.key, where, remedy))
        tokens: list[int] = []
        scored: list[bool] = []
        ends: list[int] | None = [] if self.offsets else None
        told = 0  # characters of the answers so far, two more for each
        speaks = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
        for i in speaks[-1:] if last else speaks:
            before, after = self._ids(turns[:i], True), self._ids(turns[: i + 1], False)
            if before[: len(tokens)] != tokens or after[: len(before)] != before:
                what = "its chat template writes a turn otherwise when others follow, so the assistant's tokens cannot be told apart"
                raise Refused(Problem(what, "dataset.template", where, "one assistant turn a row, or dataset.template=false"))
            if ends is not None:
                found = self._ends_of_turn(turns, i, before, after, told)
                ends = None if found is None else ends + [-1] * (len(before) - len(tokens)) + found
            scored += [False] * (len(before) - len(tokens)) + [True] * (len(after) - len(before))
            tokens, told = after, told + len(str(turns[i].get("content") or "").strip()) + 2
        return Sample(tokens, scored, ends=ends)

    def pieces(self, text: str, length: int) -> list[tuple[Sample, str]]:
        """A whole text with its end, in pieces of at most `length` tokens, all of them learned; each with its part of the text, which is
        known where offsets are."""
        begin, ids = self._begun(), self.vocabulary.encode(text)
        end = [] if self.vocabulary.eos is None else [self.vocabulary.eos]
        ends = self._ends(text, ids) if self.offsets else None
        places = None if ends is None else _closed(ends, len(text)) + [len(text) + 1] * len(end)
        made, ids, room = [], ids + end, length - len(begin)
        for i in range(0, len(ids), room):
            tokens, part = begin + ids[i : i + room], ""
            sample = Sample(tokens, [True] * len(tokens))
            if places is not None:
                first, own = places[i - 1] if i else 0, places[i : i + room]
                part, sample = text[first : own[-1]], sample._replace(ends=[-1] * len(begin) + [e - first for e in own])
            made.append((sample, part))
        return made

    def translated(self, text: str, whole: bool) -> Sample:
        """A piece of a text that another tokenizer cut; `whole`: the text ends with it."""
        begin, end = self._begun(), [self.vocabulary.eos] if whole and self.vocabulary.eos is not None else []
        ids = self.vocabulary.encode(text)
        ends = self._ends(text, ids)
        known = None if ends is None else [-1] * len(begin) + _closed(ends, len(text)) + [len(text) + 1] * len(end)
        return Sample(begin + ids + end, [True] * (len(begin) + len(ids) + len(end)), ends=known)

    def _begun(self) -> list[int]:
        """What the tokenizer puts before every text."""
        begin = getattr(self.vocabulary.tokenizer, "bos_token_id", None)
        return [] if begin is None else [begin]

    def _ids(self, turns: Sequence[Turn], ask: bool) -> list[int]:
        tokenizer = self.vocabulary.tokenizer
        return list(tokenizer.apply_chat_template(list(turns), add_generation_prompt=ask, tokenize=True, return_dict=False))

    def _ends(self, text: str, ids: Sequence[int]) -> list[int] | None:
        """Where each token of a text ends; None where the tokenizer does not say."""
        if not getattr(self.vocabulary.tokenizer, "is_fast", False):
            return None
        found = self.vocabulary.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return [end for _, end in found["offset_mapping"]] if list(found["input_ids"]) == list(ids) else None

    def _ends_of_turn(self, turns: Sequence[Turn], i: int, before: list[int], after: list[int], told: int) -> list[int] | None:
        """Of the tokens of turn i, which the template wrote; those after its content end beyond it."""
        written = [
            self.vocabulary.tokenizer.apply_chat_template(list(part), add_generation_prompt=ask, tokenize=False)
            for part, ask in ((turns[:i], True), (turns[: i + 1], False))
        ]
        content = str(turns[i].get("content") or "").strip()
        ends, first = self._ends(written[1], after), written[1].find(content, len(written[0]))
        if ends is None or first < 0 or not content:
            return None
        beyond = first + len(content)
        return [
            -1 if end <= first else told + (end - first if end <= beyond else len(content) + 1)
            for end in ends[len(before) :]
        ]  # fmt: skip


def _closed(ends: list[int], length: int) -> list[int]:
    """The last token ends where the text does, though it may leave out white space there."""
    return [*ends[:-1], length] if ends else ends


def beside(own: Sample, theirs: Sample) -> tuple[Sample, Sample]:
    """Both with the stretches of the text between the cuts that they have in common; as they are where the cuts are not known."""
    if own.ends is None or theirs.ends is None:
        return own, theirs
    common = sorted(({*own.ends} & {*theirs.ends}) - {-1})
    numbered = []
    for sample in (own, theirs):
        at = [-1 if end < 0 else bisect_left(common, end) for end in sample.ends or ()]
        numbered.append(sample._replace(stretches=[-1 if n == len(common) else n for n in at]))
    return numbered[0], numbered[1]


def matched_ids(own: Tokenized, theirs: Tokenized) -> list[tuple[int, int]]:
    """The ids of two tokenizers that mean the same bytes, each id once at most, and their ends of text."""
    there: dict[tuple[bool, bytes], int] = {}
    for i, meaning in enumerate(theirs.meanings()):
        there.setdefault(meaning, i)
    pairs = [] if own.eos is None or theirs.eos is None else [(own.eos, theirs.eos)]
    pairs += [(i, there[meaning]) for i, meaning in enumerate(own.meanings()) if meaning in there]
    once: dict[int, int] = {}
    taken: set[int] = set()
    for i, other in pairs:
        if i not in once and other not in taken:
            once[i] = other
            taken.add(other)
    return sorted(once.items())
