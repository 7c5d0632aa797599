"""Weights in and out: exact names, everything that is wrong said at once, nothing loaded by halves, no code run."""

from __future__ import annotations

import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kdrun.errors import Refused
from kdrun.student.known import fitting, networks
from kdrun.student.resnet import resnet8, resnet20
from kdrun.student.taps import Tapped
from kdrun.student.weights import bare, load_weights, save_student, sha256_of
from kdrun.student.wrn import wrn_16_2
from tests.student.composed import node

AKAMASTER = [["^linear\\.", "fc."]]


def net(seed: int = 0, classes: int = 10, **kwargs: Any) -> nn.Module:
    torch.manual_seed(seed)
    return resnet8(classes, **kwargs)


def refusal(network: nn.Module, path: Path, **kwargs: Any) -> list[tuple[str, str]]:
    """(what, remedy) of every problem; the network must be untouched."""
    before = sha256_of(network)
    with pytest.raises(Refused) as caught:
        load_weights(network, path, **kwargs)
    assert sha256_of(network) == before
    assert all(p.key == "checkpoint" and p.where == str(path) for p in caught.value.problems)
    return [(p.what, p.remedy) for p in caught.value.problems]


def test_a_saved_student_loads_with_plain_torch(tmp_path: Path) -> None:
    network, other = net(1), net(2)
    save_student(Tapped(network, {}, ["layer1"]), tmp_path / "student.safetensors", {"recipe": "kd", "top1": 70.5})
    assert not other.load_state_dict(load_file(tmp_path / "student.safetensors")).missing_keys
    assert sha256_of(other) == sha256_of(network)
    with safetensors.safe_open(tmp_path / "student.safetensors", framework="pt") as file:
        assert file.metadata() == {"recipe": "kd", "top1": "70.5"}
    assert [p.name for p in tmp_path.iterdir()] == ["student.safetensors"]


def test_a_saved_student_loads_with_kdrun(tmp_path: Path) -> None:
    network, other = net(1), net(2)
    save_student(network, tmp_path / "student.safetensors", {"recipe": "kd"})
    info = load_weights(Tapped(other, {}), tmp_path / "student.safetensors")
    assert sha256_of(other) == sha256_of(network)
    assert info["metadata"] == {"recipe": "kd"}
    assert (info["tensors"], info["prefix"], info["renamed"], info["wrappers"]) == (len(network.state_dict()), "", 0, [])
    assert len(info["sha256"]) == 64


def test_tied_weights_and_channels_last_are_saved_under_every_name(tmp_path: Path) -> None:
    network = nn.ModuleDict({"a": nn.Conv2d(3, 4, 3), "b": nn.Conv2d(3, 4, 3)}).to(memory_format=torch.channels_last)
    network["b"].weight = network["a"].weight
    save_student(network, tmp_path / "tied.safetensors")
    state = load_file(tmp_path / "tied.safetensors")
    assert set(state) == set(network.state_dict())
    assert torch.equal(state["b.weight"], network["a"].weight)


