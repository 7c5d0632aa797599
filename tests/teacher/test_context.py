"""A teacher that reads a prompt of its own: every token of the student's is scored by the position that comes before it there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from kdrun.dataset.tokens import POSITIONS, Ragged, Sample, TokenSplit
from kdrun.engine.build import start_from
from kdrun.student.sum_policy import SumPolicy
from kdrun.student.taps import Tapped, ask
from kdrun.student.weights import save_student
from kdrun.teacher.context import INPUTS, SHIFT, beside_student, in_context
from kdrun.teacher.follower import CurrentTeacher, EmaTeacher
from kdrun.teacher.live import LiveTeacher
from kdrun.types import Batch, ModelSpec, Needs, Progress
from tests.conftest import Outcome
from tests.dataset.texts import V, tiny
from tests.engine.running import Notes, parameters, run, staged, training_lines, weights
from tests.objective.spoken import Step, ready
from tests.objective.toy import make

SPEC = ModelSpec(V, (16,), {}, (16, V))
LOGITS = Needs(teacher_logits=True)
# (the student's prompt, the teacher's, the completion): longer, as long, shorter
ROWS = [
    ([1, 2], [1, 5, 6, 7, 2], [3, 4, 5]),
    ([8], [9], [1, 2, 3, 4, 6]),
    ([2, 3, 4, 5], [7, 7], [9]),
    ([6, 6], [1, 2, 3, 4, 5, 6, 7, 8], [2, 2]),
]


def laid_out(rows: list[tuple[list[int], list[int], list[int]]], pad: int = 0) -> Batch:
    """A batch as a rollout brings it, put together here by hand."""

    def stacked(which: int) -> Tensor:
        made = [[Sample([*row[which], *row[2]], [False] * len(row[which]) + [True] * len(row[2]))] for row in rows]
        split = TokenSplit.of(Ragged.of(made, pad), torch.arange(len(rows)))
        every = torch.arange(len(rows))
        return split.storage.fetch(split.request(every, every, 0, False), torch.device("cpu"))

    own, theirs, every = stacked(0), stacked(1), torch.arange(len(rows))
    shift = torch.tensor([len(b) - len(a) for a, b, _ in rows])
    return Batch(own[:, 0], own[:, 1], every, every, {POSITIONS: own[:, 2], INPUTS: theirs[:, 0], SHIFT: shift})


def live(network: nn.Module) -> LiveTeacher:
    teacher = LiveTeacher(Tapped(network, {}), SPEC)
    teacher.privileged = True
    return teacher


def scored_by(network: Any, prompt: list[int], text: list[int]) -> Tensor:
    """Logits [L, V] of position len(prompt) - 1 + n for token n, of the plain network on one plain row."""
    with torch.no_grad():
        return network(torch.tensor([prompt + text])).logits[0, len(prompt) - 1 : -1, :V]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("chosen", [[0], [1], [2], [3], [0, 1, 2, 3], [3, 0]])
def test_token_n_is_scored_by_position_prompt_minus_one_plus_n(kind: str, chosen: list[int]) -> None:
    network, rows = tiny(kind), [ROWS[i] for i in chosen]
    batch = laid_out(rows)
    said = live(network).signal(batch, LOGITS).logits
    assert said is not None
    assert said.shape == (len(rows), batch.inputs.shape[1], V)
    for i, (own, theirs, text) in enumerate(rows):
        at = said[i, len(own) - 1 : len(own) - 1 + len(text)]
        torch.testing.assert_close(at, scored_by(network, theirs, text).to(at.dtype), rtol=1e-6, atol=1e-6)
        assert (batch.targets[i] >= 0).nonzero()[:, 0].tolist() == list(range(len(own) - 1, len(own) - 1 + len(text)))


def test_what_is_laid_beside_is_by_row() -> None:
    batch = laid_out(ROWS)
    width = batch.extra[INPUTS].shape[1]
    place = torch.arange(width).expand(4, width)
    beside = beside_student(place[..., None].double(), batch)[..., 0]
    for i, (own, theirs, text) in enumerate(ROWS):
        assert beside[i, len(own) - 1 : len(own) - 1 + len(text)].tolist() == [len(theirs) - 1 + n for n in range(len(text))]
    assert beside_student(place.double(), batch).shape == batch.inputs.shape  # rows without features too


def test_the_teacher_counts_positions_of_its_own_prompt() -> None:
    read = in_context(laid_out(ROWS))
    assert read.inputs[3].tolist() == [*ROWS[3][1], *ROWS[3][2]][:-1]
    assert torch.equal(read.extra[POSITIONS], torch.arange(read.inputs.shape[1]).expand_as(read.inputs))


def test_a_batch_without_such_prompts_is_read_as_it_is() -> None:
    batch = laid_out(ROWS)
    plain = batch._replace(extra={POSITIONS: batch.extra[POSITIONS]})
    assert in_context(plain) is plain
    network = tiny()
    said = live(network).signal(plain, LOGITS).logits
    torch.testing.assert_close(said, ask(network, plain).detach())


@pytest.mark.parametrize("projection", ["whole", "chunked"])
@pytest.mark.parametrize("other", [0, 1, 2])
def test_padding_an_unrelated_prompt_changes_no_loss(projection: str, other: int) -> None:
    """A row beside another with a much longer prompt, for the student or the teacher, or other padding."""
    student, teacher = tiny(), tiny("gpt2")
    longer = [([1] * 20, [2] * 3, [4]), ([3], [2] * 30, [4]), ([3], [4], [5] * 25)][other]
    objective = opsd(student, teacher, projection)
    alone = PrivilegedStep(objective, student, teacher, laid_out([ROWS[0]]))
    for batch in (laid_out([ROWS[0], longer]), laid_out([longer, ROWS[0]]), laid_out([ROWS[0], longer], pad=V - 1)):
        silent = torch.tensor([i for i in range(2) if int(batch.extra[SHIFT][i]) == len(longer[1]) - len(longer[0])])
        batch.targets[silent] = -1  # it is there, and nothing of it is scored
        beside = PrivilegedStep(objective, student, teacher, batch)
        torch.testing.assert_close(beside.loss, alone.loss, rtol=1e-10, atol=1e-12)
        for mine, expected in zip(beside.gradient, alone.gradient, strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-8, atol=1e-10)


def opsd(student: nn.Module, teacher: nn.Module | None, projection: str = "whole", **values: Any) -> Any:
    """The objective with its teacher told to be privileged, as the run's configuration does."""
    objective = make("opsd", projection=projection, **{"cap": 0.3, **values})
    source = {"share": 1.0, "temperature": 1.0, "writer": "student"}
    tree = {"teacher": {"prompt": "privileged"}, "hardware": {}, "source": source}
    assert objective.problems(tree, student, teacher) == []
    started = ready("opsd", student, teacher, projection=projection, **{"cap": 0.3, **values})
    started._privileged = objective._privileged
    return started


