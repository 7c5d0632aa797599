"""What `kdrun export` writes loads without kdrun where it says so, is the student, and carries its papers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from kdrun.export import graphs
from kdrun.export.graphs import Plain, parity, trace
from tests.cli.told import Problem, only
from tests.conftest import TINY, Outcome, run_cli
from tests.dataset.words import pairs, write_jsonl, write_model

Refusal = Callable[..., list[Problem]]
CPU = ["hardware=cpu", "hardware.threads=1", "-q"]
DRY = ["run.dry=true", "run.rivals=false", "run.seeds=null", *CPU]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`runs("name", overrides...)`: a finished run, trained once."""
    home = tmp_path_factory.mktemp("runs")

    def get(name: str, *overrides: str) -> Path:
        if not (home / name).is_dir():
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("kdrun.engine.session.plot_curves", lambda folder: None)
                outcome = run_cli("train", *overrides, f"run.dir={home / name}", f"run.root={home / 'root'}")
            assert outcome.code == 0, outcome.err
        return home / name

    return get


def mlp_run(runs: Callable[..., Path]) -> Path:
    return runs("mlp", *TINY, "objective=kd", "-q")


def timm_run(runs: Callable[..., Path]) -> Path:
    digits = ["dataset=digits", "dataset.subset=40", "dataset.subset_test=70", "source.batch_size=20", "optim.epochs=1"]
    return runs("timm", *digits, "student=timm", "student.name=resnet10t", "teacher=none", "objective=ce", *CPU)


def alone(folder: Path, lines: list[str], then: str, *forbidden: str) -> str:
    """What a fresh interpreter prints that runs the lines of the card in the export's folder, where `forbidden` cannot be imported."""
    fence = f"import sys\nfor name in {forbidden!r}:\n    sys.modules[name] = None\n"
    code = "\n".join([fence, *lines, then])
    # -I: neither the current folder nor PYTHONPATH
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, cwd=folder, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def lines_of(facts: dict[str, Any], name: str, card: str) -> list[str]:
    """The lines that load a format, which the card shows too."""
    lines: list[str] = facts["formats"][name]["load"]
    assert "\n".join(lines) in card
    return lines


def test_a_timm_student_loads_without_kdrun_in_every_format(
    runs: Callable[..., Path], kdrun: Callable[..., Outcome], tmp_path: Path
) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    run, to = timm_run(runs), tmp_path / "out"
    outcome = kdrun("export", str(run), "--to", str(to), "--format", "all", "--json")
    assert outcome.code == 0, outcome.err
    facts, card = outcome.json, (to / "README.md").read_text()
    assert facts["left_out"] == {}
    own, theirs = load_file(run / "student.safetensors"), load_file(to / "model.safetensors")
    assert own.keys() == theirs.keys()
    assert all(torch.equal(own[name], theirs[name]) for name in own)
    for name in ("torch", "onnx"):
        told = facts["formats"][name]["parity"]
        assert told["samples"] == 70
        assert told["max_difference"] <= told["tolerance"] == pytest.approx(1e-4 * max(1, told["largest"]))
    # Three rows through each: the batch size is free, and all say the same.
    rows = "import torch; inputs = torch.arange(3 * 64).reshape(3, 1, 8, 8).float() / 100"
    show = "print([round(v, 4) for v in torch.as_tensor({}).flatten().tolist()])"
    said = [
        alone(to, lines_of(facts, "safetensors", card), f"{rows}\n{show.format('model(inputs)')}", "kdrun"),
        alone(to, [rows, *lines_of(facts, "torch", card)], show.format("logits"), "kdrun", "timm"),
        alone(to, [rows, "input = inputs.numpy()", *lines_of(facts, "onnx", card)], show.format("logits"), "kdrun", "timm"),
    ]
    values = [torch.tensor(json.loads(text)) for text in said]
    assert values[0].shape == (30,)
    assert (values[0] - values[1]).abs().max() <= 2e-4
    assert (values[0] - values[2]).abs().max() <= 2e-4


