"""Ends a process when the one that started it dies, however it dies (Linux; elsewhere it does nothing)."""

import ctypes
import signal
import sys

PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


def die_with_parent() -> None:
    """Asks the kernel to end this process with SIGTERM when its parent dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