class PrivilegedStep(Step):
    """A step whose teacher speaks as the loop's does."""

    def __init__(self, objective: Any, student: nn.Module, teacher: nn.Module, batch: Batch) -> None:
        speaker = live(teacher)
        counts = {unit: max(1, int(n)) for unit, n in objective.count(batch).items()}
        terms, _ = objective.compute(Tapped(student, {}), batch, speaker.signal(batch, objective.needs()), "student", nn.ModuleDict(), None)
        self.loss = terms["kd"].sum / counts[terms["kd"].unit]
        found = torch.autograd.grad(self.loss, list(student.parameters()), allow_unused=True)
        self.gradient = [torch.zeros_like(p) if g is None else g for p, g in zip(student.parameters(), found, strict=True)]


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "sampled_token"])
@pytest.mark.parametrize("pair", [("llama", "llama"), ("gpt2", "llama")])
def test_chunks_give_what_the_whole_gives_with_a_privileged_teacher(divergence: str, pair: tuple[str, str]) -> None:
    student, teacher = tiny(pair[0]), tiny(pair[1], seed=3)
    batch = laid_out(ROWS)
    whole, chunked = (
        PrivilegedStep(opsd(student, teacher, kind, divergence=divergence), student, teacher, batch) for kind in ("whole", "chunked")
    )
    assert opsd(student, teacher, "chunked", divergence=divergence).needs() == Needs()  # no logits [B, T, V] are asked for
    torch.testing.assert_close(chunked.loss, whole.loss, rtol=1e-10, atol=1e-12)
    for mine, expected in zip(chunked.gradient, whole.gradient, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-8, atol=1e-10)
    plain = PrivilegedStep(opsd(student, teacher, divergence=divergence), student, teacher, laid_out([(a, a, t) for a, _, t in ROWS]))
    assert abs(plain.loss - whole.loss) > 1e-3  # the privileged prompt counts


