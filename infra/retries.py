"""Retries calls to services, by one policy of attempts and waits for store, web, archive and catalog.

Each of these knows itself which of its errors another attempt may mend. Below this, obstore and urllib3 ask again for
what they know: a connection that breaks, a server that is busy.
"""

import random
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from tenacity import AsyncRetrying, RetryCallState, Retrying, retry_if_exception, stop_after_attempt

T = TypeVar("T")

FIRST_WAIT = 0.5  # seconds before the second attempt on average; doubled before each further one
JITTER = (0.5, 1.5)  # random factor of a wait, so that workers that failed together do not retry together
LONGEST_WAIT = 60.0  # seconds; bounds a wait that a server asks for


def ask(call: Callable[[], T], attempts: int, mends: Callable[[Any], bool], tell: Callable[[Any], object] = bool) -> T:
    """Calls until an attempt succeeds; Ctrl-C ends a wait at once.

    A server's `Retry-After` is honoured where the error has it as an attribute `retry_after`, in seconds.

    Args:
        call: What is tried.
        attempts: How often at most.
        mends: Tells whether another attempt may mend an error.
        tell: Is told of an error before the wait for the next attempt.

    Returns:
        What the call returns. Its last error is raised as it is.
    """
    return Retrying(**_policy(attempts, mends, tell))(call)


async def ask_async(
    call: Callable[[], Awaitable[T]], attempts: int, mends: Callable[[Any], bool], tell: Callable[[Any], object] = bool
) -> T:
    """Does the same on an event loop, where a wait can be cancelled."""
    return await AsyncRetrying(**_policy(attempts, mends, tell))(call)


def _policy(attempts: int, mends: Callable[[Any], bool], tell: Callable[[Any], object]) -> dict[str, Any]:
    return {
        "stop": stop_after_attempt(attempts),
        "retry": retry_if_exception(mends),
        "wait": _wait,
        "before_sleep": lambda state: tell(_error(state)),
        "reraise": True,
    }


def _wait(state: RetryCallState) -> float:
    """Returns the seconds to wait after an attempt."""
    backoff = FIRST_WAIT * 2 ** (state.attempt_number - 1) * random.uniform(*JITTER)
    return max(backoff, min(getattr(_error(state), "retry_after", 0.0), LONGEST_WAIT))


def _error(state: RetryCallState) -> BaseException | None:
    if state.outcome:
        return state.outcome.exception()
    return None


def retry_after(told: str | None) -> float:
    """Returns the seconds that a `Retry-After` header asks to wait, given as a number or as a date; 0 for neither."""
    if not told:
        return 0.0
    if told.isdigit():
        return float(told)
    try:
        return (parsedate_to_datetime(told) - datetime.now(UTC)).total_seconds()
    except (TypeError, ValueError):
        return 0.0
