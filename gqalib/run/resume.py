"""What a long computation has done so far, kept while it runs, so that a killed run goes on where it was.

    removal = progress.run(removal_importance, model, windows)      # a function in steps, see `gqalib.steps`

    progress = progress.of("mine", model, windows)                      # all that its parts depend on
    loss = progress.once("layer-3", lambda: perplexity(model, windows))    # computed, or read from an earlier run

A *part* is what JSON can say (numbers come back bit for bit, infinite ones too) or a dict of tensors (safetensors). It
appears whole or not at all. A resumed run reads the parts that are there and computes the others, so its result is that
of a run that was never interrupted, as long as whoever computes a part leaves nothing else behind; where random numbers
are drawn, the generator's state belongs into the part.
"""

import ast
import dataclasses
import fcntl
import hashlib
import inspect
import json
import numbers
import os
import shutil
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import quote

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from gqalib.errors import InputError
from gqalib.steps import drive

PACKAGE = Path(__file__).parents[1]
# what brings data to a computation and shows what came of it: a computation's inputs are told apart by themselves
FRAME = (
    "__init__", "figures", "claims", "errors", "exercise", "packages", "measure.report_card", "run.checks", "run.cli",
    "run.front", "run.grid", "run.notebook", "run.play", "run.presets", "run.publish", "run.resume", "run.series",
)  # fmt: skip
Part = Any  # what JSON can say, or a dict of tensors
PACKED_BYTES = 1 << 20  # of a part, at most: rows and losses travel with the repository, a model's tensors do not


