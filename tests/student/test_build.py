"""A node of the configuration becomes a network, or a refusal that names everything wrong with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from kdrun.errors import Refused
from kdrun.student.build import RESERVED, build, resolve
from kdrun.student.mlp import mlp
from kdrun.student.resnet import resnet8

RESNET = {"_target_": "kdrun.student.resnet.resnet8", "taps": {"f1": "layer1"}, "checkpoint": None, "rename": []}
USER = """
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes, in_chans, depth=2):
        super().__init__()
        self.told = (num_classes, in_chans, depth)

class Fixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)

class Wants(nn.Module):
    def __init__(self, num_classes, depth):
        super().__init__()
        if depth < 1:
            raise ValueError("depth starts at 1")

def anything(**kwargs):
    net = Fixed()
    net.told = kwargs
    return net

def nothing():
    return 3

class Plain:
    pass
"""


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    (tmp_path / "kdrun_user_nets.py").write_text(USER)
    (tmp_path / "kdrun_user_broken.py").write_text("import kdrun_no_such_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    return ("kdrun", "kdrun_user_nets", "kdrun_user_broken")


def refusal(*args: object, **kwargs: object) -> tuple[str, str, str]:
    with pytest.raises(Refused) as caught:
        build(*args, **kwargs)  # type: ignore[arg-type]
    (problem,) = caught.value.problems
    return problem.what, problem.key, problem.remedy


def test_a_network_is_told_of_the_data_by_the_names_of_its_signature(user: tuple[str, ...]) -> None:
    network = build(RESNET, 7, (1, 8, 8))
    assert network(torch.zeros(1, 1, 8, 8)).shape == (1, 7)
    perceptron = build({"_target_": "kdrun.student.mlp.mlp", "hidden": [5]}, 3, (2, 4, 4))
    assert perceptron.get_submodule("fc1").in_features == 32
    assert build({"_target_": "kdrun_user_nets.Net"}, 9, (4, 8, 8), allowed=user).told == (9, 4, 2)
    assert build({"_target_": "kdrun_user_nets.anything", "a": 1}, 9, (4,), allowed=user).told == {"num_classes": 9, "a": 1}
    assert isinstance(build({"_target_": "kdrun_user_nets.Fixed"}, 3, (4,), allowed=user), nn.Module)
    assert isinstance(build({"_target_": "torchvision.models.resnet18"}, 3, (3, 32, 32)).fc, nn.Linear)


def test_what_the_node_says_wins(user: tuple[str, ...]) -> None:
    node = {"_target_": "kdrun_user_nets.Net", "num_classes": 4, "depth": 6}
    assert build(node, 9, (4, 8, 8), allowed=user).told == (4, 4, 6)


def test_reserved_keys_are_not_arguments() -> None:
    build(RESNET, 7, (3, 8, 8))
    build(RESNET | {"kind": "live"}, 7, (3, 8, 8), reserved={"kind"})
    assert {"_target_", "taps", "checkpoint", "rename"} == RESERVED


def test_a_hydra_node_is_taken_as_it_is() -> None:
    config = OmegaConf.create({"student": RESNET | {"shortcut": "${how}"}, "how": "pad"})
    assert "layer2.0.downsample.0.weight" not in build(config.student, 7, (3, 8, 8)).state_dict()


def test_initial_weights_come_from_the_global_seed() -> None:
    torch.manual_seed(3)
    built = build(RESNET, 7, (3, 8, 8))
    torch.manual_seed(3)
    assert torch.equal(built.get_submodule("fc").weight, resnet8(7).get_submodule("fc").weight)


@pytest.mark.parametrize("target", [None, "", "???"])
def test_no_network_chosen_is_said(target: str | None) -> None:
    what, key, remedy = refusal({"_target_": target}, 3, (3, 8, 8), key="teacher")
    assert (what, key) == ("no network is chosen", "teacher._target_")
    assert "my.Net" in remedy
    assert refusal(OmegaConf.create({"_target_": "???"}), 3, (3, 8, 8))[0] == "no network is chosen"


def test_a_target_outside_the_allowed_packages_is_refused_with_the_remedy() -> None:
    what, key, remedy = refusal({"_target_": "subprocess.run", "args": "true"}, 3, (3, 8, 8))
    assert "outside the packages that may be named: kdrun, torch, torchvision, timm, transformers" in what
    assert (key, remedy) == ("student._target_", "if you trust that package: run.allow=[subprocess]")


@pytest.mark.parametrize(
    "target", ["torch.os.system", "kdrun.config.targets.importlib.import_module", "torch.nn.modules.module.functools.partial"]
)
def test_what_an_allowed_package_merely_imports_is_refused(target: str) -> None:
    assert "outside the packages that may be named" in refusal({"_target_": target}, 3, (3, 8, 8))[0]


@pytest.mark.parametrize(
    "target",
    ["torch.load", "torch.hub.load", "timm.models.load_state_dict", "torchvision.datasets.utils.download_url", "torch.Tensor", "torch.nn"],
)
def test_what_can_be_no_network_is_refused_before_it_is_called(target: str) -> None:
    assert "is no torch.nn.Module class and no function that builds one" in refusal({"_target_": target}, 3, (3, 8, 8))[0]


def test_a_misspelt_target_gets_the_nearest_names() -> None:
    what, _, remedy = refusal({"_target_": "kdrun.student.resnet.resnet8x44"}, 3, (3, 8, 8))
    assert what == "kdrun.student.resnet has no 'resnet8x44'"
    assert "resnet8x4" in remedy
    what, _, remedy = refusal({"_target_": "kdrun.student.resnt.resnet8"}, 3, (3, 8, 8))
    assert (what, "resnet" in remedy) == ("kdrun.student has no 'resnt'", True)
    what, _, remedy = refusal({"_target_": "kdrun.student.resnet"}, 3, (3, 8, 8))
    assert "no function that builds one" in what
    assert "resnet" in remedy


def test_a_package_that_is_not_there_is_told_from_a_broken_one(user: tuple[str, ...]) -> None:
    assert refusal({"_target_": "kdrun_nowhere.Net"}, 3, (3,), allowed=["kdrun_nowhere"])[0] == "no package 'kdrun_nowhere'"
    what, _, remedy = refusal({"_target_": "kdrun_user_broken.Net"}, 3, (3,), allowed=user)
    assert what == "kdrun_user_broken needs the package kdrun_no_such_dependency, which is not installed"
    assert remedy == "pip install kdrun_no_such_dependency"


def test_unknown_and_missing_arguments_are_refused_all_at_once(user: tuple[str, ...]) -> None:
    with pytest.raises(Refused) as caught:
        build({"_target_": "kdrun_user_nets.Wants", "detph": 1, "wide": 2}, 3, (3,), allowed=user, key="teacher")
    said = {p.key: (p.what, p.remedy) for p in caught.value.problems}
    assert set(said) == {"teacher.detph", "teacher.wide", "teacher.depth"}
    assert said["teacher.detph"] == (
        "kdrun_user_nets.Wants has no argument 'detph'",
        "did you mean depth?; it takes num_classes, depth",
    )
    assert said["teacher.depth"] == ("kdrun_user_nets.Wants needs 'depth'", "set teacher.depth=...")


def test_a_refusal_of_a_factory_names_the_key_of_the_node() -> None:
    what, key, remedy = refusal(RESNET | {"shortcut": "padd"}, 3, (3, 8, 8))
    assert (what, key, remedy) == ("unknown shortcut 'padd'", "student.shortcut", "did you mean pad?")


def test_what_a_network_itself_refuses_is_passed_on(user: tuple[str, ...]) -> None:
    what, key, _ = refusal({"_target_": "kdrun_user_nets.Wants", "depth": 0}, 3, (3,), allowed=user)
    assert (what, key) == ("kdrun_user_nets.Wants refuses its arguments: depth starts at 1", "student")
    assert "gave a int, not a torch.nn.Module" in refusal({"_target_": "kdrun_user_nets.nothing"}, 3, (3,), allowed=user)[0]
    assert "no torch.nn.Module class" in refusal({"_target_": "kdrun_user_nets.Plain"}, 3, (3,), allowed=user)[0]


def test_a_class_method_of_a_network_may_be_named() -> None:
    found = resolve("torch.nn.Embedding.from_pretrained", ["torch"], "student._target_")
    assert found.__self__ is nn.Embedding


def test_an_mlp_has_the_layers_it_is_given() -> None:
    network = mlp(3, 32, [512, 256])
    assert [tuple(p.shape) for p in network.parameters()] == [(512, 32), (512,), (256, 512), (256,), (3, 256), (3,)]
    assert network(torch.zeros(2, 2, 4, 4)).shape == (2, 3)
    assert len(list(mlp(3, 32, []).parameters())) == 2
    with pytest.raises(Refused, match="at least one unit"):
        mlp(3, 32, [0])