def test_a_language_model_loads_with_plain_transformers(runs: Callable[..., Path], kdrun: Callable[..., Outcome], tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    teacher, student = write_model(tmp_path / "teacher", seed=1), write_model(tmp_path / "student", rows=32)
    file = write_jsonl(tmp_path / "my.jsonl", pairs(24))
    pair = ["recipe=lm_kd", f"teacher.name={teacher}", f"student.name={student}", f"dataset.path={file}", "dataset.max_length=32"]
    adapters = "student.lora={r: 2, lora_alpha: 4, target_modules: all-linear}"
    run = runs("lm", *pair, adapters, "source.batch_size=4", "optim.lr=0.05", *DRY)
    outcome = kdrun("export", str(run), "--to", str(tmp_path / "out"), "--format", "all", "--json")
    assert outcome.code == 0, outcome.err
    facts, to = outcome.json, tmp_path / "out"
    assert facts["library"] == "transformers"
    own = load_file(run / "student.safetensors")
    text = alone(
        to,
        lines_of(facts, "safetensors", (to / "README.md").read_text()),
        "import json; told = {k: float(v.double().sum()) for k, v in model.state_dict().items()}\n"
        "print(json.dumps([told, model.config.use_cache, len(tokenizer('a b')['input_ids'])]))",
        "kdrun",
    )
    told, cached, length = json.loads(text)
    assert cached
    assert length
    assert {name: float(tensor.double().sum()) for name, tensor in own.items()} == pytest.approx(told)  # adapters merged
    for name in ("torch", "onnx"):
        assert (name in facts["formats"]) != (name in facts["left_out"])
    assert yaml.safe_load((to / "README.md").read_text().split("---")[1])["pipeline_tag"] == "text-generation"


def test_the_card_says_what_is_known(runs: Callable[..., Path], kdrun: Callable[..., Outcome], tmp_path: Path) -> None:
    run = mlp_run(runs)
    assert kdrun("export", str(run), "--to", str(tmp_path / "out")).code == 0
    card = (tmp_path / "out" / "README.md").read_text()
    front, summary = yaml.safe_load(card.split("---")[1]), json.loads((run / "summary.json").read_text())
    assert front["library_name"] == "pytorch"
    assert front["model-index"][0]["results"][0]["metrics"][0]["value"] == summary["value"]
    assert f"top1 {summary['value']:.2f}" in card
    for words in ("60 test samples", "KL(p_T(zt) || p_T(zs))", "temperature 4.0", "Tainted: no", summary["config_hash"], "n = 1, seed 1"):
        assert words in card, words
    assert "Tainted**" not in card
    assert "license" not in front  # nobody said one


def test_a_tainted_run_says_so_in_its_card_first(runs: Callable[..., Path], kdrun: Callable[..., Outcome], tmp_path: Path) -> None:
    run = runs("dry", *TINY, "objective=kd", "run.dry=true", "-q")
    assert kdrun("export", str(run), "--to", str(tmp_path / "out")).code == 0
    head = (tmp_path / "out" / "README.md").read_text().split("## ")[0]
    assert "**Tainted**: this run was limited (run.dry=True)" in head


def test_an_export_can_be_measured_again(runs: Callable[..., Path], kdrun: Callable[..., Outcome], tmp_path: Path) -> None:
    run = mlp_run(runs)
    assert kdrun("export", str(run), "--to", str(tmp_path / "out")).code == 0
    again = kdrun("eval", str(tmp_path / "out" / "model.safetensors"), *TINY, "objective=kd", "--json", "--no-latency")
    assert again.json["metrics"]["test"]["top1"] == json.loads((run / "summary.json").read_text())["value"]


@pytest.mark.parametrize(
    ("recipe", "more"),
    [
        ("ff_g2m_bench", ["student=gcn", "objective=ce", "teacher=none"]),
        ("acam_kd_bench", []),
        pytest.param("sfd_bench", [], marks=pytest.mark.slow),
        ("taid_bench", []),
        pytest.param("opsd_bench", [], marks=pytest.mark.slow),
    ],
    ids=["graph", "segmentation", "generator", "window language model", "policy"],
)
def test_every_kind_of_student_is_exported_as_far_as_it_goes(
    recipe: str, more: list[str], runs: Callable[..., Path], kdrun: Callable[..., Outcome], tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    run = runs(recipe, f"recipe={recipe}", *more, *DRY)
    outcome = kdrun("export", str(run), "--to", str(tmp_path / "out"), "--format", "all", "--json")
    assert outcome.code == 0, outcome.err
    facts = outcome.json
    assert "safetensors" in facts["formats"]
    assert {*facts["formats"], *facts["left_out"]} == {"safetensors", "torch", "onnx"}
    if recipe == "ff_g2m_bench":
        assert "edges of one whole graph" in facts["left_out"]["torch"]
        assert "edges of one whole graph" in (tmp_path / "out" / "README.md").read_text()
    else:
        assert facts["left_out"] == {}


def test_a_format_that_cannot_be_is_refused_where_it_is_asked_for(runs: Callable[..., Path], refusal: Refusal, tmp_path: Path) -> None:
    run = runs("ff_g2m_bench", "recipe=ff_g2m_bench", "student=gcn", "objective=ce", "teacher=none", *DRY)
    problem = only(refusal("export", str(run), "--to", str(tmp_path / "out"), "--format", "onnx"))
    assert "so it has no free batch size" in problem.head
    assert problem.remedy.startswith("--format safetensors")
    assert not list(tmp_path.glob("*out*"))


def test_a_graph_that_is_not_the_student_fails_the_check(
    runs: Callable[..., Path], kdrun: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = mlp_run(runs)

    def spoilt(network: nn.Module, example: tuple[torch.Tensor, ...]) -> Any:
        with torch.no_grad():
            worse = torch.nn.Sequential(network)
            worse.register_forward_hook(lambda module, args, out: out + 0.01)
        return trace(worse, example)

    monkeypatch.setattr(graphs, "trace", spoilt)
    outcome = kdrun("export", str(run), "--to", str(tmp_path / "out"), "--format", "torch")
    assert outcome.code == 3
    assert "model.pt2 is too far from the student on 60 samples" in outcome.err
    assert not list(tmp_path.glob("*out*"))


def test_numbers_that_are_none_fail_the_check(runs: Callable[..., Path]) -> None:
    from kdrun.engine.records import load_run
    from kdrun.export.export import load

    run = mlp_run(runs)
    data, network = load(load_run(run), run)
    assert parity(network, lambda inputs: Plain(network)(*inputs), data).holds
    assert not parity(network, lambda inputs: Plain(network)(*inputs) * float("nan"), data).holds


def test_nothing_is_overwritten(runs: Callable[..., Path], refusal: Refusal, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    problem = only(refusal("export", str(mlp_run(runs)), "--to", str(tmp_path / "out")))
    assert problem.head == "--to: is there already, and nothing is overwritten"
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_what_has_no_student_is_refused(
    refusal: Refusal, compared: tuple[Path, Outcome], runs: Callable[..., Path], tmp_path: Path
) -> None:
    assert "not a run folder" in only(refusal("export", str(tmp_path))).head
    problem = only(refusal("export", str(compared[0])))
    assert "comparison of several runs" in problem.head
    assert re.fullmatch(r"choose one: kdrun export .*/arms/\w+/seed-1", problem.remedy)


def test_missing_packages_are_one_line(
    runs: Callable[..., Path], refusal: Refusal, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(graphs, "PACKAGES", ("no_such_onnx", "json"))
    problem = only(refusal("export", str(mlp_run(runs)), "--to", str(tmp_path / "out"), "--format", "onnx"))
    assert problem.head == "--format onnx: ONNX needs no_such_onnx, which is not installed"
    assert problem.remedy == 'pip install "kdrun[export]"'
