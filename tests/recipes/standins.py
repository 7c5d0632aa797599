"""Small data in the schema of the real sets, so that every recipe can take two real steps anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from kdrun.dataset.atomic import RELEASED
from tests.conftest import write_parquet
from tests.dataset import pairs, words
from tests.dataset.annotated import write_coco
from tests.dataset.atomics import write_tokenizer, write_triples
from tests.dataset.graphs import PITFALLS_FILES, PLANETOID_CLASSES, write_archive, write_pitfalls

# Networks of timm's own tests: the real stems and heads of a timm model in half a million parameters.
TINY_MODEL = "test_resnet.r160_in1k"
CPU = ["hardware=cpu", "hardware.threads=1"]


def write_imagenet(folder: Path) -> Path:
    """One training picture of each of the 1000 classes, in the schema of ILSVRC/imagenet-1k."""
    return write_parquet(folder, "image", {"label": 1000}, 8, {"train": 1000, "validation": 8})


def write_labelled(folder: Path) -> dict[str, Path]:
    """Pictures of ten classes in the sizes of CIFAR-10 and STL-10."""
    rows = {"train": 20, "test": 10}
    schemas = {
        "cifar10": ("img", 32, "RGB"),
        "stl10": ("image", 96, "RGB"),
        "mnist": ("image", 28, "L"),
        "fashion_mnist": ("image", 28, "L"),
    }
    return {name: write_parquet(folder / name, column, {"label": 10}, size, rows, mode) for name, (column, size, mode) in schemas.items()}


def write_graphs(folder: Path) -> dict[str, Path]:
    """The real graphs in small, by data set."""
    found = {name: write_archive(folder, name) for name in PLANETOID_CLASSES}
    return found | {name: write_pitfalls(folder, name) for name in PITFALLS_FILES}


def write_pairs(folder: Path) -> dict[str, Path]:
    """Images with masks or boxes, by data set."""
    found = {"camvid": pairs.write_packed(folder / "camvid"), "cityscapes": pairs.write_cities(folder / "cityscapes")}
    return found | {"coco": write_coco(folder / "coco", classes=80)}


def write_texts(folder: Path) -> dict[str, Path]:
    """Texts and a tokenizer of their words, by data set."""
    write_triples(folder / "atomic10x" / f"{RELEASED}.jsonl")
    write_tokenizer(folder / "atomic10x" / "tokenizer")
    return {"atomic10x": folder / "atomic10x"}


def write_models(folder: Path) -> dict[str, Path]:
    """Questions, conversations and tiny models of one tokenizer, by data set."""
    asked = [{"problem": row["prompt"], "solution": row["completion"]} for row in words.pairs(12)]
    talks = [
        {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]}
        for row in words.pairs(12)
    ]
    for name in ("text", "openthoughts_math", "ultrachat_200k"):
        words.write_model(folder / name / "teacher", seed=1, hidden_size=24)
        words.write_model(folder / name / "student")
        words.write_tokenizer(folder / name / "tokenizer", words.TEMPLATE)
    words.write_jsonl(folder / "text" / "mine.jsonl", words.pairs(24))
    words.write_jsonl(folder / "openthoughts_math" / "mine.jsonl", asked)
    for split in ("train_sft", "test_sft"):
        words.write_jsonl(folder / "ultrachat_200k" / "rows" / f"{split}.jsonl", talks)
    return {name: folder / name for name in ("text", "openthoughts_math", "ultrachat_200k")} | write_answers(folder)


def write_answers(folder: Path) -> dict[str, Path]:
    """Instructions, answers for two tokenizers and preference pairs, by data set."""
    for name in ("dolly", "ultrafeedback_binarized", "squad_answered"):
        words.write_tokenizer(folder / name / "tokenizer", words.TEMPLATE if name == "ultrafeedback_binarized" else None)
    words.write_bytes_tokenizer(folder / "squad_answered" / "other", ["o n", "on e"])
    words.write_jsonl(folder / "squad_answered" / "mine.jsonl", words.pairs(24))
    told = [{"prompt": row["prompt"], "output": row["completion"]} for row in words.pairs(24)]
    turns = lambda row, answer: [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": answer}]  # noqa: E731
    compared = [
        {"prompt": row["prompt"], "chosen": turns(row, row["completion"]), "rejected": turns(row, "one one")} for row in words.pairs(12)
    ]
    for split in ("train", "validation"):
        words.write_jsonl(folder / "dolly" / "rows" / f"{split}.jsonl", told)
    for split in ("train_prefs", "test_prefs"):
        words.write_jsonl(folder / "ultrafeedback_binarized" / "rows" / f"{split}.jsonl", compared)
    return {name: folder / name for name in ("dolly", "ultrafeedback_binarized", "squad_answered")}


def stand_in_for_answers(dataset: str, folder: Path) -> list[str]:
    """As `stand_in_for_texts`, for the sets of the baselines. Keys of a teacher that a recipe does not have are left alone (++)."""
    gpt2 = {"n_embd": 16, "n_layer": 2, "n_head": 2}
    llama = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    neox = {key: value for key, value in llama.items() if key != "num_key_value_heads"}
    shapes = {"dolly": (gpt2, gpt2), "ultrafeedback_binarized": (llama, {}), "squad_answered": (neox, llama)}[dataset]
    small = [*CPU, "hardware.wrap=ddp", "hardware.dtype=fp32", "dataset.max_length=64", "source.batch_size=4", "student.name=null"]
    rows = {"vocab_size": 320 if dataset == "squad_answered" else 32}
    small += [
        f"{who}.config.{key}={value}"
        for who, sizes in zip(("student", "teacher"), shapes, strict=True)
        if sizes
        for key, value in {**sizes, **rows}.items()
    ]
    if dataset == "squad_answered":
        tokenizers = [f"dataset.tokenizer={folder}/tokenizer", f"dataset.teacher_tokenizer={folder}/other"]
        return [*small, *tokenizers, f"dataset.path={folder}/mine.jsonl", "teacher.name=null", "teacher.dtype=fp32"]
    small += [f"dataset.tokenizer={folder}/tokenizer", "dataset.hub=null", f"dataset.path={folder}/rows"]
    if dataset == "ultrafeedback_binarized":
        return [*small, "++teacher.dtype=fp32", "++teacher.name=null"]
    few = ["source.max_new_tokens=4", "evaluation.max_new_tokens=4", "evaluation.samples=2", "evaluation.stemmer=false"]
    return [*small, *few, "teacher.name=null", "teacher.dtype=fp32"]


def stand_in_for_texts(dataset: str, folder: Path) -> list[str]:
    """Tiny models for the published ones: the recipe's own kind in small, or folders where the recipe has no shape."""
    small = [*CPU, "dataset.max_length=48", "source.batch_size=4"]
    if dataset == "text":
        return [*small, f"dataset.path={folder}/mine.jsonl", f"teacher.name={folder}/teacher", f"student.name={folder}/student"]
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    fresh = [f"{who}.config.{key}={value}" for who in ("student", "teacher") for key, value in {**sizes, "vocab_size": 32}.items()]
    fresh += [
        "student.name=null",
        "teacher.name=null",
        f"dataset.tokenizer={folder}/tokenizer",
        "teacher.dtype=fp32",
        "hardware.dtype=fp32",
    ]
    if dataset == "ultrachat_200k":
        return [*small, *fresh, "dataset.hub=null", f"dataset.path={folder}/rows", "dataset.subset_test=null"]
    few = ["source.max_new_tokens=4", "evaluation.max_new_tokens=4", "evaluation.samples=2", "dataset.reward=number"]
    shared = [word for word in fresh if not word.startswith("teacher.config")]  # the teacher's is the student's
    return [*small, *shared, "student.config.head_dim=8", *few, f"dataset.path={folder}/mine.jsonl"]