def test_a_failed_save_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("kdrun.student.weights.os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_student(net(), tmp_path / "student.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_the_same_weights_and_metadata_are_the_same_bytes(tmp_path: Path) -> None:
    """The library's own order of the metadata is another in every call and process: by chance the same once in 40,320 calls."""
    metadata = {name: name for name in ["recipe", "config_hash", "seed", "commit", "bär", "e", "d", "c"]}
    for number in range(3):
        save_student(net(1), tmp_path / f"{number}.safetensors", metadata)
    first, *others = [file.read_bytes() for file in sorted(tmp_path.iterdir())]
    assert others == [first, first]
    length = int.from_bytes(first[:8], "little")
    assert length % 8 == 0
    assert list(json.loads(first[8 : 8 + length])["__metadata__"]) == sorted(metadata)
    assert load_weights(net(2), tmp_path / "0.safetensors")["metadata"] == metadata


def test_the_hash_sees_weights_buffers_and_nothing_else() -> None:
    network = net(1)
    digest = sha256_of(network)
    assert sha256_of(Tapped(network, {}, ["layer1"])) == digest
    assert sha256_of(torch.compile(network, backend="eager")) == digest
    assert sha256_of(net(1).to(memory_format=torch.channels_last).eval()) == digest
    network.get_buffer("bn1.running_mean")[3] += 1e-6
    changed = sha256_of(network)
    assert changed != digest
    network.get_parameter("layer1.0.bn1.bias").data[0] = -0.0  # one bit
    assert sha256_of(network) not in (changed, digest)
    network.register_buffer("scratch", torch.zeros(2, dtype=torch.bfloat16), persistent=False)
    assert sha256_of(network) not in (changed, digest)


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "net", "student", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "student.", "backbone.", "student.module.", "module._orig_mod.model."])
def test_wrappers_and_prefixes_are_taken_off(tmp_path: Path, wrapper: str | None, prefix: str) -> None:
    network, other = net(1), net(2)
    state: dict[str, Any] = {prefix + name: tensor for name, tensor in network.state_dict().items()}
    torch.save({wrapper: state, "epoch": 3, "optimizer": {"lr": 0.1}} if wrapper else state, tmp_path / "w.pth")
    info = load_weights(other, tmp_path / "w.pth")
    assert sha256_of(other) == sha256_of(network)
    assert (info["prefix"], info["wrappers"]) == (prefix, [wrapper] if wrapper else [])


def test_a_prefix_that_is_the_networks_own_stays(tmp_path: Path) -> None:
    network, other = nn.ModuleDict({"module": nn.Linear(2, 2)}), nn.ModuleDict({"module": nn.Linear(2, 2)})
    torch.save(network.state_dict(), tmp_path / "w.pth")
    assert load_weights(other, tmp_path / "w.pth")["prefix"] == ""
    assert sha256_of(other) == sha256_of(network)


def akamaster(network: nn.Module) -> dict[str, Any]:
    """As github.com/akamaster/pytorch_resnet_cifar10 saves: data parallel, no counters, last layer `linear`."""
    names = {n: "module." + re.sub("^fc", "linear", n) for n in network.state_dict() if not n.endswith("num_batches_tracked")}
    return {"state_dict": {new: network.state_dict()[old] for old, new in names.items()}, "best_prec1": 91.7}


def test_option_a_networks_load_the_public_cifar10_files(tmp_path: Path) -> None:
    network, other = resnet20(10, shortcut="pad"), resnet20(10, shortcut="pad")
    torch.save(akamaster(network), tmp_path / "resnet20.th")
    info = load_weights(other, tmp_path / "resnet20.th", node("student", "resnet20")["rename"])
    assert sha256_of(other) == sha256_of(network)
    assert (info["prefix"], info["renamed"]) == ("module.", 2)


def test_wide_networks_load_by_the_names_of_the_reference_code(tmp_path: Path) -> None:
    network, other = wrn_16_2(10), wrn_16_2(10)
    names = {n: re.sub(r"^layer(\d)\.", r"block\1.layer.", n).replace("shortcut", "convShortcut") for n in network.state_dict()}
    torch.save({"model": {names[n]: t for n, t in network.state_dict().items()}}, tmp_path / "wrn.pth")
    load_weights(other, tmp_path / "wrn.pth", node("student", "wrn_16_2")["rename"])
    assert sha256_of(other) == sha256_of(network)


def test_half_precision_files_are_cast(tmp_path: Path) -> None:
    other = net(2)
    torch.save({n: t.half() if t.is_floating_point() else t for n, t in net(1).state_dict().items()}, tmp_path / "w.pt")
    load_weights(other, tmp_path / "w.pt")
    assert {p.dtype for p in other.parameters()} == {torch.float32}
    torch.testing.assert_close(other.get_parameter("fc.weight"), net(1).get_parameter("fc.weight"), rtol=1e-3, atol=1e-4)


