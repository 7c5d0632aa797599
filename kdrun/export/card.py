"""The model card: what a student is, where it comes from, what was measured, how to load it, what speaks against using it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from kdrun.config.compose import Composed
from kdrun.config.paths import SearchPath
from kdrun.dataset.base import Data
from kdrun.engine.records import read_json
from kdrun.engine.session import PROVENANCE
from kdrun.evaluation.metrics import kind
from kdrun.ledger.table import number

SHOWN_CLASSES = 20  # names of classes that the card lists; export.json has all
LIBRARIES = ("timm", "transformers")  # those that the hub knows; all else is plain PyTorch


def card(composed: Composed, run: Path, summary: Mapping[str, Any], data: Data, facts: Mapping[str, Any]) -> str:
    """The whole README.md of an export."""
    provenance = read_json(run / PROVENANCE) if (run / PROVENANCE).is_file() else {}
    parts = [
        "---\n" + yaml.safe_dump(front_matter(composed, summary, data, facts), sort_keys=False, allow_unicode=True) + "---\n",
        f"# {_name(composed)}\n",
        *_taint(summary),
        *_section("What it is", _what(composed, summary, facts)),
        *_section("How to load it", _loading(facts)),
        *_section("Inputs and outputs", _shapes(data, facts)),
        *_section("Teacher", _teacher(composed, summary)),
        *_section("Data", _data(composed, data, provenance)),
        *_section("Objective", _objective(composed)),
        *_section("What was measured", _measured(composed, summary, data)),
        *_section("Cost", _cost(summary)),
        *_section("Limits", _limits(summary, facts)),
        *_section("Where it comes from", _origin(summary, provenance, facts)),
    ]
    return "\n".join(parts)


def front_matter(composed: Composed, summary: Mapping[str, Any], data: Data, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What the hub reads (https://huggingface.co/docs/hub/model-cards). No licence: kdrun knows that of no data and no teacher."""
    tree, task = composed.tree, _task(data)
    hub = tree["dataset"].get("hub") if not tree["dataset"].get("path") else None
    base = tree["student"].get("name") if facts["library"] == "transformers" and tree["student"].get("pretrained") else None
    told: dict[str, Any] = {"library_name": facts["library"] if facts["library"] in LIBRARIES else "pytorch"}
    told |= {"pipeline_tag": task} if task else {}
    told |= {"datasets": [str(hub)]} if hub else {}
    told |= {"base_model": str(base)} if base else {}
    told["tags"] = ["knowledge-distillation", "kdrun", composed.choices["objective"]]
    metric = {"type": summary["metric"], "value": summary["value"], "name": f"{summary['metric']} ({summary['how']})"}
    dataset = {"name": data.name, "type": str(hub or data.name), "split": "test"}
    entry = {"task": {"type": task or "other"}, "dataset": dataset, "metrics": [metric]}
    return told | {"model-index": [{"name": _name(composed), "results": [entry]}]}


def _task(data: Data) -> str | None:
    if data.vocabulary is not None:
        return "text-generation"
    return "image-classification" if len(data.input_shape) == 3 and data.split("test").targets.ndim == 1 else None


def _name(composed: Composed) -> str:
    chosen = composed.choices
    taught = f", taught by {chosen['teacher']}" if chosen["teacher"] != "none" else ""
    return f"{chosen['student']} on {chosen['dataset']} by {chosen['objective']}{taught}"


def _section(title: str, lines: Iterator[str]) -> Iterator[str]:
    yield f"## {title}\n"
    yield "\n".join(lines) + "\n"


def _taint(summary: Mapping[str, Any]) -> Iterator[str]:
    if summary["tainted"]:
        yield f"> **Tainted**: this run was limited ({'; '.join(summary['tainted'])}). Its numbers say nothing and must not be quoted.\n"