def fewer_queries(tree: Mapping[str, Any]) -> list[str]:
    """Rounds of queries and validation rows beside the batches that a stand-in can give."""
    held_out = ["source.held_out=4"] if tree["source"].get("held_out") else []
    return held_out + (["plan.labelled=20", "plan.budget=4"] if tree["plan"].get("labelled") else [])


def stand_in(dataset: str, folders: dict[str, Path], plan: str = "single") -> list[str]:
    """The overrides that put the stand-in of a data set under a recipe; `folders` by data set."""
    if plan == "federated" and dataset in folders:
        return [*CPU, f"dataset.path={folders[dataset]}", "dataset.subset=null", "dataset.subset_test=10", "plan.extractor=null"]
    if dataset in ("digits", "gaussians", "regions", "stripes", "glyphs", "noise", "bimodal", "topics", "sums"):
        return CPU
    if dataset == "events":
        return [*CPU, "dataset.verbs=12", "dataset.objects=12", "dataset.web_events=100", "dataset.human_events=20", "evaluation.samples=2"]
    if dataset == "atomic10x":
        model = "{model_type: gpt2, n_embd: 8, n_head: 2, n_layer: 1, n_positions: 64}"
        files = [f"dataset.path={folders[dataset] / RELEASED}.jsonl", f"dataset.tokenizer={folders[dataset] / 'tokenizer'}"]
        return [*CPU, *files, "student.name=null", f"student.config={model}", "source.batch_size=4"]
    if dataset in ("text", "openthoughts_math", "ultrachat_200k"):
        return stand_in_for_texts(dataset, folders[dataset])
    if dataset in ("dolly", "ultrafeedback_binarized", "squad_answered"):
        return stand_in_for_answers(dataset, folders[dataset])
    if dataset == "tinystories":
        folder = folders["text"]
        files = [f"dataset.path={folder}/mine.jsonl", f"teacher.name={folder}/teacher", "student.config.vocab_size=32"]
        return [*CPU, *files, "source.batch_size=4", "cache.k=8"]
    if dataset == "camvid":
        return [*CPU, f"dataset.path={folders[dataset]}", "dataset.subset=6"]
    if dataset == "cityscapes":
        small = [f"{who}.{key}" for who in ("teacher", "student") for key in (f"name={TINY_MODEL}", "width=8", "pretrained_backbone=false")]
        shape = [f"dataset.path={folders[dataset]}", "dataset.input_shape=[3,32,64]", "dataset.workers=0", "source.batch_size=2"]
        return [*CPU, *small, *shape, "teacher.claim=null"]
    if dataset == "coco":
        small = [f"{who}.{key}" for who in ("teacher", "student") for key in ("name=plain", "width=8", "pretrained_backbone=false")]
        shape = [f"dataset.path={folders[dataset]}", "dataset.input_shape=[3,64,96]", "dataset.workers=0", "source.batch_size=2"]
        return [*CPU, *small, *shape]
    if dataset == "cifar100":
        return [*CPU, f"dataset.path={folders[dataset]}", "source.batch_size=8", "dataset.subset_test=10"]
    if dataset == "imagenet":
        # ++: some recipes have no teacher, and so not these keys.
        models = [f"++teacher.name={TINY_MODEL}", f"student.name={TINY_MODEL}", "++teacher.pretrained=false", "++teacher.claim=null"]
        return [*CPU, *models, f"dataset.path={folders[dataset]}", "source.batch_size=4", "dataset.subset_test=8", "dataset.workers=0"]
    if dataset == "nsl_kdd":
        return [*CPU, f"dataset.path={folders[dataset]}", "dataset.subset=40"]
    if dataset == "csbm":
        return CPU
    if dataset in (*PLANETOID_CLASSES, *PITFALLS_FILES):
        return [*CPU, "teacher.hidden=[8]", "student.hidden=[8]", f"dataset.path={folders[dataset]}"]
    if dataset == "modes":
        return [*CPU, "dataset.n_train=512", "dataset.n_test=64", "evaluation.calls=2"]
    if dataset in ("cifar10", "stl10"):
        pytest.importorskip("diffusers")
        sizes = ("size=16", "attention_at=8", "channels=32", "multipliers=[1,1]", "blocks=1")
        nets = [f"{who}.{key}" for who in ("teacher", "student") for key in sizes]
        shape = ["dataset.input_shape=[3,16,16]", "++dataset.resize=16", f"dataset.path={folders[dataset]}"]
        few = ["source.batch_size=4", "teacher.fit.source.batch_size=4", "evaluation.samples=1", "evaluation.calls=1"]
        return [*CPU, *nets, *few, *shape, "evaluation.fid=false", "evaluation.primary=calls"]
    raise NotImplementedError(f"write a stand-in for the data set '{dataset}', so that its recipes are tested")
