"""Day 21: fragmentation without a GPU - PyTorch's caching allocator by its own rules, fed with a recorded trace.

    from day21.allocator import CachingAllocator, replay

    allocator = CachingAllocator(capacity=2**30, expandable=False)
    curve = replay(events, allocator)          # [("alloc", key, bytes), ("free", key, 0), ...]
    print(allocator.reserved - allocator.allocated)

The rules are those of c10/cuda/CUDACachingAllocator.cpp and c10/core/AllocatorConfig.h, each beside the code that keeps
it. Left out, as a training step on one stream never meets them: several streams, CUDA graphs' private pools, garbage
collection, `roundup_power2_divisions`.
Checked with torch 2.13.0. Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#memory-management
"""

import bisect
from dataclasses import dataclass, field

MIB = 2**20
MIN_BLOCK = 512  # kMinBlockSize: every size is a multiple of it
SMALL = MIB  # kSmallSize: up to here a request goes to the small pool
SMALL_SEGMENT = 2 * MIB  # kSmallBuffer
LARGE_SEGMENT = 20 * MIB  # large_segment_size, kLargeBuffer in older versions
MIN_LARGE = 10 * MIB  # kMinLargeAlloc: from here on a segment is as large as the request
ROUND_LARGE = 2 * MIB  # kRoundLarge


class OutOfMemory(MemoryError):
    """What PyTorch says when no block fits and the device has no more; the numbers are attributes as well."""

    def __init__(self, tried: int, capacity: int, reserved: int, allocated: int) -> None:
        self.tried, self.capacity, self.reserved, self.allocated = tried, capacity, reserved, allocated
        super().__init__(
            f"out of memory. Tried to allocate {tried / MIB:.2f} MiB of {capacity / MIB:.2f} MiB, of which "
            f"{(capacity - reserved) / MIB:.2f} MiB is free. {allocated / MIB:.2f} MiB is allocated, and "
            f"{(reserved - allocated) / MIB:.2f} MiB is reserved but unallocated"
        )


@dataclass(eq=False)
class Block:
    """A range of a segment: in use, free, or (of an expandable segment) addresses without memory behind them."""

    address: int
    size: int
    is_small: bool
    expandable: bool = False
    mapped: bool = True
    in_use: bool = False
    requested: int = 0
    before: "Block | None" = field(default=None, repr=False)
    after: "Block | None" = field(default=None, repr=False)