class Progress:
    """The parts of one computation in a folder of its own.

    Args:
        folder: nothing else may be in it: parts that were kept under another key are deleted.
        key: what the results depend on, as JSON.
        owner: who computes here, where several share a folder.

    `Progress.spared` adds up, in this process, the seconds that parts of the same owner took in an earlier run.
    """

    spared = 0.0
    counted: set[Path] = set()  # parts that this process computed, or read and added up

    def __init__(self, folder: Path, key: Any, owner: str = ""):
        self.folder, self.owner = folder, owner
        description, file = json.dumps(key, sort_keys=True, indent=1).encode(), folder / "key.json"
        with alone_in(folder.parent):  # notebooks that run beside each other share some
            if not (file.is_file() and file.read_bytes() == description):
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                with replacing(file) as temporary:
                    temporary.write_bytes(description)

    def of(self, *inputs: Any) -> "Progress":
        """Progress for these inputs alone: models, tensors, dataclasses, numbers, lists, dicts, seen by `digest`."""
        return Progress(self.folder / digest(*inputs)[:32], {}, self.owner)

    def run(self, function: Callable, *args: Any, **options: Any) -> Any:
        """What a function `in_steps` comes to for these arguments, steps kept; calls with others may share progress."""
        call = inspect.signature(function).bind(*args, **options)
        call.apply_defaults()
        inputs = {name: value for name, value in call.arguments.items() if name not in function.apart}
        return drive(function.steps(*args, **options), self.of(function.__name__, inputs).once)

    def once(self, name: str, compute: Callable[[], Part]) -> Part:
        """The part, computed if it is not there."""
        part, told = self._read(name)
        if part is None:
            begun = spent()
            part = compute()
            self.keep(name, part, spent() - begun)
        elif told.get("owner") == self.owner and self.folder / name not in Progress.counted:
            Progress.spared += float(told["seconds"])
        Progress.counted.add(self.folder / name)
        return part

    def load(self, name: str) -> Part | None:
        """A part that was kept, tensors on the CPU; None if there is none, or none that can be read."""
        return self._read(name)[0]

    def _read(self, name: str) -> tuple[Part | None, dict[str, str]]:
        """A part, and what is told of it."""
        try:
            if (file := self._file(name, "safetensors")).exists():
                with safe_open(file, "pt") as opened:
                    return {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata() or {}
            told = json.loads(self._file(name, "json").read_text(encoding="utf-8"))
            return told.pop("part"), told
        except (OSError, ValueError, SafetensorError, KeyError, TypeError, AttributeError):
            return None, {}

    def keep(self, name: str, part: Part, seconds: float = 0.0) -> None:
        """Keep a part that took so long; one of this name that is there is replaced."""
        told = {"owner": self.owner, "seconds": f"{seconds:.1f}"}
        tensors, plain = self._file(name, "safetensors"), self._file(name, "json")
        if isinstance(part, Mapping) and part and all(isinstance(value, torch.Tensor) for value in part.values()):
            with replacing(tensors) as file:
                save_file({key: value.detach().cpu().contiguous() for key, value in part.items()}, file, told)
        else:
            with replacing(plain) as file:
                file.write_text(json.dumps({"part": part} | told), encoding="utf-8")
            tensors.unlink(missing_ok=True)  # it would be read first

    def _file(self, name: str, kind: str) -> Path:
        return self.folder / f"{quote(name, safe=' ,')}.{kind}"


def spent() -> float:
    """Seconds on a clock that counts what parts took in an earlier run as if they had been computed in this one."""
    return time.monotonic() + Progress.spared


class _NotKept(Progress):
    def __init__(self) -> None:
        pass

    def of(self, *inputs: Any) -> Progress:
        return self

    def once(self, name: str, compute: Callable[[], Part]) -> Part:
        return compute()


NOT_KEPT = _NotKept()  # nothing is kept, everything is computed


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write that takes the place of `path` when the block ends well: readers see the old one or the new one.

    A folder may be made there instead; it takes the place of none, or of an empty one.
    """
    temporary = path.with_name(f".{os.getpid()}.{path.name}")  # ends as it does: papermill asks for .ipynb
    try:
        yield temporary
        for place in filter(Path.is_file, [temporary, *temporary.rglob("*")]):
            with place.open("rb") as file:
                os.fsync(file.fileno())  # a power cut leaves no half part
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)


def pack(folder: Path, archive: Path, without: Sequence[str] = ()) -> None:
    """The small parts of a folder of progress as one file, from which another machine goes on; no saved model, and
    nothing of computations `without`."""

    def travels(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        place = folder.parent / entry.name
        stays = place.name in without or (place / "config.json").exists() or entry.size > PACKED_BYTES
        return None if stays else entry

    with replacing(archive) as file, tarfile.open(file, "w:gz") as packed:
        packed.add(folder, folder.name, filter=travels)


def unpack(archives: Sequence[Path], folder: Path) -> None:
    """What was packed, where nothing is kept yet; keys still decide what of it counts."""
    with alone_in(folder.parent):
        if archives and not folder.exists():
            with replacing(folder) as unfinished:
                for archive in archives:
                    shutil.unpack_archive(archive, unfinished, filter="data")


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """One process at a time, as far as the file system has locks; the lock goes with the process, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    place = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(place, fcntl.LOCK_EX)
        yield
    finally:
        os.close(place)


def lock(file: TextIO, refusal: str, shared: bool = False) -> None:
    """Lock an open file until it is closed, for one process or for several (`shared`), as far as the file system has
    locks. It goes with the process, however it ends.

    Raises:
        InputError: `refusal`, because another process has locked it.
    """
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(refusal) from error
    except OSError:
        return  # there are no locks here, and work goes on as it did without
    if not os.fstat(file.fileno()).st_nlink:  # whoever had it removed it just now: others would lock a new one
        raise InputError(refusal)


# ---------------------------------------------------------------- what a result depends on


@cache
def code_hash(source: str, without: tuple[str, ...] = ()) -> str:
    """One hash of the modules of gqalib that some code imports, and of all that those import; comments and docstrings
    do not count, nor do the modules `without` (`run.notebook`) and what only they import."""
    found: dict[Path, str] = {}
    waiting, left_out = [source], {PACKAGE / f"{name.replace('.', '/')}.py" for name in without}
    while waiting:
        for path in set(_imported(ast.parse(waiting.pop()))) - found.keys() - left_out:
            waiting.append(path.read_text(encoding="utf-8"))
            found[path] = _bare(waiting[-1])
    return hashlib.sha256("".join(found[path] for path in sorted(found)).encode()).hexdigest()


def _imported(tree: ast.AST) -> Iterator[Path]:
    """The files of gqalib that are imported anywhere in some code."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == PACKAGE.name:
            place = PACKAGE.joinpath(*node.module.split(".")[1:])
            names = [place, *(place / alias.name for alias in node.names)]
            yield from filter(Path.is_file, [f for n in names for f in (n.with_suffix(".py"), n / "__init__.py")])


def _bare(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            del node.body[0]
    return ast.dump(tree)


def digest(*things: Any) -> str:
    """A hash of models (configuration, parameters), tensors, arrays, dataclasses, numbers, text; lists, dicts of them.

    Raises:
        TypeError: something else; two of those could not be told apart.
    """
    hasher = hashlib.sha256()
    for piece in _pieces(things):
        hasher.update(piece)
    return hasher.hexdigest()


def _pieces(thing: Any) -> Iterator[bytes | memoryview]:
    if isinstance(thing, nn.Module):
        config = thing.config
        settings = {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}  # where it lay
        yield from _pieces([json.dumps(settings, sort_keys=True, default=str), config._attn_implementation])
        yield from _pieces(dict(thing.named_parameters()))
    elif isinstance(thing, torch.Tensor):
        yield f"{thing.dtype}{list(thing.shape)};".encode()
        if not thing.is_meta:  # weights that wait elsewhere are known by the model's files, in a notebook's key
            yield thing.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
    elif isinstance(thing, np.ndarray):
        yield from _pieces(torch.from_numpy(thing))
    elif dataclasses.is_dataclass(thing):
        yield from _pieces({field.name: getattr(thing, field.name) for field in dataclasses.fields(thing)})
    elif isinstance(thing, Mapping):
        yield from _pieces([list(thing.keys()), list(thing.values())])
    elif thing is None or isinstance(thing, str | numbers.Number):
        yield f"{thing!r};".encode()
    elif isinstance(thing, Sequence):
        yield f"[{len(thing)}]".encode()
        for entry in thing:
            yield from _pieces(entry)
    else:
        kind = type(thing).__name__
        raise TypeError(f"a {kind} cannot be told from another one: leave it out, or give what it is made of")
