"""ATOMIC-10x: its format, its splits by head, the critic's choice of training rows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from kdrun.config.compose import compose
from kdrun.dataset.atomic import AtomicData
from kdrun.dataset.base import Data
from kdrun.dataset.tokens import prompts_of
from kdrun.errors import Refused
from kdrun.evaluation.threshold import keeps
from tests.conftest import run_cli
from tests.dataset.atomics import HEADS, RELATIONS, TAILS, rows, write_tokenizer, write_triples


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("atomic")
    write_triples(folder / "mATOMIC10X.jsonl")
    write_tokenizer(folder / "tokenizer")
    return folder


def load(place: Path, **more: object) -> Data:
    return AtomicData(path=str(place / "mATOMIC10X.jsonl"), tokenizer=str(place / "tokenizer"), **more).load()  # type: ignore[arg-type]


def texts(data: Data, split: str = "train") -> list[tuple[str, str]]:
    batch = next(data.batches(split, 10**4))
    prompts, completions = prompts_of(torch.stack([batch.inputs, batch.targets], 1))
    assert data.vocabulary is not None
    return [(data.vocabulary.decode(p.tolist()), data.vocabulary.decode(c)) for p, c in zip(prompts, completions, strict=True)]


def test_a_row_is_written_as_the_authors_write_it_and_its_tail_and_end_are_learned(place: Path) -> None:
    told = texts(load(place))
    assert told[0] == ("<head> PersonX gives PersonY 0 coins </head> <relation> xWant </relation> [GEN]", "to rest <end>")
    assert len(told) == 8 * len(RELATIONS) * len(TAILS)


def test_everything_can_be_learned(place: Path) -> None:
    whole = "PersonX gives PersonY 0 coins </head> <relation> xWant </relation> [GEN] to rest <end>"
    assert texts(load(place, score="all"))[0] == ("<head>", whole)


def test_the_critic_chooses_training_rows_alone(place: Path) -> None:
    sizes = {recall: {n: len(s) for n, s in load(place, recall=recall).splits.items()} for recall in (None, 0.9, 0.8, 0.5)}
    assert [sizes[recall]["train"] for recall in (None, 0.9, 0.8, 0.5)] == [96, 96, 72, 48]
    assert {(found["validation"], found["test"]) for found in sizes.values()} == {(24, 36)}
    # The flags are those of a threshold on the scores.
    of_train = [row for row in rows() if row["split"] == "train"]
    kept = keeps("released", torch.tensor([row["p_valid_model"] for row in of_train]), 0.25)
    assert kept.tolist() == [row["rec_0.8"] for row in of_train]


def test_no_head_is_in_two_splits(place: Path, tmp_path: Path) -> None:
    data = load(place)
    heads = {name: {re.findall(r"\d+", prompt)[0] for prompt, _ in texts(data, name)} for name in data.splits}
    assert {name: len(found) for name, found in heads.items()} == {"train": 8, "validation": 2, "test": 3}
    assert sum(map(len, heads.values())) == len(set().union(*heads.values())) == sum(map(len, HEADS.values()))
    spoiled = rows()
    spoiled[0]["split"] = "test"
    write_triples(tmp_path / "mATOMIC10X.jsonl", spoiled)
    write_tokenizer(tmp_path / "tokenizer")
    with pytest.raises(Refused, match=r"PersonX gives PersonY 0 coins' is in the splits test and train"):
        load(tmp_path)


def test_people_can_have_names(place: Path) -> None:
    told = texts(load(place, names=True))
    assert not any("Person" in prompt + tail for prompt, tail in told)
    assert told == texts(load(place, names=True))
    assert len({prompt.split()[1] for prompt, _ in told}) > 10


def test_a_folder_with_the_released_file_will_do(place: Path) -> None:
    folder = AtomicData(path=str(place), format="jsonl", tokenizer=str(place / "tokenizer"))
    assert folder.load().fingerprint == load(place).fingerprint


def test_what_is_missing_is_said(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"recall=1\.5"):
        AtomicData(recall=1.5)
    with pytest.raises(Refused, match=r"no field rec_0\.7"):
        load(place, recall=0.7)
    write_triples(tmp_path / "x.jsonl", [{"head": "a", "tail": "b"}])
    with pytest.raises(Refused, match="no field relation, split"):
        AtomicData(path=str(tmp_path / "x.jsonl"), tokenizer=str(place / "tokenizer")).load()
    write_triples(tmp_path / "y.jsonl", [{**row, "rec_0.5": False} for row in rows()])
    with pytest.raises(Refused, match="no row of the train split is left"):
        AtomicData(path=str(tmp_path / "y.jsonl"), tokenizer=str(place / "tokenizer"), recall=0.5).load()


def test_the_published_setting_is_planned_without_files_or_network() -> None:
    outcome = run_cli("plan", "recipe=symbolic_kd_atomic10x", "hardware=cpu", "--no-probe", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["models"]["student"]["parameters"] == 1557611200  # GPT-2 XL
    assert outcome.json["total_steps"] == 2000000 // 64


@pytest.mark.parametrize("reduction", ["token_mean", "seq_sum"])
def test_the_recipe_offers_both_reductions(reduction: str) -> None:
    tree = compose(["recipe=symbolic_kd_atomic10x", f"objective.reduction={reduction}"]).tree
    assert tree["objective"]["reduction"] == reduction