def test_a_missing_file_is_refused_with_the_nearest_one(tmp_path: Path) -> None:
    (tmp_path / "resnet20-12fca82f.th").touch()
    assert refusal(net(), tmp_path / "resnet20-12fca82.th") == [("no such file", "in that folder there is resnet20-12fca82f.th")]
    ((what, _),) = refusal(net(), tmp_path / "nowhere" / "w.pth")
    assert "there is not even a folder" in what
    assert refusal(net(), tmp_path) == [("is a folder, not a file of weights", "name one of its files: resnet20-12fca82f.th")]


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.95])
@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_a_truncated_file_is_refused(tmp_path: Path, form: str, kept: float) -> None:
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pth")
    state = net(1).state_dict()
    if form == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    ((what, remedy),) = refusal(net(), path)
    assert "truncated or corrupt" in what
    assert "again" in remedy


@pytest.mark.parametrize(
    "text",
    [
        "version https://git-lfs.github.com/spec/v1\noid sha256:0",
        "<html>not found</html>",
        "resnet32x4 of the benchmark",  # the unpickler takes these four for instructions
        "top1,70.5,240",
        "hello",
        "] of weights",
    ],
)
def test_a_file_that_is_no_weights_is_shown(tmp_path: Path, text: str) -> None:
    (tmp_path / "w.pth").write_text(text)
    ((what, _),) = refusal(net(), tmp_path / "w.pth")
    assert "no file of weights" in what
    assert text[:12] in what


def test_another_archive_is_no_weights(tmp_path: Path) -> None:
    np.savez(tmp_path / "w.npz", weight=np.zeros(3))
    assert refusal(net(), tmp_path / "w.npz")[0][0].startswith("no file of weights: it begins with b'PK")


