"""Texts in the tokens of a student and of a teacher with a tokenizer of its own: the same answers, and where both cut them alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kdrun.dataset.tokens import MATCHED, STRETCHES
from kdrun.teacher.context import INPUTS, TARGETS
from tests.dataset.tongues import load, write_two
from tests.dataset.words import TEMPLATE, WORDS, pairs, write_jsonl

pytest.importorskip("transformers")


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    return write_two(tmp_path)


def test_the_answer_is_the_same_text_in_both(folders: dict[str, Path]) -> None:
    from transformers import AutoTokenizer

    data = load(folders)
    theirs = AutoTokenizer.from_pretrained(folders["teacher"])
    for batch in data.batches("train", 5):
        for own, other in zip(batch.targets, batch.extra[TARGETS], strict=True):
            answer = data.vocabulary.text(own[own >= 0].tolist())
            assert theirs.decode(other[other >= 0].tolist(), skip_special_tokens=True) == answer
    assert data.translated.classes == len(theirs)


def test_stretches_end_where_both_tokenizers_cut(folders: dict[str, Path]) -> None:
    """Words against bytes: a stretch is a word with the space before it, and the end of text."""
    data = load(folders)
    batch = next(data.batches("train", 11))
    for row in range(len(batch.ids)):
        own, theirs = batch.extra[STRETCHES][row], batch.extra[f"teacher_{STRETCHES}"][row]
        words = int((batch.targets[row] >= 0).sum())
        assert own[own >= 0].tolist() == list(range(words))
        assert sorted(set(theirs[theirs >= 0].tolist())) == list(range(words))
        targets = batch.extra[TARGETS][row]
        for n in range(words - 1):
            text = data.translated.vocabulary.decode(targets[theirs == n].tolist())
            assert text.strip() == data.class_names[int(batch.targets[row][own == n])]


def test_ids_of_one_meaning_are_matched(folders: dict[str, Path]) -> None:
    data = load(folders)
    matched = next(data.batches("train", 2)).extra[MATCHED].tolist()
    names = [(data.class_names[a], data.translated.class_names[b]) for a, b in matched]
    assert ("</s>", "</s>") in names  # the ends of text
    assert ("one", "one") in names
    assert (".", ".") in names
    assert len({a for a, _ in matched}) == len({b for _, b in matched}) == len(matched)


@pytest.mark.parametrize("whose", ["student", "teacher", "both"])
def test_each_reads_by_its_own_template(whose: str, folders: dict[str, Path], tmp_path: Path) -> None:
    for who in ("student", "teacher"):
        if whose in (who, "both"):
            settings = json.loads((folders[who] / "tokenizer_config.json").read_text())
            (folders[who] / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": TEMPLATE}))
    data = load(folders, max_length=160)
    batch = next(data.batches("train", 3))
    prompt = data.translated.vocabulary.decode(batch.extra[INPUTS][0].tolist())
    assert ("<user>" in prompt) == (whose != "student")
    assert ("<user>" in data.vocabulary.decode(batch.inputs[0].tolist())) == (whose != "teacher")
    own, theirs = batch.extra[STRETCHES][0], batch.extra[f"teacher_{STRETCHES}"][0]
    assert set(own.tolist()) == set(theirs.tolist()) != {-1}
    first = data.translated.vocabulary.decode(batch.extra[TARGETS][0][theirs == 0].tolist())
    assert first.strip() == pairs(1)[0]["completion"].split()[0]


def test_conversations_are_paired_turn_by_turn(folders: dict[str, Path], tmp_path: Path) -> None:
    for who in ("student", "teacher"):
        settings = json.loads((folders[who] / "tokenizer_config.json").read_text())
        (folders[who] / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": TEMPLATE}))
    turns = [("user", "what is one"), ("assistant", "one plus two"), ("user", "why"), ("assistant", "three . four")]
    talk = {"messages": [{"role": role, "content": text} for role, text in turns]}
    batch = next(load({**folders, "file": write_jsonl(tmp_path / "talk.jsonl", [talk] * 4)}, max_length=256).batches("train", 1))
    own, theirs = batch.extra[STRETCHES][0], batch.extra[f"teacher_{STRETCHES}"][0]
    assert own[own >= 0].tolist() == list(range(8))  # three words and the end of turn, twice
    assert sorted(set(theirs[theirs >= 0].tolist())) == list(range(8))


def test_plain_text_is_translated_piece_by_piece(folders: dict[str, Path], tmp_path: Path) -> None:
    text = " ".join(WORDS[i % 8] for i in range(17))
    file = write_jsonl(tmp_path / "text.jsonl", [{"text": text}] * 4)
    data = load({**folders, "file": file}, max_length=12)
    pieces = [data.translated.vocabulary.text(row[row >= 0].tolist()) for b in data.batches("train", 9) for row in b.extra[TARGETS]]
    own = [data.vocabulary.text(row[row >= 0].tolist()) for b in data.batches("train", 9) for row in b.targets]
    assert len(pieces) == len(own)
    short = load({**folders, "file": file}, max_length=200)
    whole = next(short.batches("train", 1))
    assert short.translated.vocabulary.text(whole.extra[TARGETS][0][whole.extra[TARGETS][0] >= 0].tolist()) == text
    assert all(text.find(piece.strip()) >= 0 for piece in pieces)
