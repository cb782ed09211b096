"""Exercises: what a reader writes into a stub, held against a check in the cell below it."""

from collections.abc import Callable


def attempt(number: int, check: Callable[..., None], *answers: object) -> None:
    """Print whether some answers pass a check.

    Args:
        check: is called with the answers, and asserts what must hold, with a sentence on what is wrong otherwise.
        answers: functions or values; a value of None, or a function that raises NotImplementedError, was not tried yet.
    """
    try:
        if any(answer is None for answer in answers):
            raise NotImplementedError
        check(*answers)
    except NotImplementedError:
        print(f"exercise {number}: not tried yet")
    except AssertionError as error:
        print(f"exercise {number}: not yet. {str(error).splitlines()[0] if str(error) else ''}")
    except Exception as error:  # noqa: BLE001 a reader's own code: whatever it raises is what is wrong
        print(f"exercise {number}: not yet. It raises {type(error).__name__}: {error}")
    else:
        print(f"exercise {number}: right")
