"""What processes hold in memory, as /proc has it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

MIB = 2**20


def held(processes: Iterable[int], measure: str = "Pss") -> int:
    """Bytes that those of the processes hold that still live.

    Args:
        processes: their ids.
        measure: `Pss`, in which pages that several processes share count in parts, or `Pss_Anon`, less what files back.
    """
    total = 0
    for process in processes:
        with contextlib.suppress(OSError, IndexError):
            text = Path(f"/proc/{process}/smaps_rollup").read_text()
            total += 1024 * int(text.split(f"\n{measure}:")[1].split()[0])
    return total


def descendants(root: int) -> Iterator[int]:
    """Processes that a process has started, and that they have."""
    parents = dict(map(_read_parent, (int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit())))
    for process, ancestor in parents.items():
        while ancestor > 1 and ancestor != root:
            ancestor = parents.get(ancestor, 0)
        if ancestor == root:
            yield process


def _read_parent(process: int) -> tuple[int, int]:
    try:
        return process, int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return process, 0
