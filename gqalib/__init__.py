"""gqalib: the thin library under the workbook on pruning grouped-query-attention language models."""

from importlib import import_module

from gqalib.errors import InputError  # noqa: F401

FRONT_DOOR = {
    "load_model": "gqalib.model.load",
    "load_tokenizer": "gqalib.model.load",
    "save_model": "gqalib.model.load",
}


def __getattr__(name: str):  # PEP 562: torch and transformers are imported when they are needed
    if name in FRONT_DOOR:
        return getattr(import_module(FRONT_DOOR[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
