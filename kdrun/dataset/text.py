"""Texts out of files, as token sequences: plain text, prompts with completions, conversations; jsonl, parquet, csv or the hub.

One tokenizer serves teacher and student, and with a chat template both read the very same ids. What is learned is the completion (of a
conversation: what the assistant says), or everything where `score` says so. Whole texts are cut into pieces, conversations never are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from kdrun.dataset.base import Data, Storage
from kdrun.dataset.files import Files, Format, Table
from kdrun.dataset.rewards import reward_named
from kdrun.dataset.select import select
from kdrun.dataset.tokens import Ragged, RandomTokens, Sample, TokenSplit, packed
from kdrun.dataset.vocabulary import Tokenized
from kdrun.errors import Problem, Refused

USUAL: Mapping[str, tuple[str, ...]] = {  # by what a row is: the columns that say so, by the names that are used for them
    "messages": ("messages", "conversations"),
    "completion": ("completion", "response", "answer", "output", "target"),
    "prompt": ("prompt", "question", "instruction", "input", "source"),
    "text": ("text", "content"),
}
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
    trust_remote_code: bool = False
    template: bool | Literal["auto"] = "auto"
    score: Literal["completion", "all"] = "completion"
    separator: str = "\n"
    max_length: int = 1024
    too_long: Long = "refuse"
    pack: bool = False
    privileged: str | None = None
    reward: str | None = None
    test_share: float = 0.1
    validation: float = 0.0
    subset: int | None = None
    subset_test: int | None = None
    sizes: dict[str, int] | None = None
    input_shape: list[int] | None = None
    classes: int | None = None

    def __post_init__(self) -> None:
        if self.privileged is not None and (self.pack or "{completion}" not in self.privileged):
            raise ValueError(f"privileged={self.privileged!r}: a text with {{prompt}} and {{completion}}, of rows that are not packed")
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
        vocabulary = Tokenized(self._tokenizer())
        tables = self._open()
        made = {name: self._rows(table, vocabulary, name) for name, table in tables.items()}
        if "test" not in made:
            made["train"], made["test"] = self._carved(made["train"])
        targets = {name: torch.zeros(len(rows), dtype=torch.int64) for name, rows in made.items()}
        chosen = select(targets, self.validation, self.subset, self.subset_test)
        splits = {}
        for name, part in chosen.items():
            rows = [made[part.table][i] for i in part.rows.tolist()]
            packs = list(packed(rows, self.max_length)) if self.pack and name == "train" else [[row] for row in rows]
            ids = part.ids[: len(packs)]  # a packed row has the id of the first of as many texts
            aided = None if self.privileged is None else Ragged.of([[_aided(row)] for row in rows], vocabulary.pad)
            splits[name] = TokenSplit.of(Ragged.of(packs, vocabulary.pad), ids, aided)
        # Padded rows of a matrix are no tokens, so the classes are the tokenizer's own.
        names = tuple(vocabulary.tokenizer.convert_ids_to_tokens(list(range(vocabulary.size))))
        total = sum(map(len, made.values()))
        reward = None if judge is None else lambda right, written: judge(vocabulary.text(right), vocabulary.text(written))
        return Data(self.name, names, (self.max_length - 1,), (), (), splits, total, vocabulary=vocabulary, reward=reward)

    # -- files and tokenizer ------------------------------------------------------------------------------------------

    def _open(self) -> dict[str, Table]:
        single = self.path is not None and Path(self.path).expanduser().is_file()
        splits = {"train": Path(str(self.path)).name.split(".")[0]} if single else dict(self.splits)
        files = Files(self.path, self.hub, self.revision, self.format, splits, tuple(self.columns.values()))
        return files.open()

    def _tokenizer(self) -> Any:
        if self.tokenizer is None:
            remedy = "dataset.tokenizer=<hub name or folder of the model>"
            raise Refused(Problem("text needs a tokenizer, and none is named", "dataset.tokenizer", "", remedy))
        try:
            from transformers import AutoTokenizer
        except ModuleNotFoundError as error:
            raise Refused(
                Problem("text needs the package transformers, which is not installed", "dataset", "", 'pip install "kdrun[text]"')
            ) from error
        try:
            return AutoTokenizer.from_pretrained(self.tokenizer, trust_remote_code=self.trust_remote_code)
        except (OSError, ValueError) as error:
            trust = "trust_remote_code" in str(error)
            remedy = "dataset.trust_remote_code=true, if you trust its code" if trust else "a hub name or a folder with tokenizer.json"
            what = f"no tokenizer can be had from {self.tokenizer} ({str(error).strip().splitlines()[0]})"
            raise Refused(Problem(what, "dataset.tokenizer", "", remedy)) from error

    def _column(self, table: Table, what: str) -> str | None:
        """The column of that meaning, None where there is none. Raises `Refused` for one that was named and is not there."""
        named = self.columns.get(what)
        if named is not None and named not in table.columns:
            remedy = f"dataset.columns.{what}=COLUMN; there are {', '.join(table.columns)}"
            raise Refused(Problem(f"no column '{named}'", f"dataset.columns.{what}", table.where, remedy))
        return named or next((name for name in USUAL[what] if name in table.columns), None)

    # -- rows ---------------------------------------------------------------------------------------------------------

    def _rows(self, table: Table, vocabulary: Tokenized, split: str) -> list[Sample]:
        messages, prompt, completion, text = (self._column(table, what) for what in ("messages", "prompt", "completion", "text"))
        if self.privileged is not None and (messages is not None or prompt is None or completion is None):
            remedy = "dataset.columns.prompt=COLUMN dataset.columns.completion=COLUMN, or dataset.privileged=null"
            raise Refused(Problem("privileged prompts are made of prompts and completions", "dataset.privileged", table.where, remedy))
        if messages is not None:
            talks = _talks(table, messages)
            made = [_conversation(turns, vocabulary.tokenizer, table.where) for turns in talks]
        elif prompt is not None and completion is not None:
            made = self._pairs(table, prompt, completion, vocabulary)
        elif text is not None:
            return self._pieces(table.rows[text], vocabulary)
        else:
            remedy = "dataset.columns.prompt=COLUMN dataset.columns.completion=COLUMN, or dataset.columns.text=COLUMN"
            raise Refused(Problem(f"no text among the columns {', '.join(table.columns)}", "dataset.columns", table.where, remedy))
        if self.score == "all":
            made = [row._replace(scored=[True] * len(row.tokens)) for row in made]
        return self._fitting(made, table.where, split)

    def _pairs(self, table: Table, prompt: str, completion: str, vocabulary: Tokenized) -> list[Sample]:
        tokenizer, pairs = vocabulary.tokenizer, [(a or "", b) for a, b in zip(table.rows[prompt], table.rows[completion], strict=True)]
        empty = [i for i, (_, after) in enumerate(pairs) if after is None or not str(after).strip()]
        if empty:
            what = f"{len(empty)} empty completions, the first in row {empty[0]}"
            raise Refused(Problem(what, f"dataset.columns.{completion}", table.where, "leave these rows out, or name another column"))
        has = getattr(tokenizer, "chat_template", None) is not None
        if self.template is True and not has:
            what = f"the tokenizer {self.tokenizer} has no chat template"
            raise Refused(Problem(what, "dataset.template", "", "dataset.template=false, or the tokenizer of the chat model"))
        chats = has and self.template is not False
        pair = partial(_turn, tokenizer, table.where) if chats else partial(_continued, vocabulary, self.separator)
        rows = [pair(str(before), str(after)) for before, after in pairs]
        if self.privileged is None:
            return rows
        told = [self.privileged.replace("{prompt}", str(before)).replace("{completion}", str(after)) for before, after in pairs]
        return [row._replace(aided=pair(text, str(after))) for row, text, (_, after) in zip(rows, told, pairs, strict=True)]

    def _pieces(self, texts: Any, vocabulary: Tokenized) -> list[Sample]:
        """Whole texts, an end of text after each, in pieces of at most `max_length` tokens, all of them scored."""
        begin, end = _begun(vocabulary.tokenizer), [] if vocabulary.eos is None else [vocabulary.eos]
        rows = []
        for text in texts:
            if text is None or not str(text).strip():
                continue  # blank lines of files with one paragraph a line
            ids = vocabulary.encode(str(text)) + end
            room = self.max_length - len(begin)
            rows += [Sample(begin + ids[i : i + room], [True] * len(begin + ids[i : i + room])) for i in range(0, len(ids), room)]
        return [row for row in rows if len(row.tokens) > 1]

    def _fitting(self, rows: list[Sample], where: str, split: str) -> list[Sample]:
        long = [i for i, row in enumerate(rows) if len(row.tokens) > self.max_length]
        if long and self.too_long == "refuse":
            largest = max(len(row.tokens) for row in rows)
            what = f"{len(long)} of {len(rows)} {split} rows have more than {self.max_length} tokens, the longest {largest}"
            remedy = f"dataset.max_length={largest} if the models' context allows it, or dataset.too_long=drop, or =cut"
            raise Refused(Problem(what, "dataset.max_length", where, remedy))
        if self.too_long == "drop":
            rows = [row for row in rows if len(row.tokens) <= self.max_length]
        rows = [row._replace(tokens=row.tokens[: self.max_length], scored=row.scored[: self.max_length]) for row in rows]
        kept = [row for row in rows if any(row.scored[1:])]
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


def _begun(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before every text."""
    return [tokenizer.bos_token_id] if getattr(tokenizer, "bos_token_id", None) is not None else []


