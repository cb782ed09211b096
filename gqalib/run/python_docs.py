"""Corpora `python-docs` and `python-source`: what this very installation says about itself; nothing is downloaded."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
import sysconfig
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

# The packages whose docstrings make up python-docs: what `requirements.txt` pins and people read.
PACKAGES = (
    "accelerate", "datasets", "huggingface_hub", "hypothesis", "IPython", "matplotlib", "mpmath", "networkx",
    "numpy", "pandas", "peft", "sympy", "torch", "transformers", "trl",
)  # fmt: skip
SKIPPED_FOLDERS = {"test", "tests", "_tests", "testing", "lib2to3", "site-packages", "idlelib", "turtledemo", "_vendor"}
HELD_OUT_ONE_IN = 25  # one file in 25 is validation text, another one test text


@cache  # a notebook reads several samples
def source_files() -> tuple[tuple[str, Path], ...]:
    """Name and path of every module of python-docs, in the order of a hash of the name (a fixed shuffle)."""
    roots = [("python", Path(sysconfig.get_paths()["stdlib"]))]
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            roots.append((package, Path(spec.origin).parent))
    names = {}
    for package, root in roots:
        for path in root.rglob("*.py"):
            parts = path.relative_to(root).parts
            if not SKIPPED_FOLDERS.intersection(parts):
                names["/".join((package, *parts))] = path
    return tuple(sorted(names.items(), key=lambda item: digest(item[0])))


def split_of(name: str, one_in: int = HELD_OUT_ONE_IN) -> str:
    """The split that a module or a document belongs to: decided by a hash of its name, so it never moves."""
    bucket = int(digest(name)[-8:], 16) % one_in
    return {0: "validation", 1: "test"}.get(bucket, "train")


def docstrings(source: str) -> Iterator[tuple[str, str]]:
    """Signature line (`""` for the module itself) and cleaned docstring of each documented object, in order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's files
        tree = ast.parse(source)
    yield from _walk(tree, prefix="")


def _walk(node: ast.AST, prefix: str) -> Iterator[tuple[str, str]]:
    if doc := ast.get_docstring(node):
        yield _signature(node, prefix), doc
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            inner = prefix if isinstance(node, ast.Module) else f"{prefix}{node.name}."
            yield from _walk(child, inner)


def _signature(node: ast.AST, prefix: str) -> str:
    if isinstance(node, ast.Module):
        return ""
    if isinstance(node, ast.ClassDef):
        return f"class {prefix}{node.name}"
    arguments = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return f"{prefix}{node.name}({', '.join(arguments)})"


def python_docs(split: str) -> Iterator[str]:
    """One document per module: its dotted name, then signature and docstring of everything it documents.

    A paragraph of a docstring that occurred before is left out, and `train` also leaves out every paragraph of the
    held-out files, so no paragraph of the test text was ever trained on. `train` ends with the language reference.
    """
    seen = set(_held_out(source_files())) if split == "train" else set()
    for name, path in source_files():
        if split_of(name) == split and (document := _module_document(name, path, seen)):
            yield document
    if split == "train":
        yield from language_reference()


def python_source(split: str) -> Iterator[str]:
    """The source files of the modules, as they are."""
    for name, path in source_files():
        if split_of(name) == split and (text := path.read_text(encoding="utf-8", errors="ignore").strip()):
            yield text


def language_reference() -> Iterator[str]:
    """The topics of Python's language reference that the interpreter carries for `help()`."""
    from pydoc_data.topics import topics

    yield from (text.strip() for _, text in sorted(topics.items()))


def _module_document(name: str, path: Path, seen: set[str]) -> str:
    entries = []
    for signature, doc in _entries(path):
        kept = [p for p in doc.split("\n\n") if not _seen_before(p, seen)]
        if kept:
            entries.append("\n".join(filter(None, (signature, "\n\n".join(kept)))))
    return "\n\n".join([_dotted(name), *entries]) if entries else ""


def _entries(path: Path) -> list[tuple[str, str]]:
    try:
        return list(docstrings(path.read_text(encoding="utf-8")))
    except (SyntaxError, UnicodeDecodeError, ValueError, RecursionError):  # templates, vendored oddities
        return []


def _seen_before(paragraph: str, seen: set[str]) -> bool:
    known = (mark := digest(paragraph.strip())) in seen
    seen.add(mark)
    return known


@cache  # to parse their files takes longer than most samples do
def _held_out(files: tuple[tuple[str, Path], ...]) -> frozenset[str]:
    """Digests of the paragraphs of the files that are not training text."""
    entries = (entry for name, path in files if split_of(name) != "train" for entry in _entries(path))
    return frozenset(digest(paragraph.strip()) for _, doc in entries for paragraph in doc.split("\n\n"))


def _dotted(name: str) -> str:
    return name.removesuffix(".py").removesuffix("/__init__").removeprefix("python/").replace("/", ".")


def digest(text: str) -> str:
    """The first 16 hexadecimal digits of a text's SHA-256: its place in the order, and its split."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def described(split: str) -> Iterator[dict[str, str]]:
    """Rows of `prompt` and `completion`: "Describe `package.module.name`." and its docstring; `train` without the
    paragraphs of the held-out files."""
    held_out = _held_out(source_files()) if split == "train" else frozenset()
    for name, path in source_files():
        if split_of(name) == split:
            for signature, doc in _entries(path):
                label = re.sub(r"^class |\(.*", "", signature)
                subject = ".".join(filter(None, (_dotted(name), label)))
                if kept := [p for p in doc.strip().split("\n\n") if digest(p.strip()) not in held_out]:
                    yield {"prompt": f"Describe `{subject}`.\n", "completion": "\n\n".join(kept)}
