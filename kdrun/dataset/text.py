"""Texts out of files, as token sequences: plain text, prompts with completions, conversations, preferences; jsonl, parquet, csv, the hub.

One tokenizer serves teacher and student, and with a chat template both read the very same ids; or `teacher_tokenizer` reads every row once
more. What is learned is the completion (of a conversation: what the assistant says; of a pair: what was chosen), or everything where
`score` says so. Whole texts are cut into pieces, conversations never are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from kdrun.dataset.base import Data, Storage
from kdrun.dataset.files import Files, Format, Table
from kdrun.dataset.rewards import reward_named
from kdrun.dataset.samples import Reader, Template, beside, matched_ids
from kdrun.dataset.select import select
from kdrun.dataset.tokens import MATCHED, REJECTED, TEACHER, Ragged, RandomTokens, Sample, TokenSplit, packed
from kdrun.dataset.vocabulary import Tokenized
from kdrun.errors import Problem, Refused

USUAL: Mapping[str, tuple[str, ...]] = {  # by what a row is: the columns that say so, by the names that are used for them
    "messages": ("messages", "conversations"),
    "completion": ("completion", "response", "answer", "output", "target"),
    "prompt": ("prompt", "question", "instruction", "input", "source"),
    "text": ("text", "content"),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "reasoning": ("reasoning", "thinking", "trace"),
}
SPEAKERS = {"human": "user", "gpt": "assistant"}  # of turns {from, value}
Long = Literal["refuse", "drop", "cut"]


@dataclass
class TextData:
    """Settings: conf/dataset/text.yaml. Raises ValueError for a field outside its range."""

    name: str = "text"
    hub: str | None = None
    revision: str | None = None
    path: str | None = None
    format: Format = "auto"
    splits: dict[str, str] = field(default_factory=lambda: {"train": "train", "test": "test"})
    columns: dict[str, str] = field(default_factory=dict)
    tokenizer: str | None = None
    teacher_tokenizer: str | None = None
    trust_remote_code: bool = False
    template: Template = "auto"
    score: Literal["completion", "all"] = "completion"
    separator: str = "\n"
    max_length: int = 1024
    too_long: Long = "refuse"
    pack: bool = False
    privileged: str | None = None
    trace: str | None = "<think>\n{reasoning}\n</think>\n{completion}"
    reward: str | None = None
    test_share: float = 0.1
    validation: float = 0.0
    subset: int | None = None
    subset_test: int | None = None
    sizes: dict[str, int] | None = None
    input_shape: list[int] | None = None
    classes: int | None = None
    teacher_classes: int | None = None

    def __post_init__(self) -> None:
        if self.privileged is not None and (self.pack or "{completion}" not in self.privileged):
            raise ValueError(f"privileged={self.privileged!r}: a text with {{prompt}} and {{completion}}, of rows that are not packed")
        if self.trace is not None and not all(word in self.trace for word in ("{reasoning}", "{completion}")):
            raise ValueError(f"trace={self.trace!r}: a text with {{reasoning}} and {{completion}}, or null")
        if self.teacher_tokenizer is not None:
            legal = {"pack": (False, "false"), "score": ("completion", "completion"), "privileged": (None, "null")}
            for key, (value, written) in legal.items():
                if getattr(self, key) != value:
                    raise ValueError(f"{key}={getattr(self, key)}: {written} beside a teacher_tokenizer, which reads single completions")
        if self.max_length < 2:
            raise ValueError(f"max_length={self.max_length}: legal range [2, inf)")
        for key in ("test_share", "validation"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)}: legal range [0, 1)")
        if unknown := self.columns.keys() - USUAL.keys():
            raise ValueError(f"columns.{min(unknown)}: legal are {', '.join(USUAL)}")

    @staticmethod
    def stand_in(storage: Storage, ids: Tensor, input_shape: Sequence[int], classes: int) -> TokenSplit:
        """A split for planning, from its stated size: random tokens, all of them scored."""
        return TokenSplit.of(RandomTokens(len(ids), input_shape[0], classes), ids)

    def load(self) -> Data:
        """Read, tokenise, cut. Raises `Refused` for files, columns, a tokenizer or texts that cannot be used."""
        judge = None if self.reward is None else reward_named(self.reward)
        readers = self._readers()
        tables = self._open()
        made = {name: self._rows(table, readers, name) for name, table in tables.items()}
        if "test" not in made:
            made["train"], made["test"] = self._carved(made["train"])
        targets = {name: torch.zeros(len(rows), dtype=torch.int64) for name, rows in made.items()}
        chosen = select(targets, self.validation, self.subset, self.subset_test)
        kept = {name: ([made[part.table][i] for i in part.rows.tolist()], part.ids) for name, part in chosen.items()}
        vocabularies, total = [reader.vocabulary for reader in readers], sum(map(len, made.values()))
        splits = {name: self._split(*part, vocabularies, name) for name, part in kept.items()}
        translated = None
        if len(vocabularies) > 1:
            matched = torch.tensor(matched_ids(vocabularies[0], vocabularies[1])).view(-1, 2)
            theirs = {name: TokenSplit.of(split.beside[TEACHER], split.ids) for name, split in splits.items()}
            translated = self._data(theirs, vocabularies[1], total, judge)
            splits = {name: replace(split, constants={MATCHED: matched}) for name, split in splits.items()}
        return self._data(splits, vocabularies[0], total, judge, translated)

    def _data(
        self,
        splits: Mapping[str, TokenSplit],
        vocabulary: Tokenized,
        total: int,
        judge: Callable[[str, str], float] | None,
        translated: Data | None = None,
    ) -> Data:
        # Padded rows of a matrix are no tokens, so the classes are the tokenizer's own.
        names = tuple(vocabulary.tokenizer.convert_ids_to_tokens(list(range(vocabulary.size))))
        reward = None if judge is None else lambda right, written: judge(vocabulary.text(right), vocabulary.text(written))
        shape = (self.max_length - 1,)
        return Data(self.name, names, shape, (), (), splits, total, vocabulary=vocabulary, reward=reward, translated=translated)

    def _split(self, rows: list[Sample], ids: Tensor, vocabularies: Sequence[Tokenized], name: str) -> TokenSplit:
        pads = {TEACHER: vocabularies[-1].pad, REJECTED: vocabularies[0].pad}
        packs = list(packed(rows, self.max_length)) if self.pack and name == "train" else [[row] for row in rows]
        aided = None if self.privileged is None else Ragged.of([[row.aided] for row in rows if row.aided], vocabularies[0].pad)
        others = {key: Ragged.of([[row.beside[key]] for row in rows if row.beside], pads[key]) for key in rows[0].beside or ()}
        # A packed row has the id of the first of as many texts.
        return replace(TokenSplit.of(Ragged.of(packs, vocabularies[0].pad), ids[: len(packs)], aided), beside=others)

    # -- files and tokenizer ------------------------------------------------------------------------------------------

    def _open(self) -> dict[str, Table]:
        single = self.path is not None and Path(self.path).expanduser().is_file()
        splits = {"train": Path(str(self.path)).name.split(".")[0]} if single else dict(self.splits)
        files = Files(self.path, self.hub, self.revision, self.format, splits, tuple(self.columns.values()), lines=True)
        return files.open()

    def _readers(self) -> tuple[Reader, ...]:
        """Of the student's tokenizer, and of the teacher's where it has one of its own. Raises `Refused` for one that cannot be had."""
        if self.tokenizer is None:
            remedy = "dataset.tokenizer=<hub name or folder of the model>"
            raise Refused(Problem("text needs a tokenizer, and none is named", "dataset.tokenizer", "", remedy))
        named = {"dataset.tokenizer": self.tokenizer, "dataset.teacher_tokenizer": self.teacher_tokenizer}
        return tuple(
            Reader(Tokenized(self._opened(name, key)), self.template, self.separator, self.teacher_tokenizer is not None, key)
            for key, name in named.items()
            if name is not None
        )

    def _opened(self, name: str, key: str) -> Any:
        try:
            from transformers import AutoTokenizer
        except ModuleNotFoundError as error:
            raise Refused(
                Problem("text needs the package transformers, which is not installed", "dataset", "", 'pip install "kdrun[text]"')
            ) from error
        try:
            return AutoTokenizer.from_pretrained(name, trust_remote_code=self.trust_remote_code)
        except (OSError, ValueError) as error:
            trust = "trust_remote_code" in str(error)
            remedy = "dataset.trust_remote_code=true, if you trust its code" if trust else "a hub name or a folder with tokenizer.json"
            what = f"no tokenizer can be had from {name} ({' '.join(str(error).split())[:200]})"
            raise Refused(Problem(what, key, "", remedy)) from error

    def _column(self, table: Table, what: str) -> str | None:
        """The column of that meaning, None where there is none. Raises `Refused` for one that was named and is not there."""
        named = self.columns.get(what)
        if named is not None and named not in table.columns:
            remedy = f"dataset.columns.{what}=COLUMN; there are {', '.join(table.columns)}"
            raise Refused(Problem(f"no column '{named}'", f"dataset.columns.{what}", table.where, remedy))
        return named or next((name for name in USUAL[what] if name in table.columns), None)

    # -- rows ---------------------------------------------------------------------------------------------------------

    def _rows(self, table: Table, readers: Sequence[Reader], split: str) -> list[Sample]:
        messages, prompt, completion, text = (self._column(table, what) for what in ("messages", "prompt", "completion", "text"))
        chosen, rejected = (self._column(table, what) for what in ("chosen", "rejected"))
        pairs = chosen is not None and rejected is not None and not self.columns.keys() & {"messages", "completion", "text"}
        if self.privileged is not None and (pairs or messages is not None or prompt is None or completion is None):
            remedy = "dataset.columns.prompt=COLUMN dataset.columns.completion=COLUMN, or dataset.privileged=null"
            raise Refused(Problem("privileged prompts are made of prompts and completions", "dataset.privileged", table.where, remedy))
        if pairs:
            assert chosen is not None
            assert rejected is not None
            made = self._preferences(table, prompt, chosen, rejected, readers)
        elif messages is not None:
            talks = _talks(table, messages)
            made = [_read(readers, lambda reader, turns=turns: reader.conversation(turns, table.where)) for turns in talks]  # type: ignore[misc]
        elif prompt is not None and completion is not None:
            made = self._pairs(table, prompt, completion, readers)
        elif text is not None:
            return self._pieces(table.rows[text], readers)
        else:
            remedy = "dataset.columns.prompt=COLUMN dataset.columns.completion=COLUMN, or dataset.columns.text=COLUMN"
            raise Refused(Problem(f"no text among the columns {', '.join(table.columns)}", "dataset.columns", table.where, remedy))
        if self.score == "all":
            made = [row._replace(scored=[True] * len(row.tokens)) for row in made]
        return self._fitting(made, table.where, split)

    def _pairs(self, table: Table, prompt: str, completion: str, readers: Sequence[Reader]) -> list[Sample]:
        befores, afters = [str(text or "") for text in table.rows[prompt]], list(table.rows[completion])
        _refuse_empty(afters, completion, "completions", table.where)
        reasoning = self._column(table, "reasoning")
        if self.trace is not None and reasoning is not None:
            # A row without reasoning is its answer alone.
            told = zip(table.rows[reasoning], afters, strict=True)
            afters = [_filled(self.trace, reasoning=why, completion=after) if str(why or "").strip() else after for why, after in told]
        rows = []
        for before, after in zip(befores, map(str, afters), strict=True):
            row = _read(readers, lambda reader: reader.pair(before, after, table.where))  # noqa: B023
            if self.privileged is not None:
                row = row._replace(aided=readers[0].pair(_filled(self.privileged, prompt=before, completion=after), after, table.where))
            rows.append(row)
        return rows

    def _preferences(self, table: Table, prompt: str | None, chosen: str, rejected: str, readers: Sequence[Reader]) -> list[Sample]:
        """Pairs: the chosen completion, and the rejected one beside it."""
        befores = [None] * len(table) if prompt is None else list(table.rows[prompt])
        better, worse = ([_talk(*row) for row in zip(befores, table.rows[column], strict=True)] for column in (chosen, rejected))
        for column, talks in ((chosen, better), (rejected, worse)):
            if not all(len(turns) > 1 for turns in talks):
                what, remedy = "completions without a prompt before them", "dataset.columns.prompt=COLUMN, or whole conversations"
                raise Refused(Problem(what, f"dataset.columns.{column}", table.where, remedy))
            _refuse_empty([turns[-1]["content"] for turns in talks], column, "completions", table.where)
        rows = []
        for good, bad in zip(better, worse, strict=True):
            row = _read(readers, lambda reader: _answered(reader, good, table.where))  # noqa: B023
            rows.append(row._replace(beside={**(row.beside or {}), REJECTED: _answered(readers[0], bad, table.where)}))
        return rows

    def _pieces(self, texts: Any, readers: Sequence[Reader]) -> list[Sample]:
        """Whole texts, an end of text after each, in pieces of at most `max_length` tokens, all of them scored."""
        rows: list[Sample] = []
        for text in texts:
            if text is None or not str(text).strip():
                continue  # blank lines of files with one paragraph a line
            made = readers[0].pieces(str(text), self.max_length)
            for n, (own, part) in enumerate(made, 1):
                if len(readers) > 1:
                    own, theirs = beside(own, readers[1].translated(part, n == len(made)))
                    own = own._replace(beside={TEACHER: _cut(theirs, self.max_length)})
                rows.append(own)
        return [row for row in rows if len(row.tokens) > 1]

    def _fitting(self, rows: list[Sample], where: str, split: str) -> list[Sample]:
        sizes = [max(_aided_prompt(row), *(len(sequence.tokens) for sequence in _sequences(row))) for row in rows]
        long = [size for size in sizes if size > self.max_length]
        if long and self.too_long == "refuse":
            what = f"{len(long)} of {len(rows)} {split} rows have more than {self.max_length} tokens, the longest {max(long)}"
            remedy = f"dataset.max_length={max(long)} if the models' context allows it, or dataset.too_long=drop, or =cut"
            raise Refused(Problem(what, "dataset.max_length", where, remedy))
        if self.too_long == "drop":
            rows = [row for row, size in zip(rows, sizes, strict=True) if size <= self.max_length]
        rows = [_cut(row, self.max_length) for row in rows]
        # A privileged prompt is not cut: it would end before the question does.
        kept = [row for row in rows if all(any(s.scored[1:]) for s in _sequences(row)) and _aided_prompt(row) <= self.max_length]
        if not kept:
            what = f"no {split} row has a token to learn within {self.max_length} tokens"
            raise Refused(Problem(what, "dataset.max_length", where, "a larger dataset.max_length"))
        return kept

    def _carved(self, rows: list[Sample]) -> tuple[list[Sample], list[Sample]]:
        """(training, test rows) of a single file: the last `test_share` of it. Neighbours in a file are often alike, so no scattering."""
        held = max(1, round(self.test_share * len(rows)))
        if held >= len(rows):
            raise Refused(
                Problem(f"{len(rows)} rows leave none to test on", "dataset.path", str(self.path), "more rows, or a test split of its own")
            )
        return rows[:-held], rows[-held:]


def _read(readers: Sequence[Reader], make: Callable[[Reader], Sample]) -> Sample:
    """A row by the student's tokenizer, with the teacher's beside it where it has one of its own."""
    own = make(readers[0])
    if len(readers) == 1:
        return own
    own, theirs = beside(own, make(readers[1]))
    return own._replace(beside={TEACHER: theirs})


def _answered(reader: Reader, turns: list[dict[str, Any]], where: str) -> Sample:
    """The last turn of a conversation as the completion: without a template where there is one turn before it and none is used."""
    if len(turns) == 2 and turns[0]["role"] == "user" and not reader.chats:
        return reader.pair(turns[0]["content"], turns[1]["content"], where)
    return reader.conversation(turns, where, last=True)


def _talk(prompt: Any, completion: Any) -> list[dict[str, Any]]:
    """A prompt and a completion, each a text or turns, as one conversation; turns that hold the prompt themselves stand alone."""
    after = [{"role": "assistant", "content": str(completion or "")}] if not isinstance(completion, list) else completion
    if any(turn.get("role") != "assistant" for turn in after) or prompt is None:
        return after
    return [*([{"role": "user", "content": str(prompt)}] if not isinstance(prompt, list) else prompt), *after]


def _refuse_empty(texts: Sequence[Any], column: str, what: str, where: str) -> None:
    empty = [i for i, text in enumerate(texts) if text is None or not str(text).strip()]
    if empty:
        told = f"{len(empty)} empty {what}, the first in row {empty[0]}"
        raise Refused(Problem(told, f"dataset.columns.{column}", where, "leave these rows out, or name another column"))


def _filled(template: str, **values: Any) -> str:
    """In one pass: a text that is put in may itself have braces."""
    return re.sub("{(" + "|".join(values) + ")}", lambda match: str(values[match[1]]), template)


def _sequences(row: Sample) -> list[Sample]:
    return [row, *(row.beside or {}).values()]


def _aided_prompt(row: Sample) -> int:
    """Tokens of the prompt that a privileged teacher reads; of that sequence nothing else is used."""
    return 0 if row.aided is None else next((i for i, scored in enumerate(row.aided.scored) if scored), len(row.aided.tokens))


def _cut(row: Sample, length: int) -> Sample:
    others = None if row.beside is None else {name: _cut(sequence, length) for name, sequence in row.beside.items()}
    known = None if row.stretches is None else row.stretches[:length]
    return row._replace(tokens=row.tokens[:length], scored=row.scored[:length], beside=others, stretches=known)


def _turn(turn: Any) -> Any:
    """A turn as {role, content}, also of one that is written {from, value}, as in the sets called after ShareGPT."""
    if not isinstance(turn, Mapping) or turn.get("role") or not turn.get("from"):
        return turn
    return {**turn, "role": SPEAKERS.get(turn["from"], turn["from"]), "content": turn.get("value")}


def _talks(table: Table, column: str) -> list[Any]:
    """The conversations of a column. Raises `Refused` for rows that are none, and for those in which the assistant says nothing."""
    talks = [[_turn(turn) for turn in row or []] for row in table.rows[column]]
    says = lambda turn: bool(turn.get("tool_calls") or str(turn.get("content") or "").strip())  # noqa: E731
    whole = lambda turn: turn.get("role") and (turn.get("content") is not None or turn.get("tool_calls"))  # noqa: E731
    formless = [i for i, row in enumerate(talks) if not all(map(whole, row))]
    silent = [i for i, row in enumerate(talks) if not any(turn.get("role") == "assistant" and says(turn) for turn in row)]
    for rows, what, remedy in (
        (formless, "conversations of which a turn has no role and content", "turns as {role: user | assistant | system, content: TEXT}"),
        (silent, "conversations with no answer of the assistant", "leave these rows out, or name another column"),
    ):
        if rows:
            raise Refused(Problem(f"{len(rows)} {what}, the first in row {rows[0]}", "dataset.columns.messages", table.where, remedy))
    return talks
