"""From a finished run to a folder for others: the student alone, as weights and as graphs, with its card."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdrun.config.check import instantiate
from kdrun.config.compose import Composed
from kdrun.config.schema import STUDENT_KEYS
from kdrun.config.targets import allowed
from kdrun.dataset.base import Data
from kdrun.engine.build import build_student_network, load_data
from kdrun.engine.records import STUDENT_FILE, SUMMARY, read_json, write_json
from kdrun.errors import CheckFailed, Problem, Refused
from kdrun.export import graphs, loading
from kdrun.export.card import card
from kdrun.export.graphs import Parity
from kdrun.student.adapters import plain_state
from kdrun.student.build import call_of
from kdrun.student.weights import load_weights, save_student, sha256_of

FORMATS = ("safetensors", "torch", "onnx")
FACTS = "export.json"
CARD = "README.md"


def export(composed: Composed, run: Path, to: Path, formats: tuple[str, ...], every: bool) -> dict[str, Any]:
    """Write the export of a finished run into the folder `to`, which appears whole or not at all; what was written.

    `every`: formats that this student cannot have are left out with their reason, instead of refused. Raises `Refused`, and `CheckFailed`
    for a graph that is too far from the student.
    """
    summary = must_be_finished(run)
    _must_be_free(to)
    problems = graphs.missing_packages(formats)
    if problems and not every:
        raise Refused(problems)
    data, network = load(composed, run)
    part = to.with_name(f".{to.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        facts = _write(composed, run, part, data, network, formats, every, problems)
        facts |= {"folder": str(to), "run": str(run)}
        write_json(part / FACTS, facts)
        (part / CARD).write_text(card(composed, run, summary, data, facts), encoding="utf-8")
        part.rename(to)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return facts


def must_be_finished(run: Path) -> dict[str, Any]:
    """The run's summary. Raises `Refused` for a run without a student of its own."""
    summary: dict[str, Any] = read_json(run / SUMMARY) if (run / SUMMARY).is_file() else {}
    arms = sorted(run.glob(f"arms/*/*/{STUDENT_FILE}"))
    if arms:
        raise Refused(Problem("this is a comparison of several runs", "", str(run), f"choose one: kdrun export {arms[0].parent}"))
    if not summary:
        raise Refused(Problem("this run is not finished", "", str(run), f"kdrun resume {run}"))
    if not (run / STUDENT_FILE).is_file():
        what = f"this run left no student ({STUDENT_FILE})"
        raise Refused(Problem(what, "", str(run), "a run that trained one"))
    return summary


def _must_be_free(to: Path) -> None:
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise Refused(Problem("is there already, and nothing is overwritten", "--to", str(to), "another --to, or take that folder away"))
    if to.exists():
        to.rmdir()


def load(composed: Composed, run: Path) -> tuple[Data, nn.Module]:
    """(the data of the student's stage, the student with its weights), on the CPU."""
    tree = composed.tree
    data = load_data(tree)
    data = instantiate(tree["plan"], "plan", allowed(tree)).view(tree, data)
    node = {**tree["student"], "checkpoint": None}
    if "pretrained" in node:
        node["pretrained"] = False  # its weights are the run's
    network = build_student_network({**tree, "student": node}, data)
    load_weights(network, run / STUDENT_FILE, key="student")
    return data, network.eval().to(memory_format=torch.contiguous_format)


def _write(
    composed: Composed,
    run: Path,
    to: Path,
    data: Data,
    network: nn.Module,
    formats: tuple[str, ...],
    every: bool,
    problems: list[Problem],
) -> dict[str, Any]:
    tree = composed.tree
    target, arguments = call_of(tree["student"], data.classes, data.input_shape, reserved=STUDENT_KEYS, allowed=allowed(tree))
    facts: dict[str, Any] = {
        "library": loading.library(target),
        "sha256": sha256_of(network),
        "input_shape": list(data.input_shape),
        "mean": list(data.mean),
        "std": list(data.std),
        "class_names": [] if data.vocabulary is not None else list(data.class_names),
        "takes": list(getattr(network, "takes", ())),
        "formats": {},
        "left_out": {},
    }
    if "safetensors" in formats:
        tokenizer = write_weights(network, to, data, facts["library"])
        facts["formats"]["safetensors"] = {"file": loading.WEIGHTS, "load": loading.weights_lines(target, arguments, tokenizer)}
    wanted = [name for name in formats if name != "safetensors"]
    if wanted:
        _write_graphs(network, data, to, wanted, every, problems, facts)
    if not facts["formats"]:
        raise Refused(Problem("; ".join(facts["left_out"].values()), "--format", str(run), "--format safetensors"))
    return facts


def write_weights(network: nn.Module, to: Path, data: Data, library: str) -> bool:
    """The student's weights as its own library loads them, read back and compared. Returns whether a tokenizer lies beside them."""
    if library != "transformers":
        save_student(network, to / loading.WEIGHTS, {"format": "pt"})
        back = copy.deepcopy(network)
        load_weights(back, to / loading.WEIGHTS)
        if sha256_of(back) != sha256_of(network):
            raise CheckFailed("the written weights are not those of the student")
        return False
    model: Any = network
    config = copy.deepcopy(model.config)
    config.use_cache = True  # kdrun trains without
    plain = type(model)(config).to(next(model.parameters()).dtype)
    plain.load_state_dict(plain_state(model))
    with graphs.quiet():
        plain.save_pretrained(to)
    tokenizer = getattr(data.vocabulary, "tokenizer", None)
    if tokenizer is not None:
        tokenizer.save_pretrained(to)
    return tokenizer is not None


def _write_graphs(
    network: nn.Module, data: Data, to: Path, wanted: list[str], every: bool, problems: list[Problem], facts: dict[str, Any]
) -> None:
    """The graphs that are wanted, each held against the student."""
    reason = graphs.cannot(network, data)
    program = None
    if reason is None:
        network = network.float()  # few runtimes have all of bf16
        try:
            program = graphs.trace(network, next(graphs.samples(network, data)))
        except Exception as error:  # torch.export has many ways to say no
            reason = f"torch.export cannot take this {type(network).__name__}: {graphs.first_line(error)}"
    for name in wanted:
        why = reason or (problems[0].what if name == "onnx" and problems else None)
        if why is None and program is not None:
            try:
                run = (graphs.write_torch if name == "torch" else graphs.write_onnx)(program, to / FILES[name])
            except Exception as error:
                why = f"{name} cannot take this {type(network).__name__}: {graphs.first_line(error)}"
        if why is not None:
            if not every:
                remedy = "--format safetensors, whose weights load into the network's own code"
                raise Refused(Problem(why, f"--format {name}", "", remedy))
            (to / FILES[name]).unlink(missing_ok=True)
            facts["left_out"][name] = why
            continue
        found = graphs.parity(network, run, data)
        if not found.holds:
            raise CheckFailed(f"{FILES[name]} is too far from the student on {found.samples} samples: {found}")
        facts["formats"][name] = _graph_facts(name, found, facts)


FILES = {"torch": loading.PROGRAM, "onnx": loading.ONNX}


def _graph_facts(name: str, found: Parity, facts: Mapping[str, Any]) -> dict[str, Any]:
    beside = tuple(facts["takes"])
    lines = loading.program_lines(beside) if name == "torch" else loading.onnx_lines(("input", *beside))
    return {"file": FILES[name], "load": lines, "parity": {**asdict(found), "holds": found.holds}}