def _what(composed: Composed, summary: Mapping[str, Any], facts: Mapping[str, Any]) -> Iterator[str]:
    chosen, student = composed.choices, summary["student"]
    flops = f", {student['flops']:,} FLOPs a sample" if student.get("flops") else ""
    yield f"A student network (`{composed.tree['student']['_target_']}`, {student['parameters']:,} parameters{flops}) trained by knowledge"
    yield f"distillation with kdrun: recipe `{composed.recipe or 'none'}`, objective"
    yield f"`{chosen['objective']}`, seed {summary['seed']}, {summary['epochs']:.4g} epochs ({summary['steps']} steps). The files hold the"
    yield "student alone: no teacher, no connectors, no optimiser."
    if composed.tree["about"]:
        yield f"\nThe recipe's question: {composed.tree['about'].strip()}"
    for name, why in facts["left_out"].items():
        yield f"\nThere is no {name} file: {why}."


def _loading(facts: Mapping[str, Any]) -> Iterator[str]:
    for told in facts["formats"].values():
        needs = facts["library"] if told["file"].endswith(".safetensors") else {"pt2": "torch alone", "onnx": "onnxruntime alone"}
        yield f"`{told['file']}` (needs {needs if isinstance(needs, str) else needs[told['file'].rpartition('.')[2]]}), in this folder:\n"
        yield "```python\n" + "\n".join(told["load"]) + "\n```"
        if "parity" in told:
            p = told["parity"]
            yield f"\nOn {p['samples']} test samples its logits are within {p['max_difference']:.2g} of the student's (tolerance "
            yield f"{p['tolerance']:.2g}), and the largest is the same one in {p['agreement']:.2%}.\n"


def _shapes(data: Data, facts: Mapping[str, Any]) -> Iterator[str]:
    if data.vocabulary is not None:
        yield f"Token ids [batch, length] in, logits [batch, length, {data.classes}] out."
        return
    yield f"Float32 [batch, {', '.join(map(str, facts['input_shape']))}] in, logits over {data.classes} classes out."
    if len(data.input_shape) == 3 and facts["mean"]:
        mean, std = (", ".join(f"{v:.4f}" for v in facts[key]) for key in ("mean", "std"))
        yield f"Pixels are scaled to [0, 1], then normalised by channel: mean ({mean}), standard deviation ({std})."
    elif facts["mean"]:
        yield "Each feature is standardised; `export.json` has mean and standard deviation."
    if facts["takes"]:
        yield f"Beside its input it takes {', '.join(facts['takes'])}."
    names, more = facts["class_names"][:SHOWN_CLASSES], len(facts["class_names"]) - SHOWN_CLASSES
    yield f"Classes in order: {', '.join(map(str, names))}{f', ... ({more} more in `export.json`)' if more > 0 else ''}."


def _teacher(composed: Composed, summary: Mapping[str, Any]) -> Iterator[str]:
    told, tree = summary["teacher"], composed.tree
    if not told:
        yield "None: the student learned from labels alone." if composed.choices["teacher"] == "none" else "Nothing was measured of it."
        return
    named = tree["teacher"].get("name") or tree["teacher"].get("_target_") or tree["teacher"].get("kind")
    yield f"`{composed.choices['teacher']}` ({named}); sha256 of its weights: {told.get('sha256') or 'none, it has no weights'}."
    if summary["metric"] in told:
        yield f"Measured here on the same test split: {_value(told[summary['metric']], summary['metric'])}."


def _data(composed: Composed, data: Data, provenance: Mapping[str, Any]) -> Iterator[str]:
    sizes = (provenance.get("data") or {}).get("sizes") or {name: len(split) for name, split in data.splits.items()}
    yield f"`{data.name}`: {', '.join(f'{size:,} {name}' for name, size in sizes.items())}; fingerprint {data.fingerprint[:16]}."
    if composed.tree["dataset"].get("hub"):
        yield f"On the Hugging Face hub: {composed.tree['dataset']['hub']}."


