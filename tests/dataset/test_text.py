"""Texts out of files: what is read, where a prompt ends in tokens, what is learned, and what is refused."""

from __future__ import annotations

import csv
import gzip
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from kdrun.dataset.base import Data
from kdrun.dataset.text import TextData
from kdrun.dataset.tokens import POSITIONS, Ragged, prompts_of
from kdrun.errors import Refused
from tests.dataset.words import BOS, EOS, PAD, SPECIAL, TEMPLATE, WORDS, ids, pairs, write_jsonl, write_tokenizer

pytest.importorskip("transformers")
QA = {"prompt": "what is one plus two", "completion": "three ."}


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    return write_tokenizer(tmp_path / "tokenizer")


@pytest.fixture
def chatting(tmp_path: Path) -> Path:
    return write_tokenizer(tmp_path / "chatting", TEMPLATE)


def load(path: Path, tokenizer: Path, **values: Any) -> Data:
    return TextData(path=str(path), tokenizer=str(tokenizer), **values).load()


def tokens(data: Data, split: str = "train") -> list[tuple[list[int], list[int]]]:
    """(all tokens, those that are learned) of every row of a split that is stored as it was read."""
    part = data.split(split).storage
    assert isinstance(part, Ragged)
    cut = list(zip(part.offsets[:-1].tolist(), part.offsets[1:].tolist(), strict=True))
    return [(part.tokens[a:b].tolist(), part.tokens[a:b][part.scored[a:b]].tolist()) for a, b in cut]


def refusal(path: Path, tokenizer: Path | None, **values: Any) -> tuple[str, str, str]:
    """(what, key, remedy) of the one problem."""
    with pytest.raises(Refused) as raised:
        TextData(path=str(path), tokenizer=None if tokenizer is None else str(tokenizer), **values).load()
    (problem,) = raised.value.problems
    return problem.what, problem.key, problem.remedy


