"""Causal language models of transformers: by hub name, by folder, or from a configuration with fresh weights.

They are handed on as they are, so that a saved student loads with plain transformers. What kdrun must know of them stands on the instance:
`vocabulary`, the number of true tokens (a published matrix is often padded beyond it), `ids`, how many ids it can read, and `takes`, what
goes in beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdrun.dataset.tokens import POSITIONS
from kdrun.errors import Problem, Refused, did_you_mean
from kdrun.student.taps import untouched

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
        raise Refused(
            Problem("language models need the package transformers, which is not installed", "", "", 'pip install "kdrun[text]"')
        ) from error
    if dtype not in DTYPES:
        raise Refused(Problem(f"there is no dtype '{dtype}'", "dtype", "", did_you_mean(dtype, DTYPES)))
    described = _config(transformers, name, dict(config or {}), num_classes, trust_remote_code, pretrained)
    options = {"trust_remote_code": trust_remote_code, "dtype": DTYPES[dtype]} | ({"attn_implementation": attention} if attention else {})
    model = _made(transformers, name if pretrained else None, described, options)
    rows = model.get_input_embeddings().num_embeddings
    if rows < num_classes:
        what, own = f"its matrix has {rows} rows, the data's tokenizer has {num_classes} tokens", name or "<its name or folder>"
        raise Refused(
            Problem(
                what,
                "name",
                "",
                f"the data set's tokenizer must be the model's own: dataset.tokenizer={own}; a teacher's may be another's: "
                f"objective=uld dataset.teacher_tokenizer={own}",
            )
        )
    # With a cache of keys and values transformers does not look for several sequences in one row, and lets each see the ones before it.
    model.config.use_cache = False
    if lora is not None:
        model = _with_lora(model, lora)
    model.vocabulary, model.ids = num_classes, rows
    model.takes = (POSITIONS,)
    model.example = lambda rows: {}  # they count for themselves
    return model


def _made(transformers: Any, weights: str | None, described: Any, options: Mapping[str, Any]) -> Any:
    """The model of a configuration, with the weights of that name or folder or, without one, fresh ones."""
    told: dict[str, Any] = {}
    try:
        if weights is None:
            model = transformers.AutoModelForCausalLM.from_config(described, **options)
        else:
            model, told = transformers.AutoModelForCausalLM.from_pretrained(weights, config=described, output_loading_info=True, **options)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise Refused(Problem(f"transformers cannot make it: {_first_line(error)}", *_place(error))) from error
    missing = sorted(told.get("missing_keys", ()))
    if missing:
        # transformers would go on with fresh weights and a warning.
        what = f"its files lack {len(missing)} of this model's tensors: {', '.join(missing[:3])}, ..."
        remedy = "the name of a causal language model, without a config that makes another of it; or pretrained=false"
        raise Refused(Problem(what, "name", "", remedy))
    return model


def _config(transformers: Any, name: str | None, changes: dict[str, Any], vocabulary: int, trusted: bool, pretrained: bool) -> Any:
    if name is None and "model_type" not in changes:
        remedy = "name=<hub name or folder>, or config.model_type=llama with its sizes"
        raise Refused(Problem("no language model is named", "name", "", remedy))
    try:
        if name is not None and (pretrained or "model_type" not in changes):
            described = transformers.AutoConfig.from_pretrained(name, trust_remote_code=trusted)
            changes.pop("model_type", None)  # said for those who plan without the files
            _check_keys(described, changes)
            return transformers.AutoConfig.from_pretrained(name, trust_remote_code=trusted, **changes)
        kind, known = changes.pop("model_type"), transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        if kind not in known:
            what = f"transformers has no causal language model of type '{kind}'"
            raise Refused(Problem(what, "config.model_type", "", did_you_mean(kind, known)))
        _check_keys(transformers.AutoConfig.for_model(kind), changes)
        # Special ids of a vocabulary that is not this one would be beyond its end.
        ids = {f"{which}_token_id": None for which in ("bos", "eos", "pad")}
        return transformers.AutoConfig.for_model(kind, **{"vocab_size": vocabulary, **ids, **changes})
    except Refused:
        raise
    except Exception as error:  # a configuration checks itself, each in its way
        raise Refused(Problem(f"transformers cannot read it: {_first_line(error)}", *_place(error))) from error


def _check_keys(described: Any, changes: Mapping[str, Any]) -> None:
    """Refuse keys that the configuration does not have: transformers would keep them and look at none."""
    legal = {*described.to_dict(), *described.attribute_map} - {"model_type"}
    unknown = sorted(changes.keys() - legal)
    if unknown:
        kind = described.model_type
        raise Refused([Problem(f"{kind} has no setting {key!r}", f"config.{key}", "", did_you_mean(key, legal)) for key in unknown])


def _first_line(error: Exception) -> str:
    """What transformers says, with the reason on the second line where it has one of several."""
    return " ".join(line.strip() for line in str(error).strip().splitlines()[:2])


def _place(error: Exception) -> tuple[str, str, str]:
    """(key, where, remedy) of what transformers refuses."""
    if "trust_remote_code" in str(error):
        return "name", "", "trust_remote_code=true, if you trust the code of that repository"
    if "attn_implementation" in str(error):
        return "attention", "", "attention=sdpa, attention=eager, or null for the model's own choice"
    if isinstance(error, OSError):
        return "name", "", "a hub name or a folder with config.json; offline: HF_HUB_OFFLINE=1 and a model that is in the cache"
    return "config", "", "settings of a causal language model that fit each other, e.g. those of the model's published config.json"


def _with_lora(model: Any, settings: Mapping[str, Any]) -> Any:
    """The model with adapters in its layers, the rest frozen; its class stays. Saved are merged weights (`kdrun.student.adapters`)."""
    try:
        import peft
    except ModuleNotFoundError as error:
        raise Refused(Problem("LoRA needs the package peft, which is not installed", "lora", "", 'pip install "kdrun[text]"')) from error
    beyond = [key for key in ("use_dora", "modules_to_save") if settings.get(key)]
    if beyond:
        what = "kdrun merges plain low-rank adapters only"
        raise Refused([Problem(what, f"lora.{key}", "", f"leave out {key}") for key in beyond])
    try:
        return peft.inject_adapter_in_model(peft.LoraConfig(task_type="CAUSAL_LM", **settings), model)
    except (TypeError, ValueError) as error:
        raise Refused(
            Problem(f"peft refuses these settings: {error}", "lora", "", "e.g. lora={r: 16, lora_alpha: 32, target_modules: all-linear}")
        ) from error


def position_limit(network: nn.Module) -> int | None:
    """How many tokens a language model can read in one row; None where nothing limits it."""
    config: Any = getattr(network, "config", None)
    return None if config is None else getattr(config.get_text_config(), "max_position_embeddings", None)


def is_recurrent(network: nn.Module) -> bool:
    """Whether a model of transformers carries a state from token to token (Mamba, RWKV, hybrids of them), past the borders of packed
    sequences, which only attention looks at."""
    return bool(getattr(network, "_is_stateful", False))


def hidden_states(network: nn.Module, x: Tensor, **beside: Tensor) -> Tensor:
    """What a language model's head reads, ids [B, T] -> [B, T, D]: the model without its projection to the vocabulary."""
    own = getattr(network, "hidden_states", None)
    if own is not None:
        return own(x, **beside)
    return network.base_model(x, use_cache=False, **beside)[0]  # type: ignore[operator]


def head_of(network: nn.Module) -> tuple[Tensor, Tensor | None]:
    """(weight [V, D], bias [V] or None) of a language model's projection to its true tokens."""
    head: Any = network.head if hasattr(network, "hidden_states") else network.get_output_embeddings()  # type: ignore[operator]
    size = network.vocabulary
    return head.weight[:size], None if head.bias is None else head.bias[:size]


def has_plain_head(network: nn.Module) -> bool:
    """Whether its logits are hidden states times a matrix, and nothing more.

    Some models cap or scale them, some have a layer between, an adapter may sit on the head: the network itself is asked, on a few tokens.
    Only its configuration tells of a cap that lies far above the logits of fresh weights.
    """
    if hasattr(network, "hidden_states"):
        return True
    model: Any = network
    config, head = getattr(model, "config", None), model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if getattr(config, "final_logit_softcapping", None) or not isinstance(head, nn.Linear):
        return False
    x = torch.arange(min(4, model.vocabulary), device=head.weight.device)[None]
    with untouched(model, x.device):
        said, product = model(x).logits[..., : model.vocabulary].float(), F.linear(hidden_states(model, x), *head_of(model)).float()
    return bool(said.shape == product.shape and (said - product).norm() <= 1e-2 * said.norm())