class CachingAllocator:
    """Memory of one device as PyTorch hands it out; `capacity` in bytes, None: there is always more.

    `expandable`: expandable_segments:True. `max_split`: max_split_size_mb in bytes. Properties: allocated (in blocks in
    use), reserved (taken from the device), their peaks, device_calls (cudaMalloc, cudaFree, map, unmap: each slow).
    """

    def __init__(self, capacity: int | None = None, expandable: bool = False, max_split: int | None = None) -> None:
        self.capacity, self.expandable = capacity or 2**50, expandable
        self.max_split = max_split or 2**62
        self.free_blocks: dict[bool, list] = {True: [], False: []}  # is small: [(size, address, block)], sorted
        self.heads: dict[int, Block] = {}  # address of a segment: its first block
        self.next_address = 0
        self.allocated = self.reserved = self.peak_allocated = self.peak_reserved = 0
        self.device_calls = self.retries = 0

    # ---- what a tensor sees ----

    def malloc(self, requested: int) -> Block:
        """A block of at least `requested` bytes. Raises OutOfMemory."""
        size = -(-max(requested, 1) // MIN_BLOCK) * MIN_BLOCK  # round_size
        is_small = size <= SMALL  # get_pool
        block = self._best_fit(size, is_small) or self._from_device(size, is_small)
        if block is None and self._release_oversize(size, is_small):
            block = self._from_device(size, is_small)
        if block is None:  # the last resort: give back every segment that nobody uses any part of
            self.retries += 1
            self.empty_cache()
            block = self._from_device(size, is_small)
        if block is None:
            raise OutOfMemory(requested, self.capacity, self.reserved, self.allocated)
        if self._should_split(block, size):
            self._split(block, size)
        block.in_use, block.requested = True, requested
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return block

    def free(self, block: Block) -> None:
        """Put the block back, one with its free neighbours (try_merge_blocks). The device gets nothing back."""
        block.in_use, block.requested = False, 0
        self.allocated -= block.size
        self._keep(self._merge(block))

    def empty_cache(self) -> None:
        """Give back segments that are free as a whole (release_blocks); of expandable ones, each free page."""
        for is_small in (True, False):
            for _, _, block in list(self.free_blocks[is_small]):
                if block.expandable:
                    self._unmap(block)
                elif block.before is None and block.after is None:
                    self._release(block)

    # ---- the rules ----

    def _best_fit(self, size: int, is_small: bool) -> Block | None:
        """The smallest free block that is large enough, of two alike the one at the lower address (get_free_block)."""
        pool = self.free_blocks[is_small]
        at = bisect.bisect_left(pool, (size,))
        if at == len(pool):
            return None
        if self.expandable:  # the end of the segment counts with all that it could still grow by: it is taken last
            while at + 1 < len(pool) and _could_be(pool[at + 1][2]) < _could_be(pool[at][2]):
                at += 1
        block = pool[at][2]
        if size < self.max_split <= block.size:
            return None  # a block that must not be split is kept for a large request
        if size >= self.max_split and block.size >= size + LARGE_SEGMENT:
            return None  # nor is more than 20 MiB of it given away
        del pool[at]
        return block

    def _should_split(self, block: Block, size: int) -> bool:
        """Small and expandable: whenever 512 bytes remain. Large: when more than 1 MiB does; the rest is slack."""
        left = block.size - size
        if block.is_small or self.expandable:
            return left >= MIN_BLOCK
        return size < self.max_split and left > SMALL

    def _from_device(self, size: int, is_small: bool) -> Block | None:
        """cudaMalloc of a new segment (alloc_block), None when the device has no more."""
        segment = SMALL_SEGMENT if is_small else LARGE_SEGMENT if size < MIN_LARGE else _up(size, ROUND_LARGE)
        if self.reserved + segment > self.capacity:
            return None
        if self.expandable:
            return self._expand(size, is_small)
        block = Block(self.next_address, segment, is_small)
        self.next_address += segment + LARGE_SEGMENT  # a gap: two segments never merge
        self.heads[block.address] = block
        self._reserve(segment)
        return block

    def _expand(self, size: int, is_small: bool) -> Block | None:
        """Map pages of 2 or 20 MiB where the addresses are still empty (try_allocate_expandable_block).

        The lowest place counts where free and unmapped neighbours together are large enough.
        """
        page = SMALL_SEGMENT if is_small else LARGE_SEGMENT
        for head in list(self.heads.values()):
            block = head if head.expandable and head.is_small == is_small else None
            while block and _room(block) < size:  # 0 when it is in use
                block = block.after
            if block:
                break
        else:
            block = Block(self.next_address, _up(self.capacity * 9 // 8, page), is_small, expandable=True, mapped=False)
            self.next_address += block.size + LARGE_SEGMENT
            self.heads[block.address] = block
        if block.mapped:
            self._forget(block)
        elif not self._map(block, min(size, block.size), page):
            return None
        block = self._merge(block)
        while block.size < size:  # free, then unmapped: map some more, and they are one
            if not block.after.mapped and not self._map(block.after, min(size - block.size, block.after.size), page):
                self._keep(block)
                return None
            block = self._merge(block)
        return block

    def _map(self, block: Block, size: int, page: int) -> bool:
        """Put memory behind the first `size` bytes of `block`, in whole pages; tell whether there was enough."""
        size = min(_up(size, page), block.size)
        if self.reserved + size > self.capacity:
            return False
        if size < block.size:
            self._cut(block, size)
        block.mapped = True
        self._reserve(size)
        return True

    def _unmap(self, block: Block) -> None:
        """Take the memory from the whole pages of a free block (unmap_block)."""
        page = SMALL_SEGMENT if block.is_small else LARGE_SEGMENT
        first = self._segment_of(block).address
        start = first + _up(block.address - first, page)
        end = first + (block.address + block.size - first) // page * page
        if end <= start:
            return
        self._forget(block)
        if start > block.address:
            left, block = block, self._cut(block, start - block.address)
            self._keep(left)
        if end < block.address + block.size:
            self._keep(self._cut(block, end - block.address))
        block.mapped = False
        self._reserve(-block.size)
        self._merge(block)

    def _release_oversize(self, size: int, is_small: bool) -> bool:
        """Only what max_split_size kept whole is given back, the largest first (release_available_cached_blocks)."""
        if self.max_split == 2**62:
            return False
        size, freed = max(size, self.max_split), 0
        pool = self.free_blocks[is_small]
        whole = [b for s, _, b in pool if s >= self.max_split and not b.before and not b.after]
        if enough := [block for block in whole if block.size >= size]:
            self._release(enough[0])
            return True
        while whole and freed < size:
            freed += whole[-1].size
            self._release(whole.pop())
        return freed >= size

    # ---- book-keeping ----

    def _split(self, block: Block, size: int) -> None:
        self._keep(self._cut(block, size))

    def _cut(self, block: Block, size: int) -> Block:
        """Shorten `block` to `size` bytes; return the rest, its new neighbour."""
        rest = Block(block.address + size, block.size - size, block.is_small, block.expandable, block.mapped)
        rest.before, rest.after = block, block.after
        if rest.after:
            rest.after.before = rest
        block.after, block.size = rest, size
        return rest

    def _merge(self, block: Block) -> Block:
        """Swallow the free neighbours; return the block that is left, the one with the lowest address."""
        if (after := block.after) and not after.in_use and after.mapped == block.mapped:
            self._forget(after)
            block.size, block.after = block.size + after.size, after.after
            if block.after:
                block.after.before = block
        if (before := block.before) and not before.in_use and before.mapped == block.mapped:
            self._forget(before)
            before.size, before.after = before.size + block.size, block.after
            if before.after:
                before.after.before = before
            block = before
        return block

    def _keep(self, block: Block) -> None:
        bisect.insort(self.free_blocks[block.is_small], (block.size, block.address, block))

    def _forget(self, block: Block) -> None:
        pool = self.free_blocks[block.is_small]
        at = bisect.bisect_left(pool, (block.size, block.address))
        if at < len(pool) and pool[at][2] is block:
            del pool[at]

    def _release(self, block: Block) -> None:
        self._forget(block)
        del self.heads[block.address]
        self._reserve(-block.size)

    def _reserve(self, size: int) -> None:
        self.reserved += size
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        self.device_calls += 1

    def _segment_of(self, block: Block) -> Block:
        while block.before:
            block = block.before
        return block

    def segments(self) -> list[dict]:
        """The state in the form of `torch.cuda.memory._snapshot()["segments"]`, for day21/snapshot.py to draw."""
        found = []
        for head in self.heads.values():
            blocks, block = [], head
            while block:
                if block.mapped:
                    state = "active_allocated" if block.in_use else "inactive"
                    blocks.append({"address": block.address, "size": block.size, "state": state})
                block = block.after
            size, used = (sum(b["size"] for b in blocks if b["state"] in states) for states in STATES)
            kind = "small" if head.is_small else "large"
            row = {"address": head.address, "total_size": size, "allocated_size": used, "segment_type": kind}
            found += [row | {"is_expandable": head.expandable, "blocks": blocks}] * bool(blocks)
        return found


STATES = ({"active_allocated", "inactive"}, {"active_allocated"})


def _up(size: int, step: int) -> int:
    return -(-size // step) * step


def _room(block: Block) -> int:
    """Bytes of this block and the free or unmapped ones behind it."""
    total = 0
    while block and not block.in_use:
        total, block = total + block.size, block.after
    return total


def _could_be(block: Block) -> int:
    """What a free block could grow to, when nothing is mapped behind it (expandable_size)."""
    return block.size + (block.after.size if block.after and not block.after.mapped else 0)


def replay(events: list[tuple], allocator: CachingAllocator) -> list[tuple[int, int]]:
    """Feed ("alloc", key, bytes) and ("free", key, 0) to `allocator`; return (allocated, reserved) after each.

    Frees of what was allocated before the recording began are left out. Raises OutOfMemory where PyTorch would.
    """
    held: dict[object, Block] = {}
    curve = []
    for action, key, size in events:
        if action == "alloc":
            held[key] = allocator.malloc(size)
        elif key in held:
            allocator.free(held.pop(key))
        curve.append((allocator.allocated, allocator.reserved))
    return curve