def write_csv(file: Path, rows: list[dict[str, str]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return file


def write_parquet(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file


WRITERS = {"jsonl": write_jsonl, "json": write_jsonl, "csv": write_csv, "parquet": write_parquet}


# -- files and columns ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("name", ["mine", "train", "my-own.data"])
def test_a_single_file_is_read_and_its_end_is_the_test_split(suffix: str, name: str, tmp_path: Path, tokenizer: Path) -> None:
    data = load(WRITERS[suffix](tmp_path / f"{name}.{suffix}", pairs(20)), tokenizer, test_share=0.2)
    assert {split: len(data.split(split)) for split in data.splits} == {"train": 16, "test": 4}
    assert data.split("test").ids.tolist() == [16, 17, 18, 19]
    expected = load(write_jsonl(tmp_path / "again" / "x.jsonl", pairs(20)), tokenizer, test_share=0.2)
    assert tokens(data) == tokens(expected)
    assert tokens(data, "test") == tokens(expected, "test")


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_folder_has_a_file_of_each_split(suffix: str, tmp_path: Path, tokenizer: Path) -> None:
    for split, rows in (("train", pairs(9)), ("test", pairs(3))):
        WRITERS[suffix](tmp_path / "data" / f"{split}.{suffix}", rows)
    data = load(tmp_path / "data", tokenizer)
    assert {split: len(data.split(split)) for split in data.splits} == {"train": 9, "test": 3}
    assert data.split("test").ids.tolist() == [9, 10, 11]


def test_a_folder_without_a_test_split_says_how_to_name_one(tmp_path: Path, tokenizer: Path) -> None:
    for name in ("train", "dev"):
        write_jsonl(tmp_path / "data" / f"{name}.jsonl", pairs())
    what, key, remedy = refusal(tmp_path / "data", tokenizer)
    assert (key, "test" in what, "dataset.splits.test=dev" in remedy) == ("dataset.splits.test", True, True)
    assert len(load(tmp_path / "data", tokenizer, splits={"train": "train", "test": "dev"}).split("test")) == 12


@pytest.mark.parametrize(
    ("before", "after"),
    [("prompt", "completion"), ("question", "answer"), ("instruction", "output"), ("input", "target"), ("source", "response")],
)
def test_columns_are_found_by_their_usual_names(before: str, after: str, tmp_path: Path, tokenizer: Path) -> None:
    rows = [{before: row["prompt"], after: row["completion"], "number": "7"} for row in pairs()]
    found = tokens(load(write_jsonl(tmp_path / "x.jsonl", rows), tokenizer))
    assert found == tokens(load(write_jsonl(tmp_path / "y.jsonl", pairs()), tokenizer))


def test_columns_can_be_named_and_named_ones_must_be_there(tmp_path: Path, tokenizer: Path) -> None:
    rows = [{"q": row["prompt"], "a": row["completion"], "text": "one"} for row in pairs()]
    file = write_jsonl(tmp_path / "x.jsonl", rows)
    named = load(file, tokenizer, columns={"prompt": "q", "completion": "a"})
    assert tokens(named) == tokens(load(write_jsonl(tmp_path / "y.jsonl", pairs()), tokenizer))
    what, key, remedy = refusal(file, tokenizer, columns={"prompt": "query"})
    assert (key, "'query'" in what, "q, a, text" in remedy) == ("dataset.columns.prompt", True, True)
    with pytest.raises(ValueError, match=r"columns\.answer"):
        TextData(columns={"answer": "a"})


def test_a_table_without_text_lists_its_columns(tmp_path: Path, tokenizer: Path) -> None:
    what, key, remedy = refusal(write_jsonl(tmp_path / "x.jsonl", [{"left": "one", "right": "two"}] * 4), tokenizer)
    assert (key, "left, right" in what, "dataset.columns.text" in remedy) == ("dataset.columns", True, True)


# -- prompts and completions ----------------------------------------------------------------------------------------------


def test_a_completion_is_learned_and_its_prompt_is_not(tmp_path: Path, tokenizer: Path) -> None:
    found = tokens(load(write_jsonl(tmp_path / "x.jsonl", [QA] * 4), tokenizer))
    assert found[0] == ([BOS, *ids("what is one plus two three ."), EOS], [*ids("three ."), EOS])
    everything = tokens(load(write_jsonl(tmp_path / "x.jsonl", [QA] * 4), tokenizer, score="all"))
    assert everything[0] == (found[0][0], found[0][0][1:])  # before the first token there is nothing to predict it from


def test_the_boundary_is_in_tokens_however_prompt_and_completion_meet(tmp_path: Path, tokenizer: Path) -> None:
    """Without a separator the two would be one word; the prompt's ids are those of the prompt alone."""
    rows = [{"prompt": "what", "completion": "is"}] * 4
    (row, learned), *_ = tokens(load(write_jsonl(tmp_path / "x.jsonl", rows), tokenizer, separator=""))
    assert (row, learned) == ([BOS, *ids("what is"), EOS], [*ids("is"), EOS])
    data = load(write_jsonl(tmp_path / "x.jsonl", rows), tokenizer, separator=" . ")
    assert tokens(data)[0][0] == [BOS, *ids("what . is"), EOS]
    batch = next(data.batches("train", 2))
    prompts, references = prompts_of(torch.stack([batch.inputs, batch.targets], 1))
    assert prompts[0].tolist() == [BOS, *ids("what .")]
    assert references[0] == [*ids("is"), EOS]


def test_tokenizers_without_a_beginning_or_an_end_put_none(tmp_path: Path) -> None:
    bare = write_tokenizer(tmp_path / "bare", bos_token=None, eos_token=None)
    assert tokens(load(write_jsonl(tmp_path / "x.jsonl", [QA] * 4), bare))[0] == (ids("what is one plus two three ."), ids("three ."))


@pytest.mark.parametrize("nothing", ["", "  ", None])
@pytest.mark.parametrize("chat", [False, True])
def test_empty_completions_are_refused_with_their_row(
    nothing: str | None, chat: bool, tmp_path: Path, tokenizer: Path, chatting: Path
) -> None:
    rows = [QA, QA, {**QA, "completion": nothing}, QA, {**QA, "completion": nothing}]
    what, key, _ = refusal(write_jsonl(tmp_path / "x.jsonl", rows), chatting if chat else tokenizer)
    assert (what, key) == ("2 empty completions, the first in row 2", "dataset.columns.completion")


def test_missing_prompts_are_empty_and_not_a_word(tmp_path: Path, tokenizer: Path) -> None:
    rows = [{"prompt": None, "completion": "three ."}, QA, QA, QA]
    assert tokens(load(write_jsonl(tmp_path / "x.jsonl", rows), tokenizer))[0] == ([BOS, *ids("three ."), EOS], [*ids("three ."), EOS])


# -- length ---------------------------------------------------------------------------------------------------------------


def test_rows_that_are_too_long_are_refused_dropped_or_cut(tmp_path: Path, tokenizer: Path) -> None:
    rows = [QA, {**QA, "completion": "one two three four five six"}] * 4  # 9 and 13 tokens
    file = write_jsonl(tmp_path / "x.jsonl", rows)
    what, key, remedy = refusal(file, tokenizer, max_length=10)
    assert (key, "3 of 7 train rows" in what or "4 of 8 train rows" in what, "dataset.max_length=13" in remedy) == (
        "dataset.max_length",
        True,
        True,
    )
    assert "dataset.too_long=drop" in remedy
    assert {len(row) for row, _ in tokens(load(file, tokenizer, max_length=10, too_long="drop"))} == {9}
    cut = load(file, tokenizer, max_length=10, too_long="cut")
    assert {len(row) for row, _ in tokens(cut)} == {9, 10}
    assert tokens(cut)[1][1] == ids("one two three four")
    assert len(load(file, tokenizer, max_length=13).splits["train"]) == len(cut.split("train"))


def test_rows_of_which_nothing_is_left_to_learn_are_refused(tmp_path: Path, tokenizer: Path) -> None:
    what, key, _ = refusal(write_jsonl(tmp_path / "x.jsonl", [QA] * 4), tokenizer, max_length=5, too_long="cut")
    assert (key, "no train row has a token to learn" in what) == ("dataset.max_length", True)


def test_plain_text_is_cut_into_pieces_and_no_token_is_lost(tmp_path: Path, tokenizer: Path) -> None:
    text = " ".join(WORDS[i % 8] for i in range(17))
    file = write_jsonl(tmp_path / "x.jsonl", [{"text": text}, {"text": " "}, {"text": None}, {"text": "one two"}, {"text": "four five"}])
    data = load(file, tokenizer, max_length=8)
    every = tokens(data) + tokens(data, "test")
    assert all(len(row) <= 8 and row[0] == BOS for row, _ in every)
    assert [token for row, _ in every for token in row[1:]] == [*ids(text), EOS, *ids("one two"), EOS, *ids("four five"), EOS]
    assert all(learned == row[1:] for row, learned in every)


def test_a_last_piece_of_a_single_token_is_left_out(tmp_path: Path) -> None:
    """Without a beginning of text a piece of a single token predicts nothing, and is left out."""
    bare = write_tokenizer(tmp_path / "bare", bos_token=None, eos_token=None)
    rows = [{"text": "one two three four five"}] * 4
    found = tokens(load(write_jsonl(tmp_path / "x.jsonl", rows), bare, max_length=4))
    assert {tuple(row) for row, _ in found} == {tuple(ids("one two three four"))}


# -- packing, splits, fingerprint -----------------------------------------------------------------------------------------


def test_packing_keeps_every_token_and_what_is_learned(tmp_path: Path, tokenizer: Path) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", pairs(20))
    plain, packed = load(file, tokenizer, max_length=24), load(file, tokenizer, max_length=24, pack=True)
    assert len(packed.split("train")) < len(plain.split("train"))
    assert [t for row, _ in tokens(packed) for t in row] == [t for row, _ in tokens(plain) for t in row]
    assert [t for _, learned in tokens(packed) for t in learned] == [t for _, learned in tokens(plain) for t in learned]
    assert max(len(row) for row, _ in tokens(packed)) <= 24
    assert tokens(packed, "test") == tokens(plain, "test")
    batch = next(packed.batches("train", 2))
    begins = batch.extra[POSITIONS][0] == 0
    assert begins.sum() > 1
    assert (batch.inputs[0][begins] == BOS).all()
    assert packed.fingerprint != plain.fingerprint


def test_a_validation_split_and_subsets_keep_their_ids(tmp_path: Path, tokenizer: Path) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", pairs(40))
    data = load(file, tokenizer, validation=0.25, subset=10, subset_test=2)
    assert {split: len(part) for split, part in data.splits.items() if split != "validation"} == {"train": 10, "test": 2}
    every = torch.cat([part.ids for part in data.splits.values()])
    assert len(every.unique()) == len(every)
    whole = dict(zip(range(40), tokens(load(file, tokenizer)) + tokens(load(file, tokenizer), "test"), strict=True))
    for split in data.splits:
        assert tokens(data, split) == [whole[i] for i in data.split(split).ids.tolist()]


def test_one_row_leaves_none_to_test_on(tmp_path: Path, tokenizer: Path) -> None:
    what, key, _ = refusal(write_jsonl(tmp_path / "x.jsonl", [QA]), tokenizer)
    assert (key, "leave none to test on" in what) == ("dataset.path", True)


def test_padding_is_the_tokenizers_and_classes_are_its_tokens(tmp_path: Path, tokenizer: Path) -> None:
    data = load(write_jsonl(tmp_path / "x.jsonl", pairs()), tokenizer)
    batch = next(data.batches("train", 11))
    lengths = [len(row) - 1 for row, _ in tokens(data)]
    for i, n in enumerate(lengths[:11]):
        assert (batch.inputs[i, n:] == PAD).all()
        assert (batch.targets[i, n:] == -1).all()
    assert data.class_names == (*SPECIAL, *WORDS)
    assert data.classes == len(SPECIAL) + len(WORDS)
    assert data.input_shape == (1023,)


def test_the_tokenizer_is_part_of_the_fingerprint(tmp_path: Path, tokenizer: Path) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", pairs())
    same = write_tokenizer(tmp_path / "same")
    more = write_tokenizer(tmp_path / "more", words=(*WORDS, "unheard"))  # a word that no text has: the ids are the same
    prints = [load(file, folder).fingerprint for folder in (tokenizer, same, more)]
    assert tokens(load(file, more)) == tokens(load(file, tokenizer))
    assert prints[0] == prints[1] != prints[2]


# -- tokenizers that cannot be had ----------------------------------------------------------------------------------------


def test_a_tokenizer_must_be_named_and_be_there(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", pairs())
    what, key, remedy = refusal(file, None)
    assert (key, "none is named" in what, "dataset.tokenizer=" in remedy) == ("dataset.tokenizer", True, True)
    (tmp_path / "empty").mkdir()
    what, key, remedy = refusal(file, tmp_path / "empty")
    assert (key, "no tokenizer can be had" in what, "tokenizer.json" in remedy) == ("dataset.tokenizer", True, True)


def test_code_of_a_repository_runs_only_where_it_is_trusted(tmp_path: Path) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["own.Own", null]}, "tokenizer_class": "Own"}')
    (folder / "config.json").write_text('{"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}')
    ran = tmp_path / "ran"
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w')\nclass Own: ...\nclass Config: ...\n")
    what, key, remedy = refusal(write_jsonl(tmp_path / "x.jsonl", pairs()), folder)
    assert (key, "own" in what, "dataset.trust_remote_code=true" in remedy) == ("dataset.tokenizer", True, True)
    assert not ran.exists()


@pytest.mark.parametrize("values", [{"max_length": 1}, {"test_share": 1.0}, {"validation": -0.1}])
def test_values_out_of_range_are_refused_by_name(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(values))}="):
        TextData(**values)


@pytest.mark.realdata
def test_real_questions_are_read(tmp_path: Path) -> None:
    root = Path(os.environ.get("KDRUN_DATA", "/nonexistent"))
    if not (root / "gsm8k").is_dir() or not (root / "stories260k").is_dir():
        pytest.skip("KDRUN_DATA names no folder with gsm8k (openai/grade-school-math) and stories260k")
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_bytes(gzip.decompress((root / "gsm8k" / f"{split}.jsonl.gz").read_bytes()))
    data = TextData(path=str(tmp_path), tokenizer=str(root / "stories260k"), max_length=2048, subset=50, subset_test=10).load()
    batch = next(data.batches("train", 4))
    assert data.vocabulary is not None
    ((prompt, *_), (answer, *_)) = prompts_of(torch.stack([batch.inputs, batch.targets], 1))
    assert "?" in data.vocabulary.decode(prompt.tolist())
    assert "####" in data.vocabulary.decode(answer)