@pytest.mark.parametrize("content", [b"\x80\x02h\x04", b"\x80\x02q\x01", b"\x80", b"\x80\x02U\x04\xff\xfe\xfd\xfc."])
def test_a_damaged_pickle_is_refused_in_words(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w.pth").write_bytes(content)
    ((what, _),) = refusal(net(), tmp_path / "w.pth")
    assert what == "truncated or corrupt: it is not what a pickle looks like"


class Code:
    """A pickle that runs a command when it is opened without care."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.proof),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_code_in_a_file_is_refused_and_not_run(tmp_path: Path, form: str) -> None:
    proof, path = tmp_path / "ran", tmp_path / "w.pth"
    content = {"state_dict": net(1).state_dict(), "extra": Code(proof)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    ((what, remedy),) = refusal(net(), path)
    assert "holds more than tensors" in what
    assert "could run code; it was not opened" in what
    assert "mkdir" in what or form == "pickle"
    assert "weights_only=False" in remedy
    assert "w.clean.pt" in remedy
    assert not proof.exists()


def test_a_whole_pickled_network_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "w.pth")
    ((what, remedy),) = refusal(net(), tmp_path / "w.pth")
    assert "torch.nn.modules.linear.Linear" in what
    assert "state_dict()" in remedy


@pytest.mark.parametrize("content", [{"epoch": 3, "weights": [1.0]}, {}, [torch.zeros(2)], torch.zeros(2)])
def test_a_file_without_a_state_dict_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "w.pth")
    ((what, remedy),) = refusal(net(), tmp_path / "w.pth")
    assert "no state dict that can be recognised" in what
    assert "state_dict" in remedy
    save_file({}, tmp_path / "empty.safetensors")
    assert refusal(net(), tmp_path / "empty.safetensors")[0][0] == "has no tensors in it"


def test_the_wrong_number_of_classes_is_said_in_those_words(tmp_path: Path) -> None:
    save_student(net(1, classes=10), tmp_path / "w.safetensors")
    assert refusal(net(classes=100), tmp_path / "w.safetensors") == [
        (
            "wrong number of classes: the file's last layer has 10 classes, this network 100",
            "use weights for 100 classes, or a data set of 10 classes",
        )
    ]


def test_weights_of_another_network_are_refused_with_its_name(tmp_path: Path) -> None:
    save_student(wrn_16_2(100), tmp_path / "w.safetensors")
    missing, unexpected, shapes = refusal(net(classes=100), tmp_path / "w.safetensors")
    assert "tensors of this ResNet are missing in the file: bn1" not in missing[0]
    assert "are missing in the file: layer1.0.downsample" not in missing[0]
    assert re.search(r"\d+ of the \d+ tensors of this ResNet are missing in the file: .*in all\)", missing[0])
    assert "the file has tensors that this ResNet does not have" in unexpected[0]
    assert "shapes differ" in shapes[0]
    assert "conv1.weight is" not in shapes[0]  # the stems agree
    assert all("these shapes are those of kdrun.student.wrn.wrn_16_2" in remedy for _, remedy in (missing, unexpected, shapes))


def test_the_other_shortcut_is_recognised(tmp_path: Path) -> None:
    torch.save(akamaster(resnet20(10, shortcut="pad")), tmp_path / "w.th")
    ((what, remedy),) = refusal(resnet20(10), tmp_path / "w.th", rename=AKAMASTER)
    assert "downsample" in what
    assert "kdrun.student.resnet.resnet20(shortcut=pad)" in remedy


def test_the_same_layers_by_other_names_get_the_renaming_to_write(tmp_path: Path) -> None:
    network = resnet20(10, shortcut="pad")
    torch.save(akamaster(network), tmp_path / "w.th")
    missing, unexpected = refusal(network, tmp_path / "w.th")
    assert "fc.weight, fc.bias" in missing[0]
    assert "linear.weight, linear.bias" in unexpected[0]
    assert "rename: [['^linear\\.', 'fc.']]" in missing[1]


def test_a_renaming_that_cannot_be_is_refused(tmp_path: Path) -> None:
    save_student(net(1), tmp_path / "w.safetensors")
    with pytest.raises(Refused, match="no regular expression"):
        load_weights(net(), tmp_path / "w.safetensors", [["(", ""]])
    with pytest.raises(Refused, match="two tensors of the file become weight"):
        load_weights(net(), tmp_path / "w.safetensors", [[r"^.*\.", ""]])


def test_every_network_of_the_package_is_recognised_by_its_shapes() -> None:
    known = networks()
    assert len(known) == 32
    for name in ("resnet.resnet8x4", "shufflenetv2.shufflenetv2"):
        with torch.device("meta"):
            state: dict[str, Tensor] = known[f"kdrun.student.{name}"](num_classes=17, in_channels=1).state_dict()
        assert fitting(state) == [f"kdrun.student.{name}(in_channels=1)"]
    assert fitting(nn.Linear(3, 2).state_dict()) == []


def test_wrappers_come_off_in_any_order() -> None:
    network = net()
    assert bare(torch.compile(Tapped(network, {}), backend="eager")) is network
    assert bare(Tapped(nn.DataParallel(network), {})) is network


@pytest.mark.realdata
@pytest.mark.parametrize("name", ["resnet20", "resnet32", "resnet56"])
def test_the_real_public_files_load(name: str) -> None:
    """The published files themselves, of which a test above makes a likeness. They are not ours to carry: skipped where they are not."""
    folder = Path(os.environ.get("KDRUN_DATA", "/nonexistent")) / "cifar10_resnets"
    files = list(folder.glob(f"{name}-*.th"))
    if not files:
        pytest.skip(f"KDRUN_DATA names no folder with cifar10_resnets/{name}-*.th (github.com/akamaster/pytorch_resnet_cifar10)")
    network = networks()[f"kdrun.student.resnet.{name}"](10, shortcut="pad")
    info = load_weights(network, files[0], node("student", name)["rename"])
    assert info["sha256"].startswith(files[0].stem.partition("-")[2])
    assert info["tensors"] == sum(not n.endswith("num_batches_tracked") for n in network.state_dict())
