"""Causal language models of transformers: by hub name, by folder, or from a configuration with fresh weights.

They are handed on as they are, so that a saved student loads with plain transformers. What kdrun must know of them stands on the instance:
`vocabulary`, the number of true tokens (a published matrix is often padded beyond it), and `takes`, what goes in beside the ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kdrun.dataset.tokens import POSITIONS
from kdrun.errors import Problem, Refused, did_you_mean

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def causal_lm(
    num_classes: int,
    name: str | None = None,
    config: dict[str, Any] | None = None,
    pretrained: bool = True,
    dtype: str = "fp32",
    attention: str | None = None,
    lora: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """A causal language model for a vocabulary of `num_classes` tokens.

    Args:
        name: hub name or folder; its weights are fetched where `pretrained`.
        config: instead of a name {model_type: llama, hidden_size: 64, ...}, or what differs from the named model's configuration.
        dtype: of its weights: fp32, bf16, fp16.
        attention: an implementation of transformers, e.g. sdpa, eager, flash_attention_2.
        lora: settings of peft's LoraConfig, e.g. {r: 64, lora_alpha: 128, target_modules: all-linear}: only the adapters are trained.
        trust_remote_code: whether code that a hub repository brings may run.

    Raises:
        Refused: no such model or folder, a vocabulary that its matrix does not cover, a missing package.
    """
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise Refused(Problem("language models need the package transformers, which is not installed", "", "", 'pip install "kdrun[text]"')) from error
    if dtype not in DTYPES:
        raise Refused(Problem(f"there is no dtype '{dtype}'", "dtype", "", did_you_mean(dtype, DTYPES)))
    options = {"trust_remote_code": trust_remote_code, "dtype": DTYPES[dtype]} | ({"attn_implementation": attention} if attention else {})
    described = _config(transformers, name, dict(config or {}), num_classes, trust_remote_code)
    try:
        if name is not None and pretrained:
            model = transformers.AutoModelForCausalLM.from_pretrained(name, config=described, **options)
        else:
            model = transformers.AutoModelForCausalLM.from_config(described, **options)
    except (OSError, ValueError, ImportError) as error:
        raise Refused(Problem(f"transformers cannot make it: {str(error).strip().splitlines()[0]}", "name", "", _remedy(error))) from error
    rows = model.get_input_embeddings().num_embeddings
    if rows < num_classes:
        what = f"its matrix has {rows} rows, the data's tokenizer has {num_classes} tokens"
        raise Refused(Problem(what, "name", "", "the data set's tokenizer must be the model's own: dataset.tokenizer=<the same name or folder>"))
    if lora is not None:
        model = _with_lora(model, lora)
    model.vocabulary = num_classes
    model.takes = (POSITIONS,)
    model.example = lambda rows: {}  # they count for themselves
    return model  # type: ignore[no-any-return]


def _config(transformers: Any, name: str | None, changes: dict[str, Any], vocabulary: int, trusted: bool) -> Any:
    if name is None and "model_type" not in changes:
        remedy = "name=<hub name or folder>, or config.model_type=llama with its sizes"
        raise Refused(Problem("no language model is named", "name", "", remedy))
    try:
        if name is not None:
            return transformers.AutoConfig.from_pretrained(name, trust_remote_code=trusted, **changes)
        kind = changes.pop("model_type")
        if kind not in transformers.CONFIG_MAPPING:
            raise Refused(Problem(f"transformers has no model type '{kind}'", "config.model_type", "", did_you_mean(kind, transformers.CONFIG_MAPPING)))
        # Special ids of a vocabulary that is not this one would be beyond its end.
        ids = {f"{which}_token_id": None for which in ("bos", "eos", "pad")}
        return transformers.AutoConfig.for_model(kind, **{"vocab_size": vocabulary, **ids, **changes})
    except (OSError, ValueError, TypeError) as error:
        raise Refused(Problem(f"transformers cannot read it: {str(error).strip().splitlines()[0]}", "name", "", _remedy(error))) from error


def _remedy(error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return "trust_remote_code=true, if you trust the code of that repository"
    return "a hub name or a folder with config.json; offline: HF_HUB_OFFLINE=1 and a model that is in the cache"


def _with_lora(model: Any, settings: Mapping[str, Any]) -> Any:
    """The model with adapters, the rest frozen. Saved are the merged weights of the whole."""
    try:
        import peft
    except ModuleNotFoundError as error:
        raise Refused(Problem("LoRA needs the package peft, which is not installed", "lora", "", 'pip install "kdrun[text]"')) from error
    try:
        return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    except (TypeError, ValueError) as error:
        raise Refused(Problem(f"peft refuses these settings: {error}", "lora", "", "e.g. lora={r: 16, lora_alpha: 32, target_modules: all-linear}")) from error


def hidden_states(network: nn.Module, x: Tensor, **beside: Tensor) -> Tensor:
    """What a language model's head reads, ids [B, T] -> [B, T, D]: the model without its projection to the vocabulary."""
    own = getattr(network, "hidden_states", None)
    if own is not None:
        return own(x, **beside)  # type: ignore[no-any-return]
    return network.base_model(x, use_cache=False, **beside)[0]  # type: ignore[operator, no-any-return]


def head_of(network: nn.Module) -> tuple[Tensor, Tensor | None]:
    """(weight [V, D], bias [V] or None) of a language model's projection to its true tokens."""
    head: Any = network.head if hasattr(network, "hidden_states") else network.get_output_embeddings()  # type: ignore[operator]
    size = network.vocabulary
    return head.weight[:size], None if head.bias is None else head.bias[:size]


def has_plain_head(network: nn.Module) -> bool:
    """Whether its logits are hidden states times a matrix, and nothing more (some models cap or scale them afterwards)."""
    config = getattr(network, "config", None)
    capped = getattr(config, "final_logit_softcapping", None), getattr(config, "logit_scale", None), getattr(config, "logits_scaling", None)
    return hasattr(network, "hidden_states") or (hasattr(network, "get_output_embeddings") and not any(capped))
