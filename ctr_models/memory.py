"""What a process does with memory that it has freed.

glibc returns large blocks to the system, such as a pass's activations, and the system clears the same pages again
for the next pass: with a thousand rows and more that takes as long as the pass itself.
"""

from __future__ import annotations

import ctypes


def keep_freed_memory(limit: int = 1 << 30) -> None:
    """Let this process keep up to ``limit`` freed bytes for its next allocations, where its C library is glibc.

    Blocks of 32 MiB and more are still returned at once.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library
        return
    m_trim_threshold, m_mmap_threshold = -1, -3
    mallopt(m_mmap_threshold, 32 << 20)
    mallopt(m_trim_threshold, limit)
