"""Defines the exceptions for what a user can mend, and for what may pass by itself."""


class UserError(ValueError):
    """A mistake, or something missing, that the user can mend.

    The message is one sentence or two: what is wrong, which value, and the way out. The command line
    prints it without a traceback and exits with status 2.
    """

    passing = False
    """Tells whether an error may pass by itself, so that a deployment retries."""


class Unavailable(UserError):
    """A service does not answer as it should; a retry may succeed."""

    passing = True


class CatalogUnavailable(Unavailable):
    """A catalog that does not answer, refuses, or gives no whole answer after all attempts."""


class Refused(UserError):
    """A server refuses an object; the caller knows whether it refuses all."""


class RefusedHop(UserError):
    """A server redirects to an address that may not be read."""


def may_pass(error: object) -> bool:
    """Returns whether an error may pass by itself: all but what a user must mend, so a lost worker or a bug too."""
    if isinstance(error, UserError):
        return error.passing
    return True
