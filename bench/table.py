"""One question, one table: print each row as it comes and save all rows so far, so that an interrupted run keeps them.

    table = Table("runs/mine/compare.json", {"tok/s": "tokens_per_s:,.0f", "held MB": "held_bytes:MB"}, ranks=2)
    for case in cases:
        with table.row(case) as row:          # an out-of-memory inside becomes the row's "error"
            row |= measure(case)
    table.bars("tokens_per_s", "tokens/s", "two ranks")

All ranks may call it; rank 0 alone prints and writes.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from bench.memory import is_out_of_memory
from bench.results import this_command, write_results
from common.plots import plot_bars
from common.ranks import print0
from common.run_log import show_path

UNITS = {"MB": 1e6, "GB": 1e9, "GiB": 2**30}


def cell(row: dict, column: str) -> str:
    """The value of `key:format` in `row`, as text; MB, GB and GiB are formats, None is "-".

    `a.b` is a nested key, `a.-1` the last of a list.
    """
    key, _, form = column.partition(":")
    value = functools.reduce(_within, key.split("."), row)
    if value is None:
        return "-"
    return f"{value / UNITS[form]:,.2f}" if form in UNITS else format(value, form)


def _within(found: dict | list | None, part: str) -> object:
    return found[int(part)] if isinstance(found, list) else (found or {}).get(part)


class Table:
    """Rows of a comparison: on the terminal, and as `path` (JSON with machine, versions, command and date).

    `columns` maps a heading to "key:format" of a row; the first column is the row's "case". Further keyword arguments
    are written beside the rows.
    """

    def __init__(self, path: str | Path, columns: dict[str, str], width: int = 18, **facts: object) -> None:
        self.path, self.columns, self.width, self.facts = Path(path), columns, width, facts
        self.rows: list[dict] = []
        self.widths = {heading: max(len(heading) + 2, 11) for heading in columns}
        print0(f"{'case':{width}}" + "".join(f"{head:>{size}}" for head, size in self.widths.items()))

    def add(self, row: dict) -> None:
        """Print `row`, whose "case" names it, and save it with those before."""
        self.rows.append(row)
        if "error" in row:
            print0(f"{row['case']:{self.width}}  {row['error']}")
        else:
            cells = (f"{cell(row, column):>{self.widths[head]}}" for head, column in self.columns.items())
            print0(f"{row['case']:{self.width}}" + "".join(cells))
        self.save()

    @contextmanager
    def row(self, case: str, **known: object) -> Iterator[dict]:
        """Fill the row that it yields within the block, then `add` it; out of memory is a result, not the end."""
        row = {"case": case, **known}
        try:
            yield row
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            row["error"] = "out of memory"
        self.add(row)

    def save(self, **facts: object) -> None:
        """Write all rows so far, with `facts` that are known by now."""
        self.facts |= facts
        if not dist.is_initialized() or dist.get_rank() == 0:
            write_results(self.path, this_command(), **self.facts, table=self.rows)

    def bars(self, key: str, unit: str, title: str, name: str = "", scale: float = 1.0, label: str = "{case}") -> None:
        """Draw the rows' `key` divided by `scale` beside the table, as NAME.png (default: the key's name)."""
        if not dist.is_initialized() or dist.get_rank() == 0:
            values = {label.format(**row): row[key] / scale for row in self.rows if row.get(key) is not None}
            plot_bars(values, self.path.with_name(f"{name or key}.png"), title, unit)

    def close(self) -> None:
        """Say where the table lies."""
        print0(f"table: {show_path(self.path)}")
