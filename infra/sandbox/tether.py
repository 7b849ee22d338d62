"""Ends a process when the one that started it dies, however it dies (Linux; elsewhere it does nothing).

As a script it is put before a command: `python tether.py PARENT_PID COMMAND...` becomes COMMAND.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # <sys/prctl.h>; it survives execve


def die_with_parent() -> None:
    """Asks the kernel to end this process with SIGTERM when its parent dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def main() -> None:
    """Becomes the command, tethered; or ends, where the parent has died meanwhile."""
    die_with_parent()
    if os.getppid() == int(sys.argv[1]):
        os.execv(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
