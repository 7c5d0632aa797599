"""What writes completions: kdrun's own writer, `generate` of transformers, or vLLM. All are called as `kdrun.student.generate.complete` is.

own           every draw is a counter: one text for one key and sample, in any batch, on any number of ranks, after a resume
transformers  `generate` draws by torch's generator, seeded by the key and the batch's ids: one text for one key, batch, machine and
              version of torch; so the same after a resume, and not on another number of ranks
vllm          requests are seeded by the key and their ids, but its numbers depend on how they are batched, so no text is promised to come
              again; texts come with the log-probabilities that it says, which differ a little from what training computes
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from kdrun import rng
from kdrun.errors import Problem
from kdrun.student.generate import Completions, Mixed, Sampling, complete, ended, left_padded
from kdrun.student.taps import untouched

Engine = Literal["own", "transformers", "vllm"]


class Writer(Protocol):
    """Completions of prompts [T_i] by a network, drawn by a key and sample ids [B]."""

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
    ) -> Completions: ...


def writer_of(engine: Engine, options: Mapping[str, Any]) -> Writer:
    """The writer of that name; `options` are the engine's own, of vLLM its `LLM`'s."""
    if engine == "vllm":
        from kdrun.student.vllm_engine import VllmWriter

        return VllmWriter(options)
    return complete if engine == "own" else by_transformers


def engine_problems(engine: Engine, network: nn.Module) -> list[Problem]:
    """Why that engine cannot write for this network on this machine."""
    if engine == "own":
        return []
    if not hasattr(network, "generate"):
        what = f"{engine} writes for models of transformers, and {type(network).__name__} is none"
        return [Problem(what, "source.engine", "", "source.engine=own")]
    if engine == "vllm":
        from kdrun.student.vllm_engine import missing

        return missing()
    return []


def by_transformers(
    network: nn.Module,
    prompts: Sequence[Tensor],
    sampling: Sampling,
    key: int,
    ids: Tensor,
    pad: int,
    device: torch.device,
    mixed: Mixed | None = None,
) -> Completions:
    """Completions by the model's own `generate`, with its sampling, left padding and cache."""
    model: Any = network
    assert mixed is None
    row, seen = left_padded([p.to(device) for p in prompts], pad)
    drawing = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k or 0} if sampling.temperature else {}
    beyond = list(range(model.vocabulary, model.get_output_embeddings().out_features))  # rows of a padded matrix are no tokens
    own = model.generation_config
    # Many published models bring settings of their own (penalties, suppressed tokens, further stops), which would change what is drawn.
    model.generation_config = type(own)(
        do_sample=bool(sampling.temperature),
        num_beams=1,
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=list(sampling.stop) or None,
        pad_token_id=pad,
        suppress_tokens=beyond or None,
        use_cache=True,
        return_dict_in_generate=True,
        output_scores=True,
        **drawing,
    )
    try:
        with untouched(network, device), torch.inference_mode():
            torch.manual_seed(rng.key(key, "generate", *ids.tolist()))
            told = model.generate(input_ids=row, attention_mask=seen)
    finally:
        model.generation_config = own
    tokens = told.sequences[:, row.shape[1] :].clone()
    # Of the distribution that tokens are drawn from, which is one token alone where the likeliest is taken.
    said = [sampling.log_probs(scores) if not sampling.temperature else torch.log_softmax(scores.double(), -1) for scores in told.scores]
    log_probs = torch.stack(said, 1).gather(-1, tokens[..., None])[..., 0]
    return ended(tokens, log_probs.clone(), sampling.stop, pad)
