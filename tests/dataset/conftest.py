from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def own_caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing that a test reads may come from, or stay in, the caches of the machine."""
    import datasets

    root = tmp_path_factory.mktemp("caches")
    monkeypatch.setenv("KDRUN_CACHE", str(root / "kdrun"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "hf")
    datasets.disable_progress_bars()
    return root
