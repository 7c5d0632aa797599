"""Texts out of files: conversations by a chat template, and the prompts of a privileged reader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kdrun.dataset.tokens import Ragged, TokenSplit, prompts_of
from tests.dataset.test_text import QA, chatting, load, refusal, tokenizer, tokens, write_parquet
from tests.dataset.words import BOS, REWRITING, ids, write_jsonl, write_tokenizer

pytest.importorskip("transformers")
__all__ = ["chatting", "tokenizer"]  # fixtures

TALK = [
    {"role": "system", "content": "two"},
    {"role": "user", "content": "what is one"},
    {"role": "assistant", "content": "two ."},
    {"role": "user", "content": "why"},
    {"role": "assistant", "content": "Because"},
]
TOLD = "<system> two <end> <user> what is one <end> <assistant> two . <end> <user> why <end> <assistant> Because <end>"


def test_only_what_the_assistant_says_is_learned_over_several_turns(tmp_path: Path, chatting: Path) -> None:
    for column in ("messages", "conversations"):
        found = tokens(load(write_jsonl(tmp_path / f"{column}.jsonl", [{column: TALK}] * 4), chatting))
        assert found[0] == (ids(TOLD), ids("two . <end> Because <end>"))
    assert tokens(load(write_parquet(tmp_path / "x.parquet", [{"messages": TALK}] * 4), chatting)) == found


def test_turns_after_the_last_answer_are_left_out(tmp_path: Path, chatting: Path) -> None:
    rows = [{"messages": [*TALK, {"role": "user", "content": "one"}]}] * 4
    assert tokens(load(write_jsonl(tmp_path / "x.jsonl", rows), chatting))[0][0] == ids(TOLD)


def test_a_template_is_applied_to_prompts_and_completions_where_there_is_one(tmp_path: Path, chatting: Path, tokenizer: Path) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", [QA] * 4)
    expected = (ids("<user> what is one plus two <end> <assistant> three . <end>"), ids("three . <end>"))
    assert tokens(load(file, chatting))[0] == tokens(load(file, chatting, template=True))[0] == expected
    assert tokens(load(file, chatting, template=False)) == tokens(load(file, tokenizer))
    what, key, remedy = refusal(file, tokenizer, template=True)
    assert (key, "no chat template" in what, "dataset.template=false" in remedy) == ("dataset.template", True, True)


def test_prompts_of_conversations_end_where_the_assistant_is_asked(tmp_path: Path, chatting: Path) -> None:
    """What a rollout continues is what the template puts there for generation."""
    data = load(write_jsonl(tmp_path / "x.jsonl", [QA] * 4), chatting)
    batch = next(data.batches("test", 1))
    assert data.vocabulary is not None
    ((prompt,), _) = prompts_of(torch.stack([batch.inputs, batch.targets], 1))
    own = data.vocabulary.tokenizer.apply_chat_template(  # type: ignore[attr-defined]
        [{"role": "user", "content": QA["prompt"]}], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert prompt.tolist() == own


def test_conversations_without_a_template_are_refused(tmp_path: Path, tokenizer: Path) -> None:
    what, key, remedy = refusal(write_jsonl(tmp_path / "x.jsonl", [{"messages": TALK}] * 4), tokenizer)
    assert (key, "chat template" in what, "prompt and completion" in remedy) == ("dataset.tokenizer", True, True)


def test_a_template_that_rewrites_earlier_turns_is_refused_for_several_and_used_for_one(tmp_path: Path) -> None:
    rewriting = write_tokenizer(tmp_path / "rewriting", REWRITING)
    what, key, remedy = refusal(write_jsonl(tmp_path / "x.jsonl", [{"messages": TALK}] * 4), rewriting)
    assert (key, "otherwise when others follow" in what, "one assistant turn" in remedy) == ("dataset.template", True, True)
    one = [{"messages": TALK[1:3]}] * 4
    found = tokens(load(write_jsonl(tmp_path / "y.jsonl", one), rewriting))[0]
    assert found == (ids("<user> what is one <end> <assistant> two . <end>"), ids("two . <end>"))


def test_turns_of_from_and_value_are_turns_of_role_and_content(tmp_path: Path, chatting: Path) -> None:
    """As in the sets that are called after ShareGPT."""
    usual = [{"role": "user", "content": "what is one"}, {"role": "assistant", "content": "two"}]
    theirs = [{"from": "human", "value": "what is one"}, {"from": "gpt", "value": "two"}]
    files = [write_jsonl(tmp_path / f"{i}.jsonl", [{"conversations": turns}] * 4) for i, turns in enumerate((usual, theirs))]
    assert tokens(load(files[0], chatting)) == tokens(load(files[1], chatting))


@pytest.mark.parametrize(
    ("turns", "told"),
    [
        ([{"speaker": "human", "text": "why"}, {"speaker": "gpt", "text": "Because"}], "role and content"),
        ([{"role": "user"}, {"role": "assistant", "content": "two"}], "role and content"),
        ([{"role": "user", "content": "why"}], "no answer"),
        ([], "no answer"),
        ([{"role": "user", "content": "why"}, {"role": "assistant", "content": " "}], "no answer"),
    ],
)
def test_conversations_that_are_none_are_refused_with_their_row(
    turns: list[dict[str, str]], told: str, tmp_path: Path, chatting: Path
) -> None:
    what, key, _ = refusal(write_jsonl(tmp_path / "x.jsonl", [{"messages": TALK[1:3]}] * 2 + [{"messages": turns}] * 2), chatting)
    assert told in what
    assert "row 2" in what
    assert key == "dataset.columns.messages"


# -- privileged prompts ---------------------------------------------------------------------------------------------------


def test_a_privileged_prompt_is_made_of_prompt_and_completion_and_ends_in_the_same_answer(
    tmp_path: Path, tokenizer: Path, chatting: Path
) -> None:
    file, words = write_jsonl(tmp_path / "x.jsonl", [QA] * 4), "{prompt} Because {completion} why"
    told = {tokenizer: [BOS, *ids("what is one plus two Because three . why")]}
    told[chatting] = ids("<user> what is one plus two Because three . why <end> <assistant>")
    for folder, expected in told.items():
        data = load(file, folder, privileged=words)
        part, plain = data.split("train"), load(file, folder)
        assert isinstance(part, TokenSplit)
        assert part.privileged is not None
        every = torch.arange(len(part))
        (prompt, *_), (answer, *_) = prompts_of(part.privileged.fetch(part.request(every, every, 0, False), torch.device("cpu")))
        own = prompts_of(part.storage.fetch(part.request(every, every, 0, False), torch.device("cpu")))
        assert (prompt.tolist(), answer) == (expected, own[1][0])
        assert tokens(data) == tokens(plain)
        assert data.fingerprint != plain.fingerprint


@pytest.mark.parametrize(
    "row", [{"messages": [{"role": "user", "content": "why"}, {"role": "assistant", "content": "two"}]}, {"text": "one two"}]
)
def test_privileged_prompts_of_other_rows_are_refused(row: dict[str, Any], tmp_path: Path, chatting: Path) -> None:
    what, key, remedy = refusal(write_jsonl(tmp_path / "x.jsonl", [row] * 4), chatting, privileged="{prompt} {completion}")
    assert (key, "dataset.privileged=null" in remedy) == ("dataset.privileged", True), what


@pytest.mark.parametrize(("too_long", "kept"), [("drop", 4), ("cut", 4)])
def test_a_privileged_prompt_is_no_longer_than_a_row_may_be(too_long: str, kept: int, tmp_path: Path, tokenizer: Path) -> None:
    """The reference of 6 tokens makes a prompt of 15, though the row itself has 13; the short one's are 10 and 8."""
    long = {"prompt": "what is one plus two", "completion": "one two three four five six"}
    file, words = write_jsonl(tmp_path / "x.jsonl", [*[QA] * 5, long]), "{prompt} Because {completion} why plus"
    what, key, remedy = refusal(file, tokenizer, privileged=words, max_length=14)
    assert (key, "dataset.max_length=" in remedy) == ("dataset.max_length", True), what
    data = load(file, tokenizer, privileged=words, max_length=14, too_long=too_long)
    assert sum(len(split) for split in data.splits.values()) == 5
    part = data.split("train")
    assert isinstance(part, TokenSplit)
    assert isinstance(part.privileged, Ragged)
    assert part.privileged.longest_prompt() <= 14
    assert len(load(file, tokenizer, max_length=14).split("train")) == len(part) + 1
