"""ATOMIC-10x: triples of an event, a relation and an inference that GPT-3 wrote, with what the critic said of each.

Symbolic Knowledge Distillation (West et al., NAACL 2022, arXiv 2110.07178) and its public code, which states the fields (head, relation,
tail, split, rec_X, p_valid_model) and the format of a row:  <head> h </head> <relation> r </relation> [GEN] t
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdrun import rng
from kdrun.dataset.files import Files, Table
from kdrun.dataset.names import draw_names, named
from kdrun.dataset.text import TextData
from kdrun.errors import Problem, Refused

FIELDS = ("head", "relation", "tail", "split")
SPLITS = {"train": "train", "validation": "val", "test": "test"}  # ours -> those of the field `split`
RELEASED = "mATOMIC10X"  # the released file


@dataclass
class AtomicData(TextData):
    """Settings: conf/dataset/atomic10x.yaml; those of `TextData` mean what they mean there."""

    name: str = "atomic10x"
    template: bool = False
    separator: str = ""
    max_length: int = 64
    recall: float | None = None
    names: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.recall is not None and not 0 < self.recall <= 1:
            raise ValueError(f"recall={self.recall}: legal range (0, 1], or null for all rows")

    def _open(self) -> dict[str, Table]:
        """Prompts and completions of each split. Only the training rows are the critic's choice: all arms are tested on the same rows."""
        single = self.path is not None and Path(self.path).expanduser().is_file()
        stem = Path(str(self.path)).name.split(".")[0] if single else RELEASED
        flag = None if self.recall is None else f"rec_{self.recall}"
        wanted = (*FIELDS, *([flag] if flag else []))
        table = Files(self.path, self.hub, self.revision, self.format, {"train": stem}, wanted).open()["train"]
        missing = [column for column in wanted if column not in table.columns]
        if missing:
            remedy = f"there are {', '.join(table.columns)}; rec_X are the released thresholds"
            raise Refused(Problem(f"no field {', '.join(missing)}", "dataset.path", table.where, remedy))
        fields = {column: list(table.rows[column]) for column in wanted}
        _refuse_shared_heads(fields["head"], fields["split"], table.where)
        places: dict[str, list[int]] = {split: [] for split in SPLITS}
        ours = {theirs: split for split, theirs in SPLITS.items()}
        for i, theirs in enumerate(fields["split"]):
            split = ours.get(theirs)
            if split is not None and (split != "train" or flag is None or fields[flag][i]):
                places[split].append(i)
        return {split: self._table(fields, rows, table, split) for split, rows in places.items() if rows or split != "validation"}

    def _table(self, fields: dict[str, list[Any]], rows: list[int], whole: Table, split: str) -> Table:
        if not rows:
            what = f"no row of the {split} split is left"
            raise Refused(Problem(what, "dataset.recall", whole.where, "a larger dataset.recall, or null"))
        pairs = [self._formatted(i, *(str(fields[column][i]) for column in FIELDS[:3])) for i in rows]
        columns = {"prompt": [before for before, _ in pairs], "completion": [after for _, after in pairs]}
        return Table(columns, f"{whole.where}, {split}", whole.sources)

    def _formatted(self, row: int, head: str, relation: str, tail: str) -> tuple[str, str]:
        """(what is read, what is learned)."""
        if self.names:
            names = draw_names(f"{head} {tail}", rng.key(0, "names"), row)
            head, tail = named(head, names), named(tail, names)
        return f"<head> {head} </head> <relation> {relation} </relation> [GEN]", f" {tail.strip()}"


def _refuse_shared_heads(heads: list[Any], splits: list[Any], where: str) -> None:
    """Raise `Refused` where an event is in two splits: what is tested would have been learned."""
    first: dict[Any, Any] = {}
    for head, split in zip(heads, splits, strict=True):
        if first.setdefault(head, split) != split:
            what = f"the event '{head}' is in the splits {first[head]} and {split}"
            raise Refused(Problem(what, "dataset.path", where, "cut the rows into splits by their heads"))
