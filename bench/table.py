"""One question, one table: print each row as it comes and save all rows so far, so that an interrupted run keeps them.

    table = Table("runs/mine/compare.json", {"tok/s": "tokens_per_s:,.0f", "held MB": "held_bytes:MB"}, ranks=2)
    for case in cases:
        with table.row(case) as row:          # an out-of-memory inside becomes the row's "error"
            row |= measure(case)
    table.bars("tokens_per_s", "tokens/s", "two ranks")

Every rank calls it alike; rank 0 alone prints and writes. Checked with torch 2.13.0, gloo and NCCL.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from bench.memory import is_out_of_memory, out_of_memory_ends
from bench.results import this_command, write_results
from bench.timing import losses_apart
from common.plots import plot_bars
from common.ranks import print0
from common.run_log import show_path

PATIENCE = timedelta(seconds=120)  # for the slowest rank of a case
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
        # The ranks ask each other through a group of their own: a collective that one of them left must not meet this.
        self.judges = dist.new_group(backend="gloo", timeout=PATIENCE) if dist.is_initialized() else None
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
        """Fill the row that it yields within the block, then `add` it; out of memory is a result, not the end.

        Collective. When memory ran out on one rank, the row has "error" on all. Where the others stand in a collective
        of the block meanwhile and do not come, this rank ends, and with it the job: the rows before are written.
        """
        row, ran_out = {"case": case, **known}, False
        try:
            yield row
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            ran_out = True  # and nothing else is kept: the error holds its frames, and the tensors in them
        if self._on_any_rank(ran_out):
            row["error"] = "out of memory"
        self.add(row)

    def _on_any_rank(self, ran_out: bool) -> bool:
        if self.judges is None:
            return ran_out
        found = torch.tensor(int(ran_out))
        with out_of_memory_ends() if ran_out else nullcontext():
            try:
                dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.judges)
            except RuntimeError as error:
                if not ran_out:
                    raise
                raise MemoryError("out of memory on this rank, while the others wait for it") from error
        return bool(found)

    def from_first(self, row: dict) -> float:
        """The largest difference of the row's "losses" to those of the first row that has no error."""
        first = next((other for other in self.rows if "error" not in other), row)
        return losses_apart(row["losses"], first["losses"])

    def save(self, **facts: object) -> None:
        """Write all rows so far, with `facts` that are known by now."""
        self.facts |= facts
        if not dist.is_initialized() or dist.get_rank() == 0:
            write_results(self.path, this_command(), **self.facts, table=self.rows)

    def bars(self, key: str, unit: str, title: str, name: str = "", scale: float = 1.0, label: str = "{case}") -> None:
        """Draw the rows' `key` divided by `scale` beside the table, as NAME.png (default: the key's name)."""
        if not dist.is_initialized() or dist.get_rank() == 0:
            done = [row for row in self.rows if "error" not in row]
            values = {label.format(**row): row[key] / scale for row in done if row.get(key) is not None}
            plot_bars(values, self.path.with_name(f"{name or key}.png"), title, unit)

    def close(self) -> None:
        """Say where the table lies."""
        print0(f"table: {show_path(self.path)}")
