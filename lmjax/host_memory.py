"""How the C library gives memory back, which a training step on CPU feels."""

from __future__ import annotations

import os
import platform
import sys

VARIABLE = "GLIBC_TUNABLES"
KEEP = ":".join(
    (
        "glibc.malloc.hugetlb=1",
        "glibc.malloc.mmap_max=0",
        "glibc.malloc.trim_threshold=1000000000000",
        "glibc.malloc.arena_max=1",  # threads' own arenas unmap what they free, whatever the threshold
    )
)


def keep_freed_memory() -> None:
    """Starts this process over, once, with an allocator that keeps what was freed, in huge pages.

    A compiled step takes its temporary memory in one piece. By default glibc maps such a piece anew at every step and
    the kernel faults in each of its pages: 8 to 18 % of a training step on two cores (`docs/performance.md`). The
    settings are read at process start only, hence the restart; it happens before anything heavy is imported, keeps the
    process id, and does nothing off Linux with glibc or where the variable is set (`GLIBC_TUNABLES= ` opts out).
    """
    if VARIABLE in os.environ or not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc":
        return
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, VARIABLE: KEEP})
