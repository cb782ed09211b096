"""The one exception that means "your input, not our code", and what turns other exceptions into it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class InputError(ValueError):
    """A value that came from the user is unusable: one sentence that names the value and the fix.

    The command line prints it and exits with status 2; a notebook shows it as an ordinary exception.
    """


class OutOfReach(InputError):
    """The layers cannot lose as much as was asked."""


@contextmanager
def one_sentence(what: str, fix: str) -> Iterator[None]:
    """Whatever fails inside, whoever raises it, ends as "what (reason): fix"; an `InputError` passes as it is."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{what} ({reason(error)}): {fix}") from error


def read_text(path: Path, what: str) -> str:
    """A user's file of UTF-8 text, with or without a byte order mark.

    Raises:
        InputError: it cannot be read, or is in another encoding.
    """
    with one_sentence(f"{what} {path} cannot be read", "give a text file in UTF-8"):
        return Path(path).read_text(encoding="utf-8-sig")


def new_place(out: Path) -> Path:
    """A file or folder that is to be made, or a folder that is empty, as an absolute path.

    Raises:
        InputError: something is there, or its parent is not.
    """
    out = Path(out).absolute()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out} exists: give another --out, or remove it")
    if not out.parent.is_dir():
        raise InputError(f"folder {out.parent} does not exist: make it, or give another --out")
    return out


def reason(error: Exception) -> str:
    """The first line of what an exception says, and of what that line announces."""
    said = getattr(error, "strerror", None) or str(error).replace(":\n", ": ") or type(error).__name__
    return " ".join(said.splitlines()[0].split()).rstrip(".")
