"""Pairs of completions, reasoning traces, and files of other kinds."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from kdrun.dataset.tokens import REJECTED, Ragged
from tests.dataset.test_text import QA, chatting, load, refusal, tokenizer, tokens
from tests.dataset.words import BOS, EOS, ids, pairs, write_jsonl

pytest.importorskip("transformers")
__all__ = ["chatting", "tokenizer"]  # fixtures
PAIR = {"prompt": "what is one plus two", "chosen": "three .", "rejected": "four"}
THOUGHT = {**QA, "reasoning": "one two three"}
BARE = "{reasoning} . {completion}"


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def rejected(data: Any, split: str = "train") -> list[tuple[list[int], list[int]]]:
    """(all tokens, those that are learned) of the rejected completions."""
    part = data.split(split).beside[REJECTED]
    assert isinstance(part, Ragged)
    cut = list(zip(part.offsets[:-1].tolist(), part.offsets[1:].tolist(), strict=True))
    return [(part.tokens[a:b].tolist(), part.tokens[a:b][part.scored[a:b]].tolist()) for a, b in cut]


# -- pairs ----------------------------------------------------------------------------------------------------------------


def test_one_row_holds_both_completions(tmp_path: Path, tokenizer: Path) -> None:
    data = load(write_jsonl(tmp_path / "x.jsonl", [PAIR] * 4), tokenizer)
    prompt = [BOS, *ids("what is one plus two")]
    assert tokens(data)[0] == ([*prompt, *ids("three ."), EOS], [*ids("three ."), EOS])
    assert rejected(data)[0] == ([*prompt, *ids("four"), EOS], [*ids("four"), EOS])
    assert data.split("train").ids.tolist() == [0, 1, 2]
    other = load(write_jsonl(tmp_path / "y.jsonl", [{**PAIR, "rejected": "five"}] * 4), tokenizer)
    assert other.fingerprint != data.fingerprint


def test_conversations_are_pairs_of_their_last_turns(tmp_path: Path, chatting: Path) -> None:
    asked = [said("user", "what is one"), said("assistant", "one ."), said("user", "what is two")]
    whole = {"chosen": [*asked, said("assistant", "two .")], "rejected": [*asked, said("assistant", "three")]}
    parted = {"prompt": asked, "chosen": [said("assistant", "two .")], "rejected": [said("assistant", "three")]}
    answers = {"prompt": asked, "chosen": "two .", "rejected": "three"}
    found = [load(write_jsonl(tmp_path / f"{i}.jsonl", [row] * 4), chatting) for i, row in enumerate((whole, parted, answers))]
    assert tokens(found[0]) == tokens(found[1]) == tokens(found[2])
    assert rejected(found[0]) == rejected(found[1]) == rejected(found[2])
    assert tokens(found[0])[0][1] == ids("two . <end>")
    assert rejected(found[0])[0][1] == ids("three <end>")


def test_a_prompt_and_answers_are_a_chat_where_there_is_a_template(tmp_path: Path, chatting: Path) -> None:
    row, learned = rejected(load(write_jsonl(tmp_path / "x.jsonl", [PAIR] * 4), chatting))[0]
    assert (row, learned) == (ids("<user> what is one plus two <end> <assistant> four <end>"), ids("four <end>"))


@pytest.mark.parametrize("column", ["chosen", "rejected"])
def test_empty_completions_of_pairs_are_refused_with_their_row(column: str, tmp_path: Path, tokenizer: Path) -> None:
    rows = [PAIR, {**PAIR, column: " "}, PAIR, {**PAIR, column: None}]
    what, key, _ = refusal(write_jsonl(tmp_path / "x.jsonl", rows), tokenizer)
    assert (what, key) == ("2 empty completions, the first in row 1", f"dataset.columns.{column}")


def test_pairs_without_a_prompt_are_refused(tmp_path: Path, tokenizer: Path) -> None:
    rows = [{"chosen": "three", "rejected": "four"}] * 4
    what, key, remedy = refusal(write_jsonl(tmp_path / "x.jsonl", rows), tokenizer)
    assert ("without a prompt" in what, key, "dataset.columns.prompt" in remedy) == (True, "dataset.columns.chosen", True)


def test_a_pair_is_too_long_where_either_is(tmp_path: Path, tokenizer: Path) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", [PAIR, {**PAIR, "rejected": "one two three four five six"}] * 4)
    what, _, remedy = refusal(file, tokenizer, max_length=10)
    assert ("the longest 13" in what, "dataset.max_length=13" in remedy) == (True, True)
    assert len(load(file, tokenizer, max_length=10, too_long="drop").split("train")) < 6
    assert max(len(row) for row, _ in rejected(load(file, tokenizer, max_length=10, too_long="cut"))) == 10


def test_naming_a_completion_takes_it_alone(tmp_path: Path, tokenizer: Path) -> None:
    data = load(write_jsonl(tmp_path / "x.jsonl", [PAIR] * 4), tokenizer, columns={"completion": "rejected"})
    assert tokens(data)[0][1] == [*ids("four"), EOS]
    assert not data.split("train").beside  # type: ignore[attr-defined]


# -- traces ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["reasoning", "thinking", "trace"])
def test_a_trace_is_learned_before_the_answer(column: str, tmp_path: Path, tokenizer: Path) -> None:
    rows = [{**QA, column: "one two three"}] * 4
    data = load(write_jsonl(tmp_path / "x.jsonl", rows), tokenizer, trace=BARE)
    assert tokens(data)[0][1] == [*ids("one two three . three ."), EOS]
    assert tokens(load(tmp_path / "x.jsonl", tokenizer, trace=None)) == tokens(load(write_jsonl(tmp_path / "y.jsonl", [QA] * 4), tokenizer))


def test_the_usual_trace_is_between_tags_and_rows_without_one_are_their_answers(tmp_path: Path, tokenizer: Path) -> None:
    rows = [THOUGHT, {**THOUGHT, "reasoning": None}, {**THOUGHT, "reasoning": "{completion} {reasoning}"}, THOUGHT]
    data = load(write_jsonl(tmp_path / "x.jsonl", rows), tokenizer)
    unknown = ids("<unk>")
    assert tokens(data)[0][1] == [*unknown, *ids("one two three"), *unknown, *ids("three ."), EOS]
    assert tokens(data)[1][1] == [*ids("three ."), EOS]
    assert tokens(data)[2][1] == [*unknown * 4, *ids("three ."), EOS]  # braces of a text are no places


def test_an_answer_is_needed_beside_its_trace(tmp_path: Path, tokenizer: Path) -> None:
    what, key, _ = refusal(write_jsonl(tmp_path / "x.jsonl", [THOUGHT, {**THOUGHT, "completion": ""}] * 2), tokenizer)
    assert (what, key) == ("2 empty completions, the first in row 1", "dataset.columns.completion")
    with pytest.raises(ValueError, match="trace="):
        load(tmp_path / "x.jsonl", tokenizer, trace="{reasoning}")


# -- files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
@pytest.mark.parametrize("folder", [False, True])
def test_packed_rows_are_read(suffix: str, folder: bool, tmp_path: Path, tokenizer: Path) -> None:
    text = "".join(json.dumps(row) + "\n" for row in pairs(20)).encode()
    (tmp_path / "data").mkdir()
    for name in ("train", "test") if folder else ("mine",):
        (tmp_path / "data" / f"{name}.{suffix}.gz").write_bytes(gzip.compress(text))
    data = load(tmp_path / "data" if folder else tmp_path / "data" / f"mine.{suffix}.gz", tokenizer)
    expected = load(write_jsonl(tmp_path / "plain.jsonl", pairs(20)), tokenizer)
    assert tokens(data)[:18] == tokens(expected)
    assert len(data.split("train")) == (20 if folder else 18)


def test_a_note_beside_the_rows_is_no_text(tmp_path: Path, tokenizer: Path) -> None:
    for split in ("train", "test"):
        write_jsonl(tmp_path / "data" / f"{split}.jsonl", pairs(4))
    (tmp_path / "data" / "train.txt").write_text("a note")
    assert len(load(tmp_path / "data", tokenizer).split("train")) == 4


@pytest.mark.parametrize("suffix", ["txt", "txt.gz"])
def test_a_line_of_plain_text_is_a_row(suffix: str, tmp_path: Path, tokenizer: Path) -> None:
    lines = b"one two three\n\nfour five\nsix seven eight\nplus is\n"
    file = tmp_path / f"mine.{suffix}"
    file.write_bytes(gzip.compress(lines) if suffix.endswith("gz") else lines)
    data = load(file, tokenizer)
    assert [row for row, _ in tokens(data) + tokens(data, "test")] == [
        [BOS, *ids(line), EOS] for line in ("one two three", "four five", "six seven eight", "plus is")
    ]


def test_a_table_with_tabs_is_read(tmp_path: Path, tokenizer: Path) -> None:
    rows = "prompt\tcompletion\n" + "".join(f"{row['prompt']}\t{row['completion']}\n" for row in pairs(4))
    (tmp_path / "x.tsv").write_text(rows)
    with gzip.open(tmp_path / "y.tsv.gz", "wt") as file:
        file.write(rows)
    usual = tokens(load(write_jsonl(tmp_path / "z.jsonl", pairs(4)), tokenizer))
    assert tokens(load(tmp_path / "x.tsv", tokenizer)) == tokens(load(tmp_path / "y.tsv.gz", tokenizer)) == usual


def test_a_file_that_cannot_be_read_says_why(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "nothing.jsonl").write_text("")
    (tmp_path / "torn.jsonl").write_text('{"text": "one"}\n{"text": \n')
    assert "nothing.jsonl is empty" in refusal(tmp_path / "nothing.jsonl", tokenizer)[0]
    what, key, remedy = refusal(tmp_path / "torn.jsonl", tokenizer)
    assert "JSON" in what
    assert (key, "mend the file" in remedy) == ("dataset.path", True)
    assert "torn.jsonl" in refusal(tmp_path / "turn.jsonl", tokenizer)[2]  # the nearest name
