from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from omegaconf import OmegaConf
from scipy.stats import kendalltau
from torch import Tensor
from torchmetrics import Metric

from kdrun.errors import Refused, RunFailed
from kdrun.evaluation.classification import Classification, kl_to_teacher, pair_order_share
from kdrun.evaluation.metrics import kind

CONF = Path(__file__).parents[2] / "conf" / "evaluation" / "classification.yaml"


def measure(
    logits: Tensor, targets: Tensor, teacher: Tensor | None = None, sizes: list[int] | None = None, **fields: object
) -> dict[str, float]:
    meter = Classification(**fields).meter(logits.shape[1], "cpu")  # type: ignore[arg-type]
    sizes = sizes or [len(logits)]
    teachers = [None] * len(sizes) if teacher is None else teacher.split(sizes)
    for s, y, t in zip(logits.split(sizes), targets.split(sizes), teachers, strict=True):
        meter.update(s, y, t)
    return meter.compute()


def sample(rows: int = 64, classes: int = 10, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    student = 2 * torch.randn(rows, classes, generator=g)
    return student, torch.randint(classes, (rows,), generator=g), student + torch.randn(rows, classes, generator=g)


def log(*rows: list[float]) -> Tensor:
    return torch.tensor(rows).log()


def test_hand_computed_accuracy_and_nll() -> None:
    logits = log([0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [0.6, 0.3, 0.1], [0.25, 0.35, 0.4])
    found = measure(logits, torch.tensor([0, 2, 1, 0]), top_k=(1, 2))
    assert found["top1"] == 50.0
    assert found["top2"] == 75.0
    assert found["nll"] == pytest.approx(-(math.log(0.5) + math.log(0.7) + math.log(0.3) + math.log(0.25)) / 4, rel=1e-6)


def test_hand_computed_calibration_error() -> None:
    # Two right at confidence 0.9, and one right, one wrong at 0.6: 0.5 * |1 - 0.9| + 0.5 * |0.5 - 0.6|.
    found = measure(log([0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.6, 0.4]), torch.tensor([0, 0, 0, 1]))
    assert found["ece"] == pytest.approx(10.0, abs=1e-4)


def test_a_uniform_guess_is_calibrated_and_costs_log_classes() -> None:
    found = measure(torch.zeros(40, 4), torch.arange(40) % 4)
    assert found["ece"] == pytest.approx(0.0, abs=1e-5)
    assert found["nll"] == pytest.approx(math.log(4), rel=1e-6)


def test_hand_computed_fidelity_to_the_teacher() -> None:
    student, teacher = log([0.25, 0.75], [0.8, 0.2]), log([0.5, 0.5], [0.8, 0.2])
    found = measure(student, torch.tensor([1, 0]), teacher)
    assert found["kl_teacher"] == pytest.approx((0.5 * math.log(2) + 0.5 * math.log(2 / 3)) / 2, rel=1e-5)
    assert found["agreement"] == 50.0  # of equal logits the teacher's first counts
    assert found["teacher_top1"] == 50.0


def test_a_student_equal_to_its_teacher_agrees_in_everything() -> None:
    _, targets, teacher = sample()
    found = measure(teacher, targets, teacher, pair_order=True)
    assert found["agreement"] == 100.0
    assert found["kl_teacher"] == 0.0
    assert found["pair_order"] == 100.0
    assert found["teacher_top1"] == found["top1"]


def test_hand_computed_pair_order() -> None:
    targets = torch.tensor([0, 0, 3])
    student = torch.tensor([[9.0, 3, 2, 1], [0, 1, 1, 0], [1, 2, 3, 0]])
    teacher = torch.tensor([[0.0, 3, 1, 2], [0, 2, 1, 0], [3, 2, 1, 9]])
    assert pair_order_share(student, teacher, targets).tolist() == pytest.approx([2 / 3, 2.5 / 3, 0.0], abs=1e-15)


def test_pair_order_is_kendalls_tau_on_the_unit_interval() -> None:
    student, targets, teacher = sample(rows=16, classes=12)
    expected = []
    for s, t, y in zip(student, teacher, targets.tolist(), strict=True):
        keep = [c for c in range(12) if c != y]
        expected.append((1 + kendalltau(s[keep].numpy(), t[keep].numpy()).statistic) / 2)
    assert pair_order_share(student, teacher, targets).tolist() == pytest.approx(expected, abs=1e-12)


def test_pair_order_counts_two_excluded_classes_as_a_tie() -> None:
    student, teacher = torch.tensor([[9.0, 1, 2, 3]]), torch.tensor([[9.0, -math.inf, -math.inf, 1]])
    assert pair_order_share(student, teacher, torch.tensor([0])).tolist() == pytest.approx([2.5 / 3], abs=1e-15)


def test_pair_order_ignores_the_target_and_any_rising_transform() -> None:
    student, targets, teacher = sample()
    moved = student.scatter(1, targets[:, None], 100.0)
    assert torch.equal(pair_order_share(moved.exp(), 3 * teacher - 1, targets), pair_order_share(student, teacher, targets))


def test_the_split_into_batches_does_not_change_a_metric() -> None:
    student, targets, teacher = sample()
    whole = measure(student, targets, teacher, pair_order=True)
    for sizes in ([32, 32], [1, 60, 3], [1] * 64):
        assert measure(student, targets, teacher, sizes=sizes, pair_order=True) == pytest.approx(whole, rel=1e-6)


def test_a_relabelling_of_classes_does_not_change_a_metric() -> None:
    student, targets, teacher = sample()
    order = torch.randperm(10, generator=torch.Generator().manual_seed(1))
    relabelled = measure(student[:, order], order.argsort()[targets], teacher[:, order], pair_order=True)
    assert relabelled == pytest.approx(measure(student, targets, teacher, pair_order=True), rel=1e-5)


@pytest.mark.parametrize("shift", [0.5, -1000.0])
def test_a_constant_added_to_all_logits_does_not_change_a_metric(shift: float) -> None:
    # Shifted by 0.5 the logits lie in [0, 1], where torchmetrics alone would take them for probabilities.
    student, targets, teacher = sample()
    student, teacher = student.double() / 32 / student.abs().max(), teacher.double()
    moved = measure(student + shift, targets, teacher + shift, pair_order=True)
    assert moved == pytest.approx(measure(student, targets, teacher, pair_order=True), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_extreme_logits_and_masked_teachers_give_finite_metrics(dtype: torch.dtype) -> None:
    student, targets, teacher = sample()
    student, teacher = (1e4 * student.sign()).to(dtype), (1e4 * teacher.sign()).to(dtype)
    teacher[:, :4] = -math.inf
    found = measure(student, targets, teacher, pair_order=True)
    assert all(map(math.isfinite, found.values())), found


def test_a_class_masked_for_the_teacher_adds_nothing_to_the_divergence() -> None:
    student, teacher = torch.tensor([[1.0, 2.0, -math.inf]]), torch.tensor([[0.5, 0.1, -math.inf]])
    assert kl_to_teacher(student, teacher).tolist() == pytest.approx(kl_to_teacher(student[:, :2], teacher[:, :2]).tolist())
    assert kl_to_teacher(teacher, torch.zeros(1, 3)).item() == math.inf  # a student that excludes what the teacher does not


def test_low_precision_logits_are_summed_in_high_precision() -> None:
    # 4096 samples of -log(1/4): a bf16 or fp16 sum would stop growing, a float32 one would drift.
    for dtype in (torch.float16, torch.bfloat16):
        found = measure(torch.zeros(4096, 4, dtype=dtype), torch.zeros(4096, dtype=torch.int64), sizes=[1024] * 4)
        assert found["nll"] == pytest.approx(math.log(4), rel=1e-7)


def test_a_share_of_hits_is_exact() -> None:
    logits = torch.zeros(1000, 10)
    logits[:762, 3] = 1.0
    logits[762:, 4] = 1.0
    assert measure(logits, torch.full((1000,), 3))["top1"] == 76.2


def test_an_update_reads_nothing_back_from_the_device() -> None:
    # Tensors on "meta" have no values: any read by the host raises.
    meter = Classification(pair_order=True).meter(10, "meta")
    logits, targets = torch.zeros(8, 10, device="meta"), torch.zeros(8, dtype=torch.int64, device="meta")
    meter.update(logits, targets, logits)
    meter.update(logits.bfloat16(), targets, logits)
    with pytest.raises(NotImplementedError, match="meta"):
        meter.compute()


def test_no_logits_are_kept() -> None:
    student, targets, teacher = sample(rows=512, classes=50)
    meter = Classification(pair_order=True).meter(50, "cpu")
    for _ in range(4):
        meter.update(student, targets, teacher)
    values = [v for v in vars(meter).values() if isinstance(v, (Metric, dict))]
    metrics = [m for v in values for m in (v.values() if isinstance(v, dict) else [v])]
    states = [t for m in metrics for s in m.metric_state.values() for t in (s if isinstance(s, list) else [s])]
    assert sum(t.numel() for t in states) < 3 * 4 * 512


def test_updates_inside_and_outside_of_inference_mode_mix() -> None:
    student, targets, teacher = sample()
    meter = Classification().meter(10, "cpu")
    with torch.inference_mode():
        meter.update(student[:32], targets[:32], teacher[:32])
    meter.update(student[32:], targets[32:], teacher[32:])
    assert meter.compute() == pytest.approx(measure(student, targets, teacher), rel=1e-6)


def test_without_a_teacher_there_is_no_fidelity() -> None:
    student, targets, _ = sample()
    assert list(measure(student, targets, pair_order=True)) == ["top1", "top5", "nll", "ece"]


def test_fidelity_is_a_mean_over_the_samples_that_have_a_teacher() -> None:
    student, targets, teacher = sample()
    meter = Classification().meter(10, "cpu")
    meter.update(student[:16], targets[:16], teacher[:16])
    meter.update(student[16:], targets[16:])
    part = measure(student[:16], targets[:16], teacher[:16])
    found = meter.compute()
    assert [found[m] for m in ("agreement", "kl_teacher", "teacher_top1")] == [part[m] for m in ("agreement", "kl_teacher", "teacher_top1")]


def test_an_evaluation_of_nothing_fails() -> None:
    with pytest.raises(RunFailed, match="no sample"):
        Classification().meter(10, "cpu").compute()


def test_a_diverged_model_does_not_pass_for_calibrated() -> None:
    student, targets, _ = sample()
    student[0] = math.nan
    found = measure(student, targets)
    assert math.isnan(found["nll"])
    assert math.isnan(found["ece"])


def test_metrics_that_say_nothing_with_few_classes_are_skipped() -> None:
    student, targets, teacher = sample(classes=2)
    assert list(measure(student, targets, teacher, pair_order=True)) == ["top1", "nll", "ece", "agreement", "kl_teacher", "teacher_top1"]
    student, targets, teacher = sample(classes=5)
    assert "top5" not in measure(student, targets, teacher)


def test_the_names_announced_are_those_returned_and_have_a_kind() -> None:
    for classes in (2, 3, 5, 10):
        student, targets, teacher = sample(classes=classes)
        evaluation = Classification(pair_order=True)
        assert list(measure(student, targets, teacher, pair_order=True)) == evaluation.names(classes)
        assert all(kind(name) for name in evaluation.names())


def test_a_primary_metric_without_meaning_for_the_class_count_is_refused() -> None:
    with pytest.raises(Refused, match=r"evaluation\.primary=top1"):
        Classification(primary="top5").meter(5, "cpu")
    Classification(primary="top5").meter(6, "cpu")


def test_all_faults_of_the_fields_are_refused_at_once() -> None:
    with pytest.raises(Refused) as refused:
        Classification(bins=0, every_epochs=0, last_k=0)
    assert [p.key for p in refused.value.problems] == [f"evaluation.{k}" for k in ("every_epochs", "last_k", "bins")]
    with pytest.raises(Refused, match="did you mean"):
        Classification(primary="top7")
    with pytest.raises(Refused, match=r"evaluation\.top_k"):
        Classification(top_k=(0, 1))


def test_the_configuration_states_every_field_with_its_default() -> None:
    stated = {str(key): value for key, value in OmegaConf.load(CONF).items()}
    assert stated.pop("_target_") == f"{Classification.__module__}.{Classification.__qualname__}"
    built = Classification(**stated)
    assert vars(built) == vars(Classification())
    assert {*stated} == {*vars(built)}


def _rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    student, targets, teacher = sample()
    mine = slice(0, 23) if rank == 0 else slice(23, None)
    meter = Classification(pair_order=True).meter(10, "cpu")
    meter.update(student[mine], targets[mine], teacher[mine])
    torch.save(meter.compute(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_with_uneven_shares_measure_what_one_does(tmp_path: Path) -> None:
    mp.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    student, targets, teacher = sample()
    whole = measure(student, targets, teacher, pair_order=True)
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt") == pytest.approx(whole, rel=1e-6)
