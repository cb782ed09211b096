"""gqalib: the thin library under the workbook on pruning grouped-query-attention language models.

from gqalib import InputError, evaluate, load_model, load_tokenizer, prune, save_model
"""

import types
from importlib import import_module

from gqalib import prune
from gqalib.errors import InputError  # noqa: F401

LOADED = dict.fromkeys(("load_model", "load_tokenizer", "save_model"), "gqalib.model.load")
FRONT_DOOR = LOADED | {"evaluate": "gqalib.run.front"}


def __getattr__(name: str):  # PEP 562: torch and transformers are imported when they are needed
    if name in FRONT_DOOR:
        return getattr(import_module(FRONT_DOOR[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Room(types.ModuleType):
    """`gqalib.prune` is the room of that name; called, it is `gqalib.run.front.prune`."""

    def __call__(self, *args, **kwargs):
        return import_module("gqalib.run.front").prune(*args, **kwargs)


prune.__class__ = _Room