def test_the_teacher_gets_no_gradient() -> None:
    student, teacher = tiny(), tiny("gpt2")
    said = live(teacher).signal(laid_out(ROWS), LOGITS).logits
    assert said is not None
    assert not said.requires_grad
    PrivilegedStep(opsd(student, teacher, "chunked"), student, teacher, laid_out(ROWS))
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


# -- whose weights --------------------------------------------------------------------------------------------------------


def followed(kind: type, **values: Any) -> tuple[Any, nn.Module, list[dict[str, Tensor]]]:
    """A teacher after 4 steps of a student that stands still from the first on; (teacher, student, the teacher's weights in turn)."""
    torch.manual_seed(0)
    student = SumPolicy(V)
    teacher = kind(student, ModelSpec(V, (16,), {}, (16, V)), **values)
    seen = [parameters(teacher.network)]
    with torch.no_grad():
        for p in student.parameters():
            p.add_(torch.randn_like(p))
    for step in range(4):
        teacher.after_step(student, Progress(step, 10, 5))
        seen.append(parameters(teacher.network))
    return teacher, student, seen


def test_an_average_towards_a_student_that_stands_still_is_geometric() -> None:
    """s + d^k (t0 - s) after k updates."""
    _, student, seen = followed(EmaTeacher, decay=0.9)
    target = parameters(student)
    for k, told in enumerate(seen):
        for name, value in told.items():
            expected = target[name] + 0.9**k * (seen[0][name] - target[name])
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


def test_a_current_teacher_is_the_student_as_it_is() -> None:
    teacher, student, seen = followed(CurrentTeacher)
    target = parameters(student)
    assert all(torch.equal(seen[1][name], value) for name, value in target.items())
    assert not all(torch.equal(seen[0][name], value) for name, value in target.items())
    assert all(not p.requires_grad for p in teacher.network.parameters())
    with torch.no_grad():
        next(student.parameters()).zero_()
    assert not torch.equal(next(teacher.network.parameters()), next(student.parameters()))  # a copy: it moves between steps alone


@pytest.mark.parametrize("kind", [CurrentTeacher, EmaTeacher])
def test_teachers_that_follow_read_their_own_prompt_too(kind: type) -> None:
    student = tiny()
    follower = kind(student, SPEC)
    follower.privileged = True
    batch = laid_out(ROWS)
    said, expected = follower.signal(batch, LOGITS).logits, live(tiny()).signal(batch, LOGITS).logits
    assert torch.equal(said, expected)
    follower.privileged = False
    assert not torch.equal(follower.signal(batch, LOGITS).logits, expected)


# -- runs -----------------------------------------------------------------------------------------------------------------

SUMS = [
    "dataset=sums", "dataset.n_train=24", "dataset.n_test=8", "student=sum_policy", "objective=opsd", "objective.cap=null",
    "source=rollout", "source.batch_size=8", "source.max_new_tokens=6", "evaluation=generation", "evaluation.max_new_tokens=6",
    "optim=adamw", "optim.lr=0.01", "optim.epochs=1", "hardware=cpu", "hardware.threads=1", "run.log_every=1",
]  # fmt: skip


