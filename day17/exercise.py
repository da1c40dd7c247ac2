"""Day 17, your turn: save so that a power cut at any moment leaves a whole checkpoint; load only such.

Fill in the two TODOs, then check yourself (any number of ranks; each checks for itself):

    deepspeed --num_accelerators 2 day17/exercise.py

It cuts the power after each operation of your save, damages each file in turn, and says what is wrong, or "solved".
The answers are in solution.py. Source: day17/notes.md.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common/ is one level up

from common.errors import UserError, clear_errors
from common.ranks import print0, require_launcher

PowerCut = type("PowerCut", (BaseException,), {})


class Disk:
    """A disk that forgets: what was written and not flushed is cut in half when the power fails.

    `files` maps names such as "step000002/weights" to bytes. Renaming a folder is one operation: all of it or nothing.
    """

    def __init__(self) -> None:
        self.files, self.flushed, self.left = {}, set(), 10**9

    def _operation(self) -> None:
        if self.left == 0:
            raise PowerCut
        self.left -= 1

    def write(self, name: str, content: bytes) -> None:
        self._operation()
        self.files[name] = content
        self.flushed.discard(name)

    def flush(self, name: str) -> None:
        self._operation()
        self.flushed.add(name)

    def rename_folder(self, old: str, new: str) -> None:
        self._operation()
        for name in [name for name in self.files if name.startswith(f"{old}/")]:
            moved = new + name.removeprefix(old)
            self.files[moved] = self.files.pop(name)
            self.flushed |= {moved} if name in self.flushed else set()

    def power_comes_back(self) -> None:
        self.left = 10**9
        for name in self.files.keys() - self.flushed:
            self.files[name] = self.files[name][: len(self.files[name]) // 2]


def save(disk: Disk, step: int, content: dict[str, bytes]) -> None:
    """Save `content` ({file name: bytes}) as the checkpoint of `step`."""
    # TODO 1: write each file, and a file of SHA-256 sums (hashlib), under another folder name; flush every file;
    # then give the folder its name, f"step{step:06d}".
    # 把 content（{文件名: 字节}）存成第 step 步的检查点。先把每个文件和一个 SHA-256（hashlib）校验和文件写在另一个目
    # 录名下；flush 每个文件；然后给目录换上正式的名字 f"step{step:06d}"。
    raise NotImplementedError


def load_newest(disk: Disk) -> tuple[int, dict[str, bytes]] | None:
    """Return (step, content) of the newest checkpoint that is whole, None when there is none."""
    # TODO 2: newest first, look only at folders named step......; the names and sums must be those that were saved.
    # 返回最新的完整检查点 (step, content)，没有就返回 None。从最新的开始，只看名为 step...... 的目录；文件名和校验和
    # 必须与保存时一致。
    raise NotImplementedError


def check(save, load_newest) -> None:
    """Cut the power everywhere, damage everything; UserError says what came back wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.parse_args()
    require_launcher()
    content = {step: {"weights": bytes([step]) * 50, "optimizer": bytes(range(step, 99))} for step in (9, 10, 11)}

    def saved(*steps: int, cut_at: int = 10**9) -> tuple[Disk, bool]:
        disk = Disk()
        try:
            for step in steps:
                disk.left = cut_at if step == steps[-1] else 10**9
                save(disk, step, content[step])
        except PowerCut:
            step = None
        disk.power_comes_back()  # it fails right after save returned, too: what save promised must be there
        return disk, step is not None

    def expect(disk: Disk, steps: tuple, when: str) -> None:
        try:
            step, found = load_newest(disk) or (None, None)
        except (ValueError, TypeError, KeyError, IndexError) as error:  # JSON that is cut in half, a file that is gone
            reason = f"{type(error).__name__}: {error}"
            raise UserError(
                f"not yet: {when}, load_newest ended with {reason}. Pass over what it cannot read."
            ) from error
        if step not in steps or (step is not None and found != content[step]):
            right = " or ".join(map(str, steps))
            raise UserError(f"not yet: {when}, load_newest gave step {step}, want {right} with what was saved.")

    expect(saved(9)[0], (9,), "after one save and a power cut")
    if any(name.startswith("step000010/") for name in saved(9, 10, cut_at=1)[0].files):
        raise UserError("not yet: the first thing that save wrote is already under the final name: rename last.")
    cuts, completed = -1, False
    while not completed:
        disk, completed = saved(9, 10, cut_at=(cuts := cuts + 1))
        expect(disk, (10,) if completed else (9, 10), f"with the power cut after {cuts} operations of the 2nd save")
    for name in [name for name in disk.files if name.startswith("step000010/")]:
        for damage, harm in (("truncated", lambda old: old[:-1]), ("changed", lambda old: old[:-1] + b"?")):
            disk, _ = saved(9, 10)
            disk.files[name] = harm(disk.files[name])
            expect(disk, (9,), f"with {name} {damage}")
        disk, _ = saved(9, 10)
        del disk.files[name]
        expect(disk, (9,), f"with {name} deleted")
    print0(f"solved: {cuts} power cuts, every kind of damage, and what came back was always whole")


if __name__ == "__main__":
    with clear_errors():
        check(save, load_newest)
