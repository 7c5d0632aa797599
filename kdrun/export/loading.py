"""The few lines of Python that load an export, for its card and its reader."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

WEIGHTS = "model.safetensors"
PROGRAM = "model.pt2"
ONNX = "model.onnx"


def library(target: Callable[..., Any]) -> str:
    """Whose code the weights need: timm, transformers, or the package that defines the network."""
    name = f"{target.__module__}.{target.__qualname__}"
    own = {"kdrun.student.timm.create": "timm", "kdrun.student.language.causal_lm": "transformers"}
    return own.get(name, target.__module__.partition(".")[0])


def weights_lines(target: Callable[..., Any], arguments: Mapping[str, Any], tokenizer: bool) -> list[str]:
    """Into the network's own code."""
    whose = library(target)
    if whose == "transformers":
        lines = ["from transformers import AutoModelForCausalLM" + (", AutoTokenizer" if tokenizer else ""), ""]
        lines += ['model = AutoModelForCausalLM.from_pretrained(".").eval()  # this folder']
        return [*lines, 'tokenizer = AutoTokenizer.from_pretrained(".")'] if tokenizer else lines
    given = {name: value for name, value in arguments.items() if name != "pretrained" and value is not None}
    if whose == "timm":
        given.pop("name")
        shown = ", ".join([repr(arguments["name"]), *(f"{name}={value!r}" for name, value in given.items())])
        made, imported = f"timm.create_model({shown})", "import timm"
    else:
        shown = ", ".join(f"{name}={value!r}" for name, value in given.items())
        made, imported = f"{target.__qualname__}({shown})", f"from {target.__module__} import {target.__qualname__.partition('.')[0]}"
    return [
        imported,
        "from safetensors.torch import load_file",
        "",
        f"model = {made}.eval()",
        f'model.load_state_dict(load_file("{WEIGHTS}"))',
    ]


def program_lines(beside: tuple[str, ...]) -> list[str]:
    """Without the network's code: plain torch."""
    call = ", ".join(["inputs", *beside])
    return ["import torch", "", f'model = torch.export.load("{PROGRAM}").module()', f"logits = model({call})  # float32, any batch size"]


def onnx_lines(inputs: tuple[str, ...]) -> list[str]:
    given = ", ".join(f'"{name}": {name}' for name in inputs)
    return [
        "import onnxruntime",
        "",
        f'session = onnxruntime.InferenceSession("{ONNX}")',
        f"logits = session.run(None, {{{given}}})[0]  # numpy, any batch size",
    ]
