"""Waits in tests, which are bounded."""

import time

from infra.sandbox import servers


def until(found, patience=servers.PATIENCE, every=0.05):
    """Asks again and again until there is something true, and returns it."""
    end = time.monotonic() + patience
    while not (answer := found()):
        assert time.monotonic() < end, f"it did not come to pass in {patience:.0f} s"
        time.sleep(every)
    return answer
