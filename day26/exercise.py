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
    # 返回在 ranks 个 rank 上凑成 global_batch 的（micro-batch，累积步数），凑不成返回 None。micro-batch 尽量大，但不
    # 超过 largest_micro（内存放得下的）。全局批次 = micro-batch x 累积步数 x rank 数，都是整数。
    raise NotImplementedError


def sequences(step: int, rank: int, ranks: int, micro: int, accumulation: int) -> list[int]:
    """Return the numbers of the sequences that `rank` reads in optimizer step `step`; steps begin at 1, numbers at 0.

    A step takes the next global batch of consecutive numbers; each round of micro-batches deals them to the ranks in
    order. What a step reads, all ranks together, must not depend on the number of ranks.
    """
    # TODO 2: first how many sequences came before this step, then this rank's part of each round.
    # 返回 rank 在第 step 个优化器步读的序列编号；步从 1 开始，编号从 0 开始。一步取接下来一个全局批次的连续编号；每一
    # 轮 micro-batch 按顺序分给各 rank。一步里所有 rank 读的合起来，不能随 rank 数变化。先算这一步之前有多少序列，再算
    # 每一轮里属于这个 rank 的部分。
    raise NotImplementedError


def exposition(metrics: dict[str, float | None], rank: int) -> str:
    """Return the page that a metrics endpoint serves: a line `name{rank="0"} value` for each known value.

    None is a value that nobody knows yet; a loss that is not a number is known, and an alert waits for it.
    """
    # TODO 3: leave out None alone; end each line with a newline, the last one as well.
    # 返回 metrics 端点的页面：每个已知的值一行 `name{rank="0"} value`。None 是还没人知道的值；不是数的损失是已知的，
    # 有告警等着它。只略去 None；每行以换行结尾，最后一行也一样。
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
