"""What holds for every objective of language models, and language-model KD's own numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdrun.engine.report import Reporter
from kdrun.errors import Refused
from kdrun.losses.chunked import SMALLEST_CHUNK
from kdrun.objective._language import CHUNKED_FROM
from kdrun.student.language import causal_lm
from kdrun.student.taps import Tapped, ask
from kdrun.student.window import WindowLM
from kdrun.types import Signal
from tests.conftest import Outcome
from tests.dataset.texts import LLAMA, MODELS, V, alone, batch_of, samples, tiny, uneven_run
from tests.engine.running import assert_same_run, assert_same_training, run, run_killed, training_lines
from tests.losses.test_chunked import LargestTensor
from tests.objective.spoken import SETTINGS, Said, Step, ready, scored
from tests.objective.toy import make

LENGTHS = [5, 9, 3, 7, 6]
ZT, ZS = torch.tensor([2.0, 1, 0, -1], dtype=torch.float64), torch.tensor([0, 1, 0.5, 0], dtype=torch.float64)
RUNS = {
    "sft": ["objective=sft", "teacher=none"],
    "lm_kd": ["objective=lm_kd", "objective.divergence=reverse_kl", "objective.ce_weight=0.5"],
    "lm_kd-chunked": ["objective=lm_kd", "objective.projection=chunked", "objective.ce_weight=0.5"],
    "lm_kd-seq_mean": ["objective=lm_kd", "objective.reduction=seq_mean"],
    "taid": ["objective=taid", "objective.alpha=0.3", "objective.beta=0.5"],
    "taid-chunked": ["objective=taid", "objective.alpha=0.3", "objective.projection=chunked"],
}


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdrun.engine.session.plot_curves", lambda folder: None)


@pytest.fixture
def uneven(tmp_path: Path) -> Callable[[str], list[str]]:
    """Overrides of a run by its name in RUNS."""

    def overrides(name: str) -> list[str]:
        base = uneven_run(tmp_path / "teacher.safetensors")
        if name == "sft":
            base = [word for word in base if not word.startswith("teacher")]
        return [*base, *RUNS[name]]

    return overrides


# -- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "value", "gradient"),
    [
        ({"divergence": "forward_kl"}, 0.623137, [-0.486854, 0.190050, 0.171803, 0.125001]),
        ({"divergence": "reverse_kl"}, 0.561475, [-0.309787, 0.011777, 0.136617, 0.161392]),
        ({"divergence": "jsd"}, 0.137984, [-0.084859, 0.022890, 0.033473, 0.028496]),
        ({"divergence": "jsd", "beta": 0.1}, 0.053922, None),
        ({"divergence": "jsd", "beta": 0.9}, 0.049753, None),
        ({"divergence": "jsd", "beta": 0.0}, 0.623137, None),
        ({"divergence": "jsd", "beta": 1.0}, 0.561475, None),
        ({"divergence": "tv"}, 0.486854, [-0.132392, 0.067054, 0.040670, 0.024668]),
        ({"divergence": "skew_forward"}, 0.468700, [-0.319747, 0.110251, 0.118201, 0.091295]),
        ({"divergence": "skew_reverse"}, 0.442569, [-0.252280, 0.041619, 0.107035, 0.103625]),
        ({"divergence": "adaptive"}, 0.592306, None),
        ({"divergence": "adaptive", "mu": 0.9}, 0.604341, None),
        ({"ce_weight": 1.0, "kd_weight": 0.0}, 1.851129, [-0.842940, 0.426933, 0.258948, 0.157060]),
    ],
)
def test_value_and_gradient_of_the_example(settings: dict[str, Any], value: float, gradient: list[float] | None) -> None:
    student, teacher = Said(ZS.view(1, 1, 4).clone()), Said(ZT.view(1, 1, 4).clone())
    step = Step(ready("lm_kd", student, teacher, classes=4, **settings), student, teacher, [scored((1, 1))])
    assert step.loss.item() == pytest.approx(value, abs=1e-6)
    if gradient is not None:
        assert step.gradient[0].flatten().tolist() == pytest.approx(gradient, abs=1e-6)


def test_temperature_divides_both_logits_and_multiplies_nothing() -> None:
    student, teacher, batch = Said(ZS.view(1, 1, 4).clone()), Said(ZT.view(1, 1, 4).clone()), scored((1, 1))
    halved = Said(ZS.view(1, 1, 4) / 2), Said(ZT.view(1, 1, 4) / 2)
    one = Step(ready("lm_kd", student, teacher, classes=4, temperature=2.0), student, teacher, [batch])
    other = Step(ready("lm_kd", *halved, classes=4), *halved, [batch])
    torch.testing.assert_close(one.loss, other.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(one.gradient[0], other.gradient[0] / 2, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("reduction", "expected"), [("token_mean", 1.4), ("seq_mean", 2.0), ("seq_sum", 3.5), ("dr", 0.875)])
def test_each_reduction_is_the_mean_it_is_named_for(reduction: str, expected: float) -> None:
    """Losses [[1, 1, 1, 1], [3]]: logits whose cross-entropy is 1 and 3."""
    z = torch.zeros(2, 4, 2, dtype=torch.float64)
    z[0, :, 1], z[1, 0, 1] = torch.tensor(1.0).expm1().log(), torch.tensor(3.0).expm1().log()
    batch = scored((2, 4), torch.tensor([[0, 0, 0, 0], [0, -1, -1, -1]]))
    student = Said(z)
    values = {"reduction": reduction} | ({"max_length": 4} if reduction == "dr" else {})
    step = Step(ready("sft", student, None, classes=2, **values), student, None, [batch])
    assert step.loss.item() == pytest.approx(expected, abs=1e-6)


# -- laws of every objective ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("reduction", ["token_mean", "seq_mean"])
def test_accumulation_does_not_change_loss_gradients_or_what_is_kept(name: str, reduction: str) -> None:
    student, teacher, rows = tiny("llama"), tiny("gpt2", seed=7), alone(samples(LENGTHS))
    objective = ready(name, student, teacher, reduction=reduction)
    whole = Step(objective, student, teacher, [batch_of(rows)])
    cut = Step(objective, student, teacher, [batch_of(rows, index=torch.tensor(i)) for i in ([0], [1, 2, 3], [4])])
    torch.testing.assert_close(cut.loss, whole.loss, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(cut.gradient, whole.gradient, rtol=1e-5, atol=1e-7)
    assert max(g.norm() for g in whole.gradient) > 1e-3
    torch.testing.assert_close(cut.kept, whole.kept, rtol=1e-6, atol=1e-9)


def test_packed_rows_teach_what_their_sequences_do_alone() -> None:
    student, teacher, sequences = tiny("llama"), tiny("gpt2", seed=7), samples(LENGTHS)
    for projection in ("whole", "chunked"):
        objective = ready("reverse_kl", student, teacher, projection=projection)
        packed = Step(objective, student, teacher, [batch_of([sequences[:3], sequences[3:]])])
        each = Step(objective, student, teacher, [batch_of(alone(sequences))])
        torch.testing.assert_close(packed.loss, each.loss, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(packed.gradient, each.gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("kind", MODELS)  # llama has a head of its own; gpt2's is its embedding, which gets both contributions
def test_chunks_give_the_value_and_gradients_of_the_whole(name: str, kind: str) -> None:
    student, teacher = tiny(kind), tiny({"llama": "gpt2", "gpt2": "llama"}[kind], seed=7)
    batch = batch_of(alone(samples(LENGTHS)))
    whole, chunked = (
        Step(ready(name, student, teacher, projection=projection), student, teacher, [batch]) for projection in ("whole", "chunked")
    )
    torch.testing.assert_close(chunked.loss, whole.loss, rtol=1e-9, atol=1e-12)
    assert chunked.values == pytest.approx(whole.values, rel=1e-9)
    torch.testing.assert_close(chunked.gradient, whole.gradient, rtol=1e-7, atol=1e-9)
    assert max(g.norm() for g in whole.gradient) > 1e-3
    torch.testing.assert_close(chunked.kept, whole.kept, rtol=1e-6, atol=1e-7, check_dtype=False)


@pytest.mark.parametrize("name", SETTINGS)
def test_in_chunks_no_tensor_is_as_large_as_all_logits(name: str) -> None:
    words, config = 1024, {**LLAMA, "num_hidden_layers": 1}
    torch.manual_seed(0)
    student, teacher = (causal_lm(words, config=config | {"vocab_size": words}) for _ in range(2))
    batch = batch_of(alone(samples([17] * 24)))
    largest = {}
    for projection in ("whole", "chunked"):
        objective = ready(name, student, teacher, projection=projection, classes=words)
        with LargestTensor() as seen:
            Step(objective, student, teacher, [batch])
        largest[projection] = seen.elements
    tokens = int((batch.targets >= 0).sum())
    assert largest["whole"] >= tokens * words
    assert largest["chunked"] <= words * max(LLAMA["hidden_size"] * 2, SMALLEST_CHUNK)  # of the head, its gradient or a chunk at most


@pytest.mark.parametrize("name", SETTINGS)
def test_chunks_do_not_ask_the_teacher_for_its_logits(name: str) -> None:
    student, teacher = tiny("llama"), tiny("gpt2", seed=7)
    assert ready(name, student, teacher, projection="whole").needs().teacher_logits == (name != "sft")
    assert not ready(name, student, teacher, projection="chunked").needs().teacher_logits
    assert make("lm_kd", projection="chunked").needs().teacher_logits  # before the run: there must be a teacher


@pytest.mark.parametrize(("projection", "refused"), [("chunked", True), ("auto", False)])
def test_chunks_that_cannot_be_made_are_refused_where_they_are_asked_for(projection: str, refused: bool) -> None:
    """A teacher without a network of its own has no head to apply; auto makes the logits at once."""
    objective = make("lm_kd", projection=projection)
    tree = {"teacher": {"kind": "truth"}, "hardware": {"wrap": "ddp"}}
    assert [p.key for p in objective.problems(tree, tiny("llama"), None)] == ["objective.projection"] * refused
    assert objective.problems(tree, tiny("llama"), tiny("gpt2")) == []


def test_large_vocabularies_are_chunked_by_themselves_where_heads_are_plain() -> None:
    student, teacher = tiny("llama"), tiny("gpt2", seed=7)
    scaled = causal_lm(V, config={**LLAMA, "model_type": "granite", "logits_scaling": 2.0}).double()
    for classes, networks, asked in (
        (CHUNKED_FROM, (student, teacher), False),
        (CHUNKED_FROM - 1, (student, teacher), True),
        (CHUNKED_FROM, (scaled, teacher), True),
        (CHUNKED_FROM, (student, scaled), True),
        (CHUNKED_FROM, (student, None), True),  # what is not a network can only be asked for logits
    ):
        assert ready("forward_kl", *networks, classes=classes).needs().teacher_logits is asked


def test_a_teacher_that_scales_its_logits_is_heard_as_it_speaks() -> None:
    student, batch = tiny("llama"), batch_of(alone(samples(LENGTHS)))
    torch.manual_seed(1)
    scaled = causal_lm(V, config={**LLAMA, "model_type": "granite", "logits_scaling": 4.0}).double()
    found = Step(ready("forward_kl", student, scaled, projection="chunked"), student, scaled, [batch])
    z, said = ask(student, batch).detach(), ask(scaled, batch)
    m = batch.targets >= 0
    p, q = said[m].log_softmax(-1), z[m].log_softmax(-1)
    assert found.loss.item() == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-6)


@pytest.mark.parametrize("name", SETTINGS)
def test_padding_of_a_teacher_s_matrix_takes_no_mass(name: str) -> None:
    """Rows beyond the vocabulary are in neither softmax, whatever they hold."""
    student, teacher, batch = tiny("llama"), tiny("gpt2", seed=7), batch_of(alone(samples(LENGTHS)))
    for projection in ("whole", "chunked"):
        values = []
        for _ in range(2):
            values.append(Step(ready(name, student, teacher, projection=projection), student, teacher, [batch]).loss.item())
            with torch.no_grad():
                teacher.lm_head.weight[V:] = 1e3
                student.lm_head.weight[V:] = 1e3
        assert values[0] == values[1]


@pytest.mark.parametrize("name", SETTINGS)
def test_teacher_gets_no_gradient_and_stays_as_it_is(name: str) -> None:
    student, teacher, batch = tiny("llama"), tiny("gpt2", seed=7), batch_of(alone(samples(LENGTHS)))
    before = [p.detach().clone() for p in teacher.parameters()]
    for projection in ("whole", "chunked"):
        objective = ready(name, student, teacher, projection=projection)
        signal = Signal(ask(teacher, batch), {})
        terms, _ = objective.compute(Tapped(student, {}), batch, signal, "student", nn.ModuleDict(), None)
        torch.stack([term.sum for term in terms.values()]).sum().backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(p, b) for p, b in zip(teacher.parameters(), before, strict=True))


def beyond(objective: Any, key: str, z: Tensor, said: Tensor, dtype: torch.dtype) -> Tensor:
    """Where the exact gradient is larger than the largest number: reverse KL's grows with the logits, divided by the temperature."""
    loss, kinds = objective.row_losses()[key]
    wide = z.to(dtype).double().requires_grad_()
    others = [said.to(dtype).double() if kind == "teacher" else torch.zeros(z.shape[:-1], dtype=torch.int64) for kind in kinds]
    (exact,) = torch.autograd.grad(loss(wide, *others).sum(), wide)
    return exact.abs() > torch.finfo(dtype).max


