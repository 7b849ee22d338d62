"""The exceptions for what a user can put right, and for what passes by itself."""


class UserError(ValueError):
    """A mistake or a missing thing that the user can mend.

    The message is one sentence or two: what is wrong, which value, and the way out. The command line
    prints it without a traceback and exits with status 2.
    """

    passing = False
    """Whether it may pass by itself, so that a deployment tries again."""


class Unavailable(UserError):
    """Something outside does not answer as it should; it may do so later."""

    passing = True


class CatalogUnavailable(Unavailable):
    """A catalog that does not answer, refuses, or gives no whole answer after all attempts."""


class Refused(UserError):
    """A server lets us have one object not; whether it lets us have any, the caller knows."""


class RefusedHop(UserError):
    """A server leads to where nothing may be read from."""


def may_pass(error: object) -> bool:
    """Returns whether an error may pass by itself: all but what a user must mend, so a lost worker or a bug too."""
    return error.passing if isinstance(error, UserError) else True
