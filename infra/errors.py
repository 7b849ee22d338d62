"""The one exception for what a user can put right."""


class UserError(ValueError):
    """A mistake or a missing thing that the user can mend.

    The message is one sentence or two: what is wrong, which value, and the way out. The command line
    prints it without a traceback and exits with status 2.
    """


class Unavailable(UserError):
    """Something outside does not answer as it should; it may do so later, so a deployment tries again."""


class CatalogUnavailable(Unavailable):
    """A catalog that does not answer, refuses, or gives no whole answer after all attempts."""