EXTREMES = ("huge", "both mask a token", "the teacher masks a token", "constant")


@pytest.mark.parametrize("temperature", [0.05, 1.0, 20.0, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", EXTREMES)
def test_loss_and_gradient_are_finite_at_extremes(temperature: float | None, dtype: torch.dtype, case: str) -> None:
    g = torch.Generator().manual_seed(0)
    z, said = (100 * torch.randn(2, 3, 5, generator=g) for _ in range(2))
    if case == "huge":
        z, said = 1e4 * z.sign(), 1e4 * said.sign()
    elif case == "constant":
        z, said = torch.zeros_like(z), torch.zeros_like(said)
    else:
        said[..., 4] = -torch.inf
        z[..., 4] = -torch.inf if case.startswith("both") else z[..., 4]
    student, batch = Said(z.to(dtype)), scored((2, 3))
    names = [name for name in SETTINGS if (SETTINGS[name][0] == "lm_kd") == (temperature is not None)]
    for name in names:
        objective = ready(name, student, None, classes=5, **({} if temperature is None else {"temperature": temperature}))
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            terms, _ = objective.compute(Tapped(student, {}), batch, Signal(said.to(dtype), {}), "student", nn.ModuleDict(), None)
        for key, term in terms.items():
            assert term.sum.dtype == torch.float32, (name, key)
            assert term.sum.isfinite(), (name, key)
            (slope,) = torch.autograd.grad(term.sum, student.logits, retain_graph=True)
            assert (slope.isfinite() | beyond(objective, key, z, said, dtype)).all(), (name, key)


@pytest.mark.parametrize("name", ["sft", "jsd", "adaptive", "taid+ce"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_it_compiles_without_graph_breaks(name: str) -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    student, teacher, batch = WindowLM(V, 3, 4), WindowLM(V, 3, 6), batch_of(alone(samples(LENGTHS)))
    objective, signal = ready(name, student, teacher), Signal(ask(teacher, batch).detach(), {})
    tapped = Tapped(student, {})

    def values() -> dict[str, Tensor]:
        return {key: term.sum for key, term in objective.compute(tapped, batch, signal, "student", nn.ModuleDict(), None)[0].items()}

    torch.testing.assert_close(torch.compile(values, backend="aot_eager", fullgraph=True)(), values())


def test_nothing_to_learn_is_refused() -> None:
    for name in ("lm_kd", "taid"):
        with pytest.raises(ValueError, match="nothing is learned"):
            make(name, ce_weight=0.0, kd_weight=0.0)


@pytest.mark.parametrize("name", ["lm_kd", "taid"])
def test_without_weight_the_teacher_is_not_asked(name: str) -> None:
    student, batch = tiny("llama"), batch_of(alone(samples(LENGTHS)))
    objective = ready(name, student, None, ce_weight=1.0, kd_weight=0.0)
    plain = Step(ready("sft", student, None), student, None, [batch])
    found = Step(objective, student, None, [batch])
    assert not objective.needs().teacher_logits
    assert found.values == plain.values
    assert all(torch.equal(a, b) for a, b in zip(found.gradient, plain.gradient, strict=True))


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"divergence": "kl"}, "legal values forward_kl, reverse_kl"),
        ({"projection": "dense"}, "legal values auto, whole, chunked"),
        ({"reduction": "mean"}, "legal values token_mean, seq_mean, seq_sum, dr"),
        ({"reduction": "dr"}, "max_length=None: reduction dr needs a length"),
        ({"max_length": 5}, "max_length=5: reduction dr needs a length, and no other has one"),
    ],
)
def test_an_unknown_value_names_the_legal_ones(values: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make("lm_kd", **values)


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
def test_accumulation_does_not_change_gradients(name: str, uneven: Callable[[str], list[str]], tmp_path: Path) -> None:
    base = uneven(name)
    run(base, tmp_path / "whole")
    run([*base, "hardware.micro_batch=[6,1,4]"], tmp_path / "cut")
    assert len(training_lines(tmp_path / "whole")) == 6
    assert_same_training(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize("name", ["lm_kd-chunked", "taid-chunked"])
def test_a_run_in_chunks_trains_what_the_whole_does(name: str, uneven: Callable[[str], list[str]], tmp_path: Path) -> None:
    run(uneven(name), tmp_path / "chunked")
    run([*uneven(name), "objective.projection=whole"], tmp_path / "whole")
    assert_same_training(tmp_path / "chunked", tmp_path / "whole")


@pytest.mark.parametrize("name", ["sft", "lm_kd-chunked"])
def test_a_run_killed_in_the_middle_is_resumed_to_the_same_bytes(
    name: str, uneven: Callable[[str], list[str]], tmp_path: Path, kdrun: Callable[..., Outcome]
) -> None:
    base = [*uneven(name), "run.checkpoint_every=0.6"]
    run(base, tmp_path / "unbroken")
    run_killed(base, tmp_path / "run", "step_done", 4)
    assert kdrun("resume", str(tmp_path / "run"), "--quiet").code == 0
    assert_same_run(tmp_path / "run", tmp_path / "unbroken")


TOPICS = ["dataset=topics", "dataset.n_train=40", "dataset.n_test=10", "source.batch_size=8", "hardware=cpu", "hardware.threads=1"]
GAUSSIANS = ["dataset=gaussians", "hardware=cpu", "hardware.threads=1"]
TEXT = ["evaluation=language", "student=window_lm"]


@pytest.mark.parametrize(
    ("overrides", "key", "remedy"),
    [
        pytest.param([*TOPICS, "evaluation=language", "student=mlp", "objective=sft"], "student", "student=causal_lm", id="mlp"),
        pytest.param([*TOPICS, *TEXT, "objective=lm_kd", "teacher=mlp"], "teacher", "teacher=causal_lm", id="teacher"),
        pytest.param([*TOPICS, *TEXT, "objective=kd", "teacher=window_lm"], "objective", "objective=lm_kd", id="kd"),
        pytest.param([*TOPICS, "student=window_lm", "objective=sft"], "evaluation", "evaluation=language", id="classification"),
        pytest.param([*TOPICS, *TEXT, "student.contexts=3", "objective=sft"], "student", "student.config.vocab_size=80", id="contexts"),
        pytest.param([*TOPICS, *TEXT, "objective=taid"], "teacher", "choose one", id="no-teacher"),
        pytest.param([*GAUSSIANS, "student=mlp", "objective=sft"], "objective", "objective=kd", id="sft"),
        pytest.param([*GAUSSIANS, "student=window_lm", "objective=ce"], "student", "dataset=topics", id="window"),
        pytest.param([*GAUSSIANS, "student=mlp", "objective=ce", "evaluation=language"], "evaluation", "classification", id="evaluation"),
        pytest.param(
            [*TOPICS, *TEXT, "objective=sft", "objective.projection=chunked", "hardware.wrap=fsdp2"],
            "objective.projection",
            "hardware.wrap=ddp",
            id="sharded",
        ),
    ],
)
def test_texts_and_what_is_not_for_them_are_refused_together(overrides: list[str], key: str, remedy: str, tmp_path: Path) -> None:
    with pytest.raises(Refused) as caught:
        run(overrides, tmp_path / "run", Reporter())
    found = {problem.key: problem.remedy for problem in caught.value.problems}
    assert remedy in found[key]
    assert not (tmp_path / "run").exists()


def test_the_known_truth_can_be_the_teacher(tmp_path: Path) -> None:
    """It has no head to be applied in parts: its logits are taken as they are, and parts of them are refused."""
    base = [*TOPICS, *TEXT, "objective=lm_kd", "teacher=truth", "optim.epochs=1", "run.log_every=1"]
    assert run(base, tmp_path / "whole")["test"]["agreement_truth"] > 0
    with pytest.raises(Refused, match=r"objective\.projection=whole"):
        run([*base, "objective.projection=chunked"], tmp_path / "asked")