TOPICS = ["dataset=topics", "~dataset", "~evaluation", "student=window_lm", "teacher=window_lm", "evaluation=language"]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(7)
    network = SumPolicy(13)
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(2)
    save_student(network, tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


def test_teacher_and_student_that_are_one_and_read_one_prompt_learn_nothing(base: Path, tmp_path: Path) -> None:
    words = [*SUMS, "teacher=current", "teacher.prompt=own", f"plan.start_from={base}", "optim.weight_decay=0", "objective.cap=0.5"]
    run(words, tmp_path / "run")
    for line in training_lines(tmp_path / "run"):
        assert abs(line["loss"]) < 1e-6
        assert line["grad_norm"] < 1e-6
    run([*words, "teacher.prompt=privileged"], tmp_path / "aided")
    assert training_lines(tmp_path / "aided")[0]["grad_norm"] > 1e-2


@pytest.mark.parametrize("checkpoint", [True, False])
def test_the_student_begins_as_its_teacher(checkpoint: bool, base: Path, tmp_path: Path) -> None:
    fit = "{objective: {_target_: kdrun.objective.sft.SFT}, source: {_target_: kdrun.source.loader.Loader, batch_size: 8}}"
    given = [f"teacher.checkpoint={base}"] if checkpoint else [f"teacher.fit={fit}"]
    words = [*SUMS, "teacher=sum_policy", "teacher.prompt=privileged", "teacher.seed=4", *given, "plan.start_from=teacher"]
    run([*words, "optim.lr=1e-12", "optim.weight_decay=0"], tmp_path / "run")
    file = base if checkpoint else next((tmp_path / "root" / "teachers").glob("*/student.safetensors"))
    begun = load_file(file)
    for name, tensor in weights(tmp_path / "run").items():
        torch.testing.assert_close(tensor, begun[name], rtol=0, atol=1e-9)


def test_a_fixed_teacher_does_not_move_though_the_student_began_as_it(base: Path, tmp_path: Path) -> None:
    words = [*SUMS, "teacher=sum_policy", "teacher.prompt=privileged", f"teacher.checkpoint={base}", "plan.start_from=teacher"]
    summary = run(words, tmp_path / "run")  # law 6 is checked within
    assert summary["teacher"]["reward"] >= 0
    moved = [not torch.equal(tensor, load_file(base)[name]) for name, tensor in weights(tmp_path / "run").items()]
    assert any(moved)


@pytest.mark.parametrize("teacher", [["teacher=ema", "teacher.prompt=privileged"], ["teacher=current"]])
def test_a_teacher_that_follows_begins_with_the_weights_of_plan_start_from(teacher: list[str], base: Path, tmp_path: Path) -> None:
    stage = staged([*SUMS, *teacher, f"plan.start_from={base}"], tmp_path / "run", Notes())
    built = start_from(stage.built)
    begun = load_file(base)
    assert isinstance(built.teacher, (EmaTeacher, CurrentTeacher))
    assert built.teacher.privileged
    for network in (built.network, built.teacher.network):
        assert all(torch.equal(tensor, begun[name]) for name, tensor in parameters(network).items())


@pytest.mark.parametrize(
    ("change", "key", "told"),
    [
        (["source=loader", "~source.max_new_tokens"], "teacher.prompt", "source=rollout"),
        (["source.share=0.5"], "teacher.prompt", "source.share=1"),
        (TOPICS, "teacher.prompt", "teacher.prompt=own"),
        (["teacher=sum_policy", "teacher.hidden=64", "plan.start_from=teacher"], "plan.start_from", "the same student as teacher"),
        (["teacher=current", "plan.start_from=teacher"], "plan.start_from", "a live teacher"),
        (["hardware.wrap=fsdp2"], "hardware.wrap", "hardware.wrap=ddp"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_is_spent(
    change: list[str], key: str, told: str, kdrun: Callable[..., Outcome], tmp_path: Path
) -> None:
    drop = tuple(word[1:] for word in change if word.startswith("~"))
    words = [word for word in [*SUMS, "teacher=sum_policy"] if not drop or not word.startswith(drop)]
    words += [word for word in change if not word.startswith("~")]
    refused = kdrun("train", *words, "teacher.prompt=privileged", f"run.dir={tmp_path / 'run'}", f"run.root={tmp_path / 'root'}")
    assert refused.code == 2, refused.err
    assert f"\n{key}: " in refused.err
    assert told in refused.err
    assert "Traceback" not in refused.err
    assert list(tmp_path.iterdir()) == []  # no teacher was trained either


def test_an_objective_that_does_not_listen_may_have_a_privileged_teacher_beside_it(kdrun: Callable[..., Outcome], tmp_path: Path) -> None:
    """The SFT arm of a comparison."""
    words = [word for word in SUMS if not word.startswith(("objective.cap", "source.max"))]
    words += ["objective=sft", "source=loader", "source.batch_size=8", "teacher=current", "run.max_steps=1"]
    done = kdrun("train", *words, f"run.dir={tmp_path / 'run'}")
    assert done.code == 0, done.err
