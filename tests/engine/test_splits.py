"""Law 1 within one process: an optimiser step is the same however its batch is cut into micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from kdrun.engine.records import CONFIG
from kdrun.errors import Refused
from tests.conftest import Outcome
from tests.engine.running import Notes, assert_same_training, run, staged, training_lines

OBJECTIVES = {
    "ce": ["objective=ce"],
    "kd": ["objective=kd"],
    "dkd": ["objective=dkd", "objective.warmup_epochs=2"],
    "pld": ["objective=pld"],
    "fitnet": [
        "objective=fitnet",
        "objective._target_=tests.engine.parts.FrozenFitNet",
        "objective.student_tap=f1",
        "objective.teacher_tap=f1",
        "objective.beta=1",
    ],
}
# (samples of a step, its split, another split); 96 rows in steps of 40 leave a last one of 16, in steps of 32 none.
SPLITS = [(32, "8", "[20,7,5]"), (40, "8", "[25,10,5]")]
BATCH_COUPLED = {
    "rkd": ["objective=rkd"],
    "dist": ["objective=dist"],
    "crd": ["objective=crd", "objective.negatives=20", "objective.width=8"],
}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize(("batch", "even", "uneven"), SPLITS)
def test_accumulation_does_not_change_gradients(
    name: str, batch: int, even: str, uneven: str, tiny: list[str], live: list[str], tmp_path: Path
) -> None:
    base = [*tiny, *live, *OBJECTIVES[name], f"source.batch_size={batch}"]
    splits = {"whole": "null", "even": even, "uneven": uneven}
    for folder, split in splits.items():
        run([*base, f"hardware.micro_batch={split}"], tmp_path / folder)
    ran = [yaml.safe_load((tmp_path / folder / CONFIG).read_text())["hardware"]["micro_batch"] for folder in splits]
    assert ran == [None, 8, yaml.safe_load(uneven)]  # three configurations, not one three times
    assert len(training_lines(tmp_path / "whole")) == 6
    assert_same_training(tmp_path / "even", tmp_path / "whole")
    assert_same_training(tmp_path / "uneven", tmp_path / "whole")


def test_accumulation_does_not_change_gradients_of_a_convolutional_net_with_frozen_statistics(tmp_path: Path) -> None:
    base = [
        "dataset=digits",
        "dataset.subset=48",
        "dataset.subset_test=20",
        "dataset.padding=1",
        "student=custom",
        "run.allow=[tests]",
        "student._target_=tests.engine.parts.frozen_resnet8",
        "source.batch_size=20",
        "optim.epochs=2",
        "optim.lr=0.01",
        "hardware=cpu",
        "hardware.threads=1",
        "run.log_every=1",
    ]
    run(base, tmp_path / "whole")
    run([*base, "hardware.micro_batch=[13,4,3]"], tmp_path / "cut")
    assert_same_training(tmp_path / "cut", tmp_path / "whole")


def test_a_mean_over_a_micro_batch_would_be_seen(tiny: list[str], tmp_path: Path) -> None:
    """The comparison has the power to find the classical mistake: with uneven pieces a mean of means is another gradient."""
    base = [*tiny, "objective=ce", "objective._target_=tests.engine.parts.MeanCE", "run.allow=[tests]"]
    run(base, tmp_path / "whole")
    run([*base, "hardware.micro_batch=[20,7,5]"], tmp_path / "cut")
    with pytest.raises(AssertionError, match="at step 1"):
        assert_same_training(tmp_path / "cut", tmp_path / "whole", rtol=1e-2)


@pytest.mark.parametrize("name", BATCH_COUPLED)
@pytest.mark.parametrize("split", ["8", "[20,7,5]"])
def test_a_batch_coupled_objective_refuses_to_be_split(
    name: str, split: str, tiny: list[str], live: list[str], tmp_path: Path, kdrun: Callable[..., Outcome]
) -> None:
    base = [*tiny, *live, *BATCH_COUPLED[name], f"run.dir={tmp_path / 'run'}"]
    refused = kdrun("train", *base, f"hardware.micro_batch={split}")
    assert refused.code == 2
    assert "hardware.micro_batch: " in refused.err
    assert "remedy  hardware.micro_batch=null" in refused.err
    assert list(tmp_path.iterdir()) == []


def test_a_split_that_does_not_add_up_is_refused(tiny: list[str], tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"hardware\.micro_batch"):
        run([*tiny, "hardware.micro_batch=[20,7]"], tmp_path / "run")


def test_batchnorm_under_accumulation_is_reported(tmp_path: Path) -> None:
    notes = Notes()
    base = [
        "dataset=digits",
        "dataset.subset=20",
        "dataset.subset_test=20",
        "student=resnet8",
        "source.batch_size=20",
        "optim.epochs=1",
        "hardware=cpu",
    ]
    staged([*base, "hardware.micro_batch=10"], tmp_path / "cut", notes)
    assert any("BatchNorm" in note and "hardware.micro_batch" in note for note in notes.notes)
    notes.notes.clear()
    staged(base, tmp_path / "whole", notes)
    assert not any("BatchNorm" in note for note in notes.notes)
