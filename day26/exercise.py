"""Day 26, your turn: share out a batch, know each rank's sequences, and say it in Prometheus' words.

Fill in the three TODOs, then check yourself (any number of ranks; each checks for itself):

    deepspeed --num_accelerators 2 day26/exercise.py

It says what is wrong, or "solved". The answers are in solution.py. Source: day26/notes.md.
"""

import argparse
import sys
import traceback
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common/ is one level up

from common.errors import UserError, clear_errors
from common.ranks import print0, require_launcher


def share_out(global_batch: int, largest_micro: int, ranks: int) -> tuple[int, int] | None:
    """Return (micro-batch, accumulation steps) that make up `global_batch` on `ranks` ranks, or None if none do.

    The micro-batch is as large as it can be, and never larger than `largest_micro`, which is what fits in memory.
    """
    # TODO 1: global batch = micro-batch x accumulation x ranks, all of them whole numbers.
    raise NotImplementedError


def sequences(step: int, rank: int, ranks: int, micro: int, accumulation: int) -> list[int]:
    """Return the numbers of the sequences that `rank` reads in optimizer step `step`; steps begin at 1, numbers at 0.

    A step takes the next global batch of consecutive numbers; each round of micro-batches deals them to the ranks in
    order. What a step reads, all ranks together, must not depend on the number of ranks.
    """
    # TODO 2: first how many sequences came before this step, then this rank's part of each round.
    raise NotImplementedError


def exposition(metrics: dict[str, float | None], rank: int) -> str:
    """Return the page that a metrics endpoint serves: a line `name{rank="0"} value` for each known value.

    None is a value that nobody knows yet; a loss that is not a number is known, and an alert waits for it.
    """
    # TODO 3: leave out None alone; end each line with a newline, the last one as well.
    raise NotImplementedError


def check(share_out, sequences, exposition) -> None:
    """Try the three functions; UserError says what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.parse_args()
    require_launcher()
    try:
        for case, want in {(16, 8, 2): (8, 1), (16, 8, 1): (8, 2), (16, 8, 4): (4, 1), (24, 7, 2): (6, 2)}.items():
            if (found := share_out(*case)) != want:
                raise UserError(f"not yet: share_out{case} is {found}, want {want}.")
        if (found := share_out(16, 8, 3)) is not None:
            raise UserError(f"not yet: 16 sequences cannot be shared out among 3 ranks, and you say {found}.")
        for step in (1, 2, 7):
            for ranks, micro, accumulation in ((1, 8, 2), (2, 8, 1), (4, 4, 1), (2, 2, 4)):
                parts = [sequences(step, rank, ranks, micro, accumulation) for rank in range(ranks)]
                if sorted(sum(parts, [])) != list(range(16 * step - 16, 16 * step)):
                    want = f"{16 * step - 16} to {16 * step - 1}"
                    raise UserError(
                        f"not yet: step {step} on {ranks} ranks reads {sorted(sum(parts, []))}, want {want}."
                    )
        if (found := sequences(1, 1, 2, 2, 2)) != [2, 3, 6, 7]:
            raise UserError(f"not yet: rank 1 of 2, micro-batches of 2, two of them: {found}, want [2, 3, 6, 7].")
        page = exposition({"training_step": 40, "training_loss": float("nan"), "training_held_out_loss": None}, 1)
        try:
            read = {family.name: family.samples[0] for family in text_string_to_metric_families(page)}
        except (ValueError, IndexError) as error:
            raise UserError(f"not yet: Prometheus' parser does not read {page!r} ({error}).") from None
        if set(read) != {"training_step", "training_loss"}:
            raise UserError(f"not yet: the page has {sorted(read)}, want training_loss and training_step.")
        if any(sample.labels != {"rank": "1"} for sample in read.values()):
            raise UserError(f'not yet: each line wants the label rank="1"; you have {page!r}.')
        if not page.endswith("\n"):
            raise UserError(f"not yet: the last line wants a newline at its end as well; you have {page!r}.")
        if read["training_step"].value != 40:
            raise UserError(f"not yet: the step is 40, and your page says {read['training_step'].value:g}.")
        if read["training_loss"].value == read["training_loss"].value:
            raise UserError("not yet: the loss is not a number, which Prometheus writes as NaN.")
    except Exception as error:
        if isinstance(error, UserError | NotImplementedError):  # an open TODO is named by clear_errors
            raise
        asked = traceback.extract_tb(error.__traceback__)[0].line
        raise UserError(f"not yet: `{asked}` ended with {type(error).__name__}: {error}.") from error
    print0("solved: the same batch on any ranks, the same sequences, and a page that Prometheus reads")


if __name__ == "__main__":
    with clear_errors():
        check(share_out, sequences, exposition)
