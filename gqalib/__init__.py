"""gqalib: the thin library under the workbook on pruning grouped-query-attention language models.

from gqalib import InputError, evaluate, load_model, load_tokenizer, prune_model, save_model
"""

from importlib import import_module

from gqalib.errors import InputError  # noqa: F401

LOADED = dict.fromkeys(("load_model", "load_tokenizer", "save_model"), "gqalib.model.load")
FRONT_DOOR = LOADED | dict.fromkeys(("evaluate", "prune_model"), "gqalib.run.front")


def __getattr__(name: str):  # PEP 562: torch and transformers are imported when they are needed
    if name in FRONT_DOOR:
        return getattr(import_module(FRONT_DOOR[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
