"""Other writers than kdrun's own: `generate` of transformers, and vLLM, of which a stand-in records what it is asked."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from kdrun.errors import Refused
from kdrun.source.rollout import BEHAVIOUR, Rollout
from kdrun.student.adapters import plain_state
from kdrun.student.engines import by_transformers, engine_problems, writer_of
from kdrun.student.generate import Completions, Sampling, complete
from kdrun.student.vllm_engine import NEVER, VllmWriter, Weights
from tests.conftest import Outcome
from tests.dataset.texts import PADDED, V, tiny, uneven_run
from tests.engine.running import assert_same_run, assert_same_training, resume, run, run_killed
from tests.source.test_rollout import policy, rows, uneven
from tests.student.test_generate import CPU, IDS, PROMPTS, said_after


def write(network: Any, sampling: Sampling, key: int = 5, ids: Tensor = IDS) -> Completions:
    return by_transformers(network, PROMPTS, sampling, key, ids, 0, CPU)


# -- transformers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_same_key_and_ids_write_the_same_text_whatever_else_was_drawn(name: str) -> None:
    model = tiny(name)
    first = write(model, Sampling(9))
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert torch.equal(write(model, Sampling(9)).tokens, first.tokens)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(write(model, Sampling(9), key=6).tokens, first.tokens)
    assert not torch.equal(write(model, Sampling(9), ids=IDS + 1).tokens, first.tokens)


@pytest.mark.parametrize(
    "how",
    [Sampling(8), Sampling(8, temperature=0.5), Sampling(8, temperature=1.3, top_k=4), Sampling(8, top_p=0.6), Sampling(8, temperature=0)],
)
def test_its_log_probabilities_are_those_of_the_distribution_drawn_from(how: Sampling) -> None:
    model = tiny()
    told = write(model, how)
    for row, prompt in enumerate(PROMPTS):
        expected = how.log_probs(said_after(model, prompt, told.tokens[row])).gather(-1, told.tokens[row][:, None])[:, 0]
        torch.testing.assert_close(told.log_probs[row], expected, rtol=0, atol=1e-5)


def test_its_likeliest_tokens_are_those_of_the_own_writer() -> None:
    model, how = tiny(), Sampling(9, temperature=0, stop=(3, 4))
    ours, theirs = write(model, how), complete(model, PROMPTS, how, 5, IDS, 0, CPU)
    assert torch.equal(ours.tokens, theirs.tokens)
    assert torch.equal(ours.lengths, theirs.lengths)


def test_its_draws_follow_the_distribution() -> None:
    model, prompt, n = tiny(), torch.tensor([4, 7]), 3000
    told = by_transformers(model, [prompt] * n, Sampling(1), 5, torch.arange(n), 0, CPU)
    expected = said_after(model, prompt, torch.tensor([0])).softmax(-1)[0]
    counts = torch.bincount(told.tokens.flatten(), minlength=V).double()
    assert ((counts - n * expected).square() / (n * expected)).sum() < 28.3  # 99.5 % of a chi square with 12 degrees of freedom


def test_nothing_that_a_model_brings_and_no_padded_row_changes_a_draw() -> None:
    model = tiny()
    plain = write(model, Sampling(9))
    model.generation_config.repetition_penalty = 3.0
    with torch.no_grad():
        model.lm_head.weight[V:] = 100 * model.lm_head.weight[0]
    assert torch.equal(write(model, Sampling(9)).tokens, plain.tokens)
    assert model.generation_config.repetition_penalty == 3.0


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr("kdrun.engine.session.plot_curves", lambda folder: None)
    written = [
        "objective=lm_kd",
        "objective.divergence=reverse_kl",
        "source=rollout",
        "source.max_new_tokens=5",
        "source.engine=transformers",
    ]
    return [*uneven_run(tmp_path / "teacher.safetensors"), *written]


def test_a_run_that_was_killed_goes_on_bit_for_bit_and_accumulation_changes_nothing(words: list[str], tmp_path: Path) -> None:
    words = [*words, "run.checkpoint_every=0.34"]
    run(words, tmp_path / "unbroken")
    run_killed(words, tmp_path / "broken", "step_done", 4)
    resume(words, tmp_path / "broken")
    assert_same_run(tmp_path / "broken", tmp_path / "unbroken")
    run([*words, "hardware.micro_batch=4"], tmp_path / "cut")
    assert_same_training(tmp_path / "cut", tmp_path / "unbroken", rtol=1e-4)


# -- vLLM -----------------------------------------------------------------------------------------------------------------


class FakeWorker(Weights):
    """A worker as vLLM mixes it, which keeps what it is given."""

    def __init__(self) -> None:
        self.loaded: dict[str, Tensor] = {}

    def reload_weights(self, weights_iterator: Iterator[tuple[str, Tensor]]) -> None:
        self.loaded = {name: tensor.detach().clone() for name, tensor in weights_iterator}


class FakeLLM:
    """Writes 5, 6, ... after every prompt, each with log-probability -0.25 times its place."""

    made: ClassVar[list[FakeLLM]] = []

    def __init__(self, **settings: Any) -> None:
        self.settings, self.calls, self.worker = settings, [], FakeWorker()
        self.config = (Path(settings["model"]) / "config.json").read_text()
        FakeLLM.made.append(self)

    def collective_rpc(self, method: str, args: tuple[Any, ...]) -> list[Any]:
        self.calls.append(method)
        return [getattr(self.worker, method)(*args)]

    def reset_prefix_cache(self) -> None:
        self.calls.append("reset_prefix_cache")

    def generate(self, prompts: list[dict[str, Any]], wishes: list[Any], use_tqdm: bool) -> list[Any]:
        self.calls.append("generate")
        self.prompts, self.wishes = prompts, wishes
        answers = []
        for i, wish in enumerate(wishes):
            tokens = list(range(5, 5 + min(1 + i % 3, wish.max_tokens)))
            said = [{token: types.SimpleNamespace(logprob=-0.25 * (n + 1))} for n, token in enumerate(tokens)]
            answers.append(types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=tokens, logprobs=said)]))
        return answers


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeLLM]:
    module = types.ModuleType("vllm")
    module.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    module.LLM, module.SamplingParams = FakeLLM, lambda **wishes: types.SimpleNamespace(**wishes)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(FakeLLM, "made", [])
    return FakeLLM


def test_weights_are_handed_over_before_every_step_and_the_engine_is_made_once(fake: type[FakeLLM]) -> None:
    model, stream = tiny().float(), Rollout(batch_size=4, max_new_tokens=3, engine="vllm", engine_options={"gpu_memory_utilization": 0.3})
    source = stream.open(uneven(), seed=1)
    source.attach(model, None)
    assert fake.made == []
    for step in range(2):
        with torch.no_grad():
            model.lm_head.weight.add_(1.0)
        (batch,) = source.group(step)
        (engine,) = fake.made
        assert engine.calls == ["take_weights", "reset_prefix_cache", "generate"] * (step + 1)
        assert engine.worker.loaded.keys() == plain_state(model).keys()
        assert all(torch.equal(engine.worker.loaded[name], tensor) for name, tensor in plain_state(model).items())
    assert engine.settings["gpu_memory_utilization"] == 0.3
    assert engine.settings["load_format"] == "dummy"
    assert engine.settings["logprobs_mode"] == "processed_logprobs"
    assert engine.settings["worker_extension_cls"] == "kdrun.student.vllm_engine.Weights"
    assert engine.settings["dtype"] == "float32"
    assert '"llama"' in engine.config
    assert '"LlamaForCausalLM"' in engine.config
    assert [row[2] for row in rows([batch])] == [[5], [5, 6], [5, 6, 7], [5]]
    scored = batch.targets >= 0
    assert [batch.extra[BEHAVIOUR][i][scored[i]].tolist() for i in range(4)] == [[-0.25], [-0.25, -0.5], [-0.25, -0.5, -0.75], [-0.25]]
    assert source.report()["generated_tokens"] == 14


def test_what_is_wished_is_what_the_source_says(fake: type[FakeLLM]) -> None:
    writer, model = writer_of("vllm", {}), tiny()
    assert isinstance(writer, VllmWriter)
    how = Sampling(3, temperature=0.7, top_p=0.9, top_k=6, stop=(6,))
    told = writer(model, PROMPTS, how, 5, IDS, 0, CPU)
    (engine,) = fake.made
    assert [asked["prompt_token_ids"] for asked in engine.prompts] == [prompt.tolist() for prompt in PROMPTS]
    for wish in engine.wishes:
        assert (wish.max_tokens, wish.temperature, wish.top_p, wish.top_k) == (3, 0.7, 0.9, 6)
        assert (wish.stop_token_ids, wish.ignore_eos, wish.logprobs, wish.detokenize) == ([6], True, 0, False)
        assert wish.logit_bias == dict.fromkeys(range(V, PADDED), NEVER)
    seeds = [wish.seed for wish in engine.wishes]
    assert len(set(seeds)) == 4
    assert max(seeds) < 2**31
    writer(model, PROMPTS, how, 5, IDS, 0, CPU)
    assert [wish.seed for wish in engine.wishes] == seeds
    writer(model, PROMPTS, how, 6, IDS, 0, CPU)
    assert [wish.seed for wish in engine.wishes] != seeds
    # What comes after the stop token is taken away.
    assert told.tokens.tolist() == [[5, 0], [5, 6], [5, 6], [5, 0]]
    assert told.lengths.tolist() == [1, 2, 2, 1]
    assert told.log_probs.tolist() == [[-0.25, 0], [-0.25, -0.5], [-0.25, -0.5], [-0.25, 0]]
    writer(model, PROMPTS, Sampling(3), 5, IDS, 0, CPU)
    assert engine.wishes[0].top_k == -1
    assert (writer(model, PROMPTS, Sampling(3, temperature=0), 5, IDS, 0, CPU).log_probs == 0).all()


def test_merged_weights_of_adapters_are_handed_over(fake: type[FakeLLM]) -> None:
    pytest.importorskip("peft")
    from kdrun.student.language import causal_lm
    from tests.dataset.texts import LLAMA

    model = causal_lm(V, config=LLAMA, lora={"r": 2, "target_modules": ["q_proj"]})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(1.0)
    writer_of("vllm", {})(model, PROMPTS, Sampling(2), 5, IDS, 0, CPU)
    loaded = fake.made[0].worker.loaded
    assert loaded.keys() == tiny().state_dict().keys()
    name = "model.layers.0.self_attn.q_proj"
    assert not torch.equal(loaded[f"{name}.weight"], model.state_dict()[f"{name}.base_layer.weight"])


def test_without_vllm_it_is_refused_in_one_line(
    words: list[str], kdrun: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdrun.student.vllm_engine.importlib.util.find_spec", lambda name: None)
    refused = kdrun("train", *words, "source.engine=vllm", f"run.dir={tmp_path / 'run'}")
    assert refused.code == 2, refused.err
    assert "\nsource.engine: " in refused.err
    assert "pip install vllm on a machine with a GPU" in refused.err
    assert "Traceback" not in refused.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("on_cpu", "gpu", "expected"), [(False, False, ["this vllm needs a GPU"]), (True, False, []), (False, True, []), (True, True, [])]
)
def test_a_vllm_that_cannot_run_here_is_refused(
    fake: type[FakeLLM], monkeypatch: pytest.MonkeyPatch, on_cpu: bool, gpu: bool, expected: list[str]
) -> None:
    """vLLM itself says what it was built for."""
    platforms = types.ModuleType("vllm.platforms")
    platforms.current_platform = types.SimpleNamespace(is_cpu=lambda: on_cpu)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    found = [problem.what for problem in engine_problems("vllm", tiny())]
    assert [what.partition(",")[0] for what in found] == expected
    monkeypatch.setitem(sys.modules, "vllm.platforms", None)  # importing it fails
    assert ["cannot be imported" in problem.what for problem in engine_problems("vllm", tiny())] == ([] if gpu else [True])


def test_engines_that_cannot_write_for_a_network_are_refused(fake: type[FakeLLM]) -> None:
    assert engine_problems("vllm", tiny()) == []
    for engine in ("transformers", "vllm"):
        assert ["models of transformers" in problem.what for problem in engine_problems(engine, policy())] == [True]  # type: ignore[arg-type]
    assert engine_problems("own", policy()) == []
    with pytest.raises(Refused, match=r"source\.engine"):
        Rollout(batch_size=4, engine="vllm").open(uneven(), seed=1, rank=0, world=2)


@pytest.mark.parametrize("values", [{"engine": "mine"}, {"engine": "vllm", "writer": "mixture"}, {"engine_options": {"seed": 1}}])
def test_values_out_of_range_are_refused_by_name(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(values))}="):
        Rollout(**values)