def _objective(composed: Composed) -> Iterator[str]:
    tree, file = composed.tree, SearchPath.of(composed.config_dirs).file("objective", composed.choices["objective"])
    for line in file.read_text(encoding="utf-8").splitlines() if file is not None else []:
        if not line.startswith("#"):
            break
        yield f"    {line.lstrip('# ')}"
    fields = ", ".join(f"{key} {value}" for key, value in tree["objective"].items() if key != "_target_")
    yield f"\nSettings: {fields or 'none'}."
    paper = tree["paper"]
    if paper:
        where = ", ".join(str(p) for p in (paper.get("venue"), paper.get("year")) if p)
        arxiv = f", [arXiv:{paper['arxiv']}](https://arxiv.org/abs/{paper['arxiv']})" if paper.get("arxiv") else ""
        yield f"The recipe follows: {paper.get('authors', '')}, *{paper['title']}*, {where}{arxiv}."


def _value(value: Any, metric: str) -> str:
    told = kind(metric)
    return f"{metric} {number(value, metric)}{' %' if told is not None and told.unit == 'percent' else ''}"


def _measured(composed: Composed, summary: Mapping[str, Any], data: Data) -> Iterator[str]:
    yield f"**{_value(summary['value'], summary['metric'])}**, one run (n = 1, seed {summary['seed']}): {summary['how']}; protocol"
    yield f"`{summary['protocol']}`, {len(data.split('test')):,} test samples, test split read {summary['test_reads']} times.\n"
    yield "| metric | test |\n|---|---|"
    for name, value in (summary["test"] or {}).items():
        if isinstance(value, (int, float)):
            yield f"| {name} | {number(value, name)} |"
    file = Path(composed.tree["run"]["root"]) / "ledger" / f"{composed.recipe}.json"
    record = read_json(file) if composed.recipe and file.is_file() else None
    if record is None:
        return
    row = record["arms"].get(record["method"], {}).get(record["metric"], {})
    if row:
        yield f"\nThe ledger's record of this recipe, over {row['n']} seeds: {record['method']} {number(row['mean'], record['metric'])}"
        between = (
            f" (95 % interval {number(row['low'], record['metric'])} to {number(row['high'], record['metric'])})" if row["n"] > 1 else ""
        )
        yield f"{record['metric']}{between}; verdict: {record['verdict']['name']}."
        for arm, rows in record["arms"].items():
            if arm != record["method"] and record["metric"] in rows:
                yield f"- {arm}: {number(rows[record['metric']]['mean'], record['metric'])}"


def _cost(summary: Mapping[str, Any]) -> Iterator[str]:
    cost = summary["cost"]
    yield f"{cost['seconds']:,.1f} s ({cost['cpu_seconds']:,.1f} CPU seconds) of training on {cost['hardware']}; peak memory"
    yield f"{cost['peak_memory_bytes'] / 2**20:,.0f} MiB. A teacher that was trained for it is not counted."


def _limits(summary: Mapping[str, Any], facts: Mapping[str, Any]) -> Iterator[str]:
    yield f"- Tainted: {'; '.join(summary['tainted']) or 'no'}."
    yield "- One seed says little of the spread: read it beside the interval of a comparison over seeds."
    yield "- Measured on the test split named above and on nothing else: other data, groups of people and uses were not looked at."
    yield "- What the data and the teacher carry (mistakes, bias, licences) is in the student too."
    if facts["library"] not in LIBRARIES and "safetensors" in facts["formats"]:
        yield f"- The weights need the code of `{facts['library']}`; files of torch.export and ONNX need none."


def _origin(summary: Mapping[str, Any], provenance: Mapping[str, Any], facts: Mapping[str, Any]) -> Iterator[str]:
    code, environment = provenance.get("code") or {}, provenance.get("environment") or {}
    commit = f"{code.get('commit') or 'unknown'}{' with changes' if code.get('dirty') else ''}"
    packages = ", ".join(f"{name} {version}" for name, version in (environment.get("packages") or {}).items() if version)
    version = environment.get("kdrun", "unknown")
    yield f"- configuration {summary['config_hash']}, commit {commit}, kdrun {version}, finished {summary['finished']}"
    yield f"- student sha256 {facts['sha256']}"
    if packages:
        yield f"- {packages}"
