"""The one exception that means "your input, not our code"."""


class InputError(ValueError):
    """A value that came from the user is unusable: one sentence that names the value and the fix.

    The command line prints it and exits with status 2; a notebook shows it as an ordinary exception.
    """


class OutOfReach(InputError):
    """The layers cannot lose as much as was asked."""
