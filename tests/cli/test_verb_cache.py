"""kdrun cache: what a user sees of caches, and that nothing is lost by a wrong word."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cache.test_runs import IMAGES
from tests.conftest import Outcome, run_cli
from tests.engine.running import run

Command = Callable[..., Outcome]


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a run that has kept its teacher, and the cache's name."""
    root = tmp_path_factory.mktemp("cached") / "root"
    run([*IMAGES, "cache=int8"], root.parent / "run")
    return root


@pytest.fixture
def root(filled: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    shutil.copytree(filled / "cache", tmp_path / "cache")
    return tmp_path


def name_in(root: Path) -> str:
    (folder,) = (p for p in (root / "cache").iterdir() if p.is_dir())
    return folder.name


def test_a_cache_is_listed_with_what_is_there(filled: Path, kdrun: Command) -> None:
    shown = kdrun("cache", "ls", "--root", str(filled))
    assert shown.code == 0
    told = " ".join(shown.out.split())
    assert "int8" in told
    assert "100 %" in told
    (row,) = kdrun("cache", "ls", "--root", str(filled), "--json").json
    assert (row["name"], row["format"], row["views"], row["samples"], row["filled"]) == (name_in(filled), "int8", 3, 48, 1.0)
    assert row["bytes"] >= 3 * 48 * (18 + 4)


def test_no_cache_is_an_empty_list_with_a_hint(tmp_path: Path, kdrun: Command) -> None:
    assert kdrun("cache", "ls", "--root", str(tmp_path), "--json").json == []
    assert "cache=dense" in kdrun("cache", "ls", "--root", str(tmp_path)).out


def test_verify_asks_the_teacher_again(filled: Path, kdrun: Command) -> None:
    found = kdrun("cache", "verify", name_in(filled), "--samples", "100", "--root", str(filled), "--json")
    assert found.code == 0
    assert (found.json["checked"], found.json["filled"], found.json["damaged"]) == (100, 144, 0)
    assert found.json["off"] <= found.json["tolerance"] == 0.01
    assert 0 < found.json["teacher_top1"] <= 100
    assert "computed again; the teacher is right in" in kdrun("cache", "verify", name_in(filled), "--root", str(filled)).out


def test_damage_is_exit_code_3(root: Path, kdrun: Command) -> None:
    folder = root / "cache" / name_in(root)
    with open(folder / "view-000001.rows", "r+b") as file:
        file.write(b"\xff" * 10)
    found = kdrun("cache", "verify", folder.name, "--samples", "144", "--root", str(root))
    assert found.code == 3
    assert "1 damaged" in found.out
    assert "kdrun cache rm" in found.err


def test_rows_of_another_teacher_are_exit_code_3(root: Path, kdrun: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the weights in the teacher's folder had been replaced since."""
    from kdrun.engine import verifying

    original = verifying.with_weights

    def other(tree, built):  # type: ignore[no-untyped-def]
        teacher = original(tree, built)
        next(teacher.module.parameters()).add_(1.0)
        return teacher

    monkeypatch.setattr(verifying, "with_weights", other)
    found = kdrun("cache", "verify", name_in(root), "--root", str(root))
    assert found.code == 3
    assert "another teacher" in found.err


def test_a_wrong_name_removes_nothing_and_names_the_nearest(root: Path, kdrun: Command) -> None:
    name = name_in(root)
    found = kdrun("cache", "rm", name[:-2], "--root", str(root))
    assert found.code == 2
    assert name in found.err
    assert (root / "cache" / name).is_dir()
    removed = kdrun("cache", "rm", name, "--root", str(root))
    assert removed.code == 0
    assert not (root / "cache" / name).exists()


def test_a_manifest_from_elsewhere_runs_no_code(root: Path, tmp_path: Path, kdrun: Command) -> None:
    file = root / "cache" / name_in(root) / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["tree"]["run"]["allow"] = ["posix"]
    manifest["tree"]["student"] = {"_target_": "posix.system", "command": f"touch {tmp_path / 'ran'}", "taps": {}}
    file.write_text(json.dumps(manifest))
    found = kdrun("cache", "verify", file.parent.name, "--root", str(root))
    assert found.code == 2
    assert not (tmp_path / "ran").exists()


def test_a_broken_cache_is_told_and_can_be_removed_and_the_others_are_listed(root: Path, kdrun: Command) -> None:
    broken = root / "cache" / "broken"
    broken.mkdir()
    (broken / "manifest.json").write_text("{")
    found = kdrun("cache", "ls", "--root", str(root))
    assert found.code == 0
    assert "int8" in found.out
    assert "kdrun cache rm broken" in found.err
    assert kdrun("cache", "rm", "broken", "--root", str(root)).code == 0
    assert not broken.exists()


def test_a_folder_that_is_no_cache_is_not_removed(root: Path, tmp_path: Path, kdrun: Command) -> None:
    site = tmp_path / "site"
    site.mkdir()
    (site / "manifest.json").write_text('{"name": "a page"}')
    (site / "index.html").write_text("<html>")
    for verb in ("rm", "verify"):
        found = kdrun("cache", verb, str(site), "--root", str(root))
        assert found.code == 2, verb
    assert (site / "index.html").is_file()


def test_an_archive_has_the_name_of_one(root: Path, tmp_path: Path, kdrun: Command) -> None:
    found = kdrun("cache", "pack", name_in(root), str(tmp_path / "cache.zip"), "--root", str(root))
    assert found.code == 2
    assert "NAME.tar.gz" in found.err


def test_a_cache_travels_in_one_file(root: Path, tmp_path: Path, kdrun: Command) -> None:
    archive = tmp_path / "teacher.tar.gz"
    assert kdrun("cache", "pack", name_in(root), str(archive), "--root", str(root)).code == 0
    added = kdrun("cache", "add", str(archive), "--root", str(tmp_path / "elsewhere"))
    assert added.code == 0
    assert "144 rows, all whole" in added.out
    assert kdrun("cache", "add", str(archive), "--root", str(tmp_path / "elsewhere")).code == 2


def test_a_packed_cache_serves_a_run_elsewhere(filled: Path, tmp_path: Path) -> None:
    archive = tmp_path / "teacher.tar"
    assert run_cli("cache", "pack", name_in(filled), str(archive), "--root", str(filled)).code == 0
    run_cli("cache", "add", str(archive), "--root", str(tmp_path / "root"))
    assert run([*IMAGES, "cache=int8"], tmp_path / "run")["cache"]["read"] == 3 * 48 - 20
