"""From a pruned model to a served one. Light: what can be refused before torch is there."""

from pathlib import Path

from gqalib.errors import InputError
from gqalib.model.names import GGUF

TYPES = ("f32", "f16", "q8_0", "q5_0", "q4_0")  # of the weights of a .gguf file, the largest first
BLOCK = 32  # weights of a row that the small types keep under one scale


def check_export(out: Path, kind: str) -> Path:
    """The .gguf file that is to be made, as an absolute path.

    Raises:
        InputError: unknown type, no .gguf file, one that is there already, or a folder that is not.
    """
    out = Path(out).absolute()
    if kind not in TYPES:
        raise InputError(f"unknown type {kind!r}: use one of {', '.join(TYPES)}")
    if out.suffix != GGUF:
        raise InputError(f"{out} is no {GGUF} file: give --out a name that ends in {GGUF}")
    if out.exists():
        raise InputError(f"{out} exists: give another --out, or remove it")
    if not out.parent.is_dir():
        raise InputError(f"folder {out.parent} does not exist: make it, or give another --out")
    return out
