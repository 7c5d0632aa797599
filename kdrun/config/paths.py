"""Where configuration lives: the package's own conf/ and recipes/, and folders that a user adds."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kdrun.errors import Problem, Refused

GROUPS = ("teacher", "student", "dataset", "source", "objective", "plan", "optim", "evaluation", "hardware", "cache", "track")
MANY = ("track",)  # of these several options may be chosen at once: track=[tensorboard,mlflow]


def home() -> Path:
    """The folder that holds conf/ and recipes/: the source tree, or the copy inside the installed wheel."""
    package = Path(__file__).resolve().parent.parent
    source = package.parent
    return source if (source / "conf" / "config.yaml").is_file() and (source / "recipes").is_dir() else package / "_data"


def kept() -> Path:
    """The folder of what is kept between runs and can be made again: KDRUN_CACHE, or .cache/kdrun of the user."""
    return Path(os.environ.get("KDRUN_CACHE") or Path.home() / ".cache" / "kdrun")


def importable(config_dirs: Sequence[Path | str]) -> None:
    """Let Python find code that lies in a user's own folders. At the end of its path they shadow nothing; what may be named of it is still
    what run.allow says."""
    sys.path += [str(folder) for folder in config_dirs if str(folder) not in sys.path]


@dataclass(frozen=True)
class SearchPath:
    """Folders searched for group files and recipes; the package's own first, so that nobody shadows them unaware."""

    roots: tuple[Path, ...]  # each holds recipes/ and either conf/<group> or <group>

    @staticmethod
    def of(config_dirs: Sequence[Path | str] = ()) -> SearchPath:
        extra = [Path(d).expanduser().resolve() for d in config_dirs]
        missing = [d for d in extra if not d.is_dir()]
        if missing:
            raise Refused(
                [
                    Problem("no such folder", str(d), "--config-dir", "give a folder with conf/<group>/*.yaml or recipes/*.yaml")
                    for d in missing
                ]
            )
        return SearchPath((home(), *extra))

    def conf_dirs(self) -> list[Path]:
        return [r / "conf" if (r / "conf").is_dir() else r for r in self.roots]

    def options(self, group: str) -> dict[str, Path]:
        """Name -> file of every option of a group ("recipes" included). Files that begin with _ are parts, not options."""
        folders = [r / "recipes" for r in self.roots] if group == "recipes" else [c / group for c in self.conf_dirs()]
        found: dict[str, Path] = {}
        for folder in folders:
            for file in sorted(folder.glob("*.yaml")):
                if not file.name.startswith("_"):
                    found.setdefault(file.stem, file)
        return dict(sorted(found.items()))

    def file(self, group: str, name: str) -> Path | None:
        """The file of an option or a part (`_name`), or None."""
        folders = [r / "recipes" for r in self.roots] if group == "recipes" else [c / group for c in self.conf_dirs()]
        return next((f / f"{name}.yaml" for f in folders if (f / f"{name}.yaml").is_file()), None)

    def short(self, file: Path) -> str:
        """A path as a reader would write it: relative to the root it was found under."""
        for root in self.roots:
            if file.is_relative_to(root):
                return str(file.relative_to(root))
        return str(file)
