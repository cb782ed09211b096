"""From a pruned model to a served one. Light: what can be refused before torch is there."""

import os
import re
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any
from urllib.request import ProxyHandler, build_opener

from gqalib.errors import InputError, new_place, reason
from gqalib.model.names import GGUF

TYPES = ("f32", "f16", "q8_0", "q5_0", "q4_0")  # of the weights of a .gguf file, the largest first
BLOCK = 32  # weights of a row that the small types keep under one scale
HOST = "127.0.0.1"  # a server without keys is for this machine alone
OPENER = build_opener(ProxyHandler({}))  # of requests to it: a proxy does not reach this machine
END = 30  # seconds that a process may take for its end
CONTEXT = 2048  # tokens that a request and its answer may have, if nobody asks for more
TRAINED = re.compile(rb"\.context_length\x04\0\0\0(.{4})", re.DOTALL)  # a key of .gguf metadata, uint32, its value


def check_export(out: Path, kind: str) -> Path:
    """The .gguf file that is to be made, as an absolute path.

    Raises:
        InputError: unknown type, no .gguf file, one that is there already, or a folder that is not.
    """
    out = Path(out).absolute()
    if kind not in TYPES:
        raise InputError(f"unknown type {kind!r}: use one of {', '.join(TYPES)}")
    if out.is_dir():
        raise InputError(f"{out} is a folder: give another --out")
    if out.suffix != GGUF:
        raise InputError(f"{out} is no {GGUF} file: give --out a name that ends in {GGUF}")
    return new_place(out)


def check_serve(file: str | Path, port: int = 0, context: int | None = None, parallel: int = 1) -> tuple[Path, int]:
    """The .gguf file that is to be served, and the tokens of a request.

    Raises:
        InputError: no such file or none of a language model, a port that is taken or cannot be, a context that the
            model was not trained for, fewer than one request at a time; xllamacpp is missing.
    """
    if not find_spec("xllamacpp"):
        raise InputError("serve needs xllamacpp, which is not installed: install requirements.txt")
    file = Path(file).expanduser()
    if file.is_dir():
        raise InputError(f"{file} is a folder: run `python -m gqalib export --model {file} --out {file.name}{GGUF}` "
                         "first, and serve that file")  # fmt: skip
    if file.suffix != GGUF or not file.is_file():
        what = "is no .gguf file" if file.is_file() else "does not exist"
        raise InputError(f"model file {file} {what}: give one that `python -m gqalib export` wrote")
    trained = _trained_context(file)
    if context is not None and not 1 <= context <= trained:
        raise InputError(
            f"--ctx {context} cannot be: {file} was trained for up to {trained} tokens, give 1 to {trained}"
        )
    if parallel < 1:
        raise InputError(f"--parallel {parallel} cannot be: give the number of requests at a time, at least 1")
    _check_port(port)
    return file.absolute(), context or min(CONTEXT, trained)


def _trained_context(file: Path) -> int:
    """The tokens that the model of a .gguf file was trained for, from its first megabyte: `gguf` reads the whole
    vocabulary, which takes seconds."""
    with file.open("rb") as data:
        start = data.read(2**20)
    found = TRAINED.search(start)
    if not start.startswith(b"GGUF") or not found:
        raise InputError(f"{file} holds no language model: give a file that `python -m gqalib export` wrote")
    return int.from_bytes(found[1], "little")


def _check_port(port: int) -> None:
    if not 0 <= port < 2**16:
        raise InputError(f"--port {port} cannot be: give one from 1024 to {2**16 - 1}, or 0 for a free one")
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does: a port is free at once
            probe.bind((HOST, port))
    except OSError as error:
        raise InputError(
            f"--port {port} cannot be had ({reason(error)}): give another one, or 0 for a free one"
        ) from error


def cause(log: IO[bytes], error: re.Pattern | None = None) -> str:
    """Why a server has ended, by its log: the first error, which later ones follow from, or else the last line; empty
    where it said nothing.

    Args:
        error: finds an error in a line; its first group is what is said. None: the last line is.
    """
    log.seek(0)
    lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    errors = [found[1] for line in lines if error and (found := error.search(line))]
    return (errors or lines[-1:] or [""])[0].strip()


@contextmanager
def session(command: list[str], **how: Any) -> Iterator[tuple[subprocess.Popen, IO[bytes]]]:
    """A process in a session of its own, which ends with the block, and its log; whatever is left of the session after
    a while is killed."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, **{"stdout": log, "stderr": log, "start_new_session": True} | how)
        try:
            yield process, log
        finally:
            try:
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(END)
            finally:  # also after a second Ctrl-C
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