def _turn(tokenizer: Any, where: str, prompt: str, completion: str) -> Sample:
    return _conversation([{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}], tokenizer, where)


def _continued(vocabulary: Tokenized, separator: str, prompt: str, completion: str) -> Sample:
    """Tokenised apart, so that where the prompt ends is where its ids end."""
    end = [] if vocabulary.eos is None else [vocabulary.eos]
    first, then = _begun(vocabulary.tokenizer) + vocabulary.encode(f"{prompt}{separator}"), vocabulary.encode(completion) + end
    return Sample(first + then, [False] * len(first) + [True] * len(then))


def _aided(row: Sample) -> Sample:
    assert row.aided is not None  # made beside every pair
    return row.aided


def _talks(table: Table, column: str) -> list[Any]:
    """The conversations of a column. Raises `Refused` for rows that are none, and for those in which the assistant says nothing."""
    talks = [row or [] for row in table.rows[column]]
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


def _conversation(turns: Any, tokenizer: Any, where: str) -> Sample:
    """A conversation by the tokenizer's template; scored is what the assistant says, its end of turn included.

    Raises `Refused` without a template, and for one that writes earlier turns otherwise once later ones follow.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        remedy = "the tokenizer of a chat model, or columns prompt and completion instead of messages"
        raise Refused(Problem("conversations need a chat template, and the tokenizer has none", "dataset.tokenizer", where, remedy))
    ids = lambda part, ask: list(tokenizer.apply_chat_template(part, add_generation_prompt=ask, tokenize=True, return_dict=False))  # noqa: E731
    tokens: list[int] = []
    scored: list[bool] = []
    for i, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        before, after = ids(turns[:i], True), ids(turns[: i + 1], False)
        if before[: len(tokens)] != tokens or after[: len(before)] != before:
            what = "its chat template writes a turn otherwise when others follow, so the assistant's tokens cannot be told apart"
            raise Refused(Problem(what, "dataset.template", where, "one assistant turn a row, or dataset.template=false"))
        scored += [False] * (len(before) - len(tokens)) + [True] * (len(after) - len(before))
        tokens = after
    return Sample(tokens, scored)
