"""The handwritten digits that come with scikit-learn: 1797 real images of 8x8, there without a download.

The test part of "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak, UCI Machine Learning Repository, 1998).
It has no split of its own: about a third of the rows, chosen by hash, is the test split, the same in every run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kdrun import rng
from kdrun.dataset.augment import Normalise, PadCropFlip
from kdrun.dataset.base import Data, Resident, Split
from kdrun.dataset.images import channel_statistics, check_splits
from kdrun.dataset.select import WORLD_SEED, select

TEST_SHARE = 1 / 3  # ours
LEVELS = 16  # grey levels of the files run from 0 to 16


@dataclass
class DigitsData:
    """Ten classes, grey 8x8 images, as uint8 from 0 to 255."""

    name: str = "digits"
    padding: int = 0
    validation: float = 0.0
    subset: int | None = None
    subset_test: int | None = None

    def __post_init__(self) -> None:
        check_splits({"train": "train", "test": "test"}, self.validation)
        if self.padding < 0:
            raise ValueError(f"padding={self.padding} is a number of pixels, from 0")

    def load(self) -> Data:
        """Read the data. Raises `Refused` for a subset larger than its split."""
        from sklearn.datasets import load_digits

        raw = load_digits()
        images = torch.from_numpy(raw.images).mul(255 / LEVELS).round().to(torch.uint8).unsqueeze(1)
        targets = torch.from_numpy(raw.target).to(torch.int64)
        is_test = rng.uniform(rng.key(WORLD_SEED, "digits", "test"), torch.arange(len(targets))) < TEST_SHARE
        rows = {"train": torch.nonzero(~is_test).flatten(), "test": torch.nonzero(is_test).flatten()}
        chosen = select({part: targets[r] for part, r in rows.items()}, self.validation, self.subset, self.subset_test)
        taken = {name: rows[part.table][part.rows] for name, part in chosen.items()}
        mean, std = channel_statistics(images[taken["train"]])
        transform = PadCropFlip(Normalise(mean, std), self.padding)
        splits = {name: Split(Resident(images[taken[name]], transform), targets[taken[name]], part.ids) for name, part in chosen.items()}
        return Data(self.name, tuple(str(d) for d in range(10)), (1, 8, 8), mean, std, splits, len(targets))
