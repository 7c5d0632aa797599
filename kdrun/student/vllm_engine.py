"""vLLM (Kwon et al., SOSP 2023, arXiv 2309.06180) as a writer: it runs in this process beside the training, on one GPU.

Before every step the student's weights are handed to it: `LLM.collective_rpc` calls `Weights.take_weights` in its worker, which gives them
to the model's own `load_weights` under the names of transformers. Log-probabilities are asked for as `processed_logprobs`, those of the
distribution that was drawn from (vLLM 0.10.2 and later).

Written against vLLM's documented interface and tested with a stand-in of it, not yet on a GPU.
"""

from __future__ import annotations

import importlib
import importlib.util
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

NEVER = -100.0  # added to the logits of ids that are no tokens


class Weights:
    """What vLLM mixes into its worker (`worker_extension_cls`)."""

    model_runner: Any  # the worker's

    def take_weights(self, pairs: Iterable[tuple[str, Tensor]]) -> None:
        self.model_runner.model.load_weights(pairs)


def missing() -> list[Problem]:
    """What is not there to run vLLM with."""
    if importlib.util.find_spec("vllm") is None:
        what = "source.engine=vllm needs the package vllm, which is not installed"
    elif not torch.cuda.is_available():
        what = "vllm needs a GPU, and torch sees none"
    else:
        return []
    return [Problem(what, "source.engine", "", "pip install vllm on a machine with a GPU, or source.engine=own")]


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
        engine = self._engine_for(network)
        engine.collective_rpc("take_weights", args=(list(plain_state(network).items()),))
        engine.reset_prefix_cache()  # what it holds of earlier prompts was said by other weights
        asked = [{"prompt_token_ids": prompt.tolist()} for prompt in prompts]
        told = [answer.outputs[0] for answer in engine.generate(asked, self._wishes(network, sampling, key, ids), use_tqdm=False)]
        rows = [torch.tensor(list(one.token_ids)) for one in told]
        said = [
            torch.tensor([place[token].logprob for place, token in zip(one.logprobs, one.token_ids, strict=True)], dtype=torch.float64)
            for one in told
        ]
        tokens, log_probs = pad_sequence(rows, True, pad), pad_sequence(said, True, 0.0)
        log_probs = torch.zeros_like(log_probs) if sampling.temperature == 0 else log_probs
        lengths = torch.tensor([len(row) for row in rows])
        return ended(tokens.to(device), log_probs.to(device), sampling.stop, pad, lengths.to(device))

    def _engine_for(self, network: Any) -> Any:
        if self._engine is None:
            # In this process, where weights are handed over as they are.
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
            vllm = importlib.import_module("vllm")
            with tempfile.TemporaryDirectory() as folder:  # only the shape is read from it: the weights come before every step
                network.config.save_pretrained(folder)
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
        vllm = importlib.import_module("vllm")
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
