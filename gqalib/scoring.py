"""Everything that calibration finds, in one file: `python -m gqalib scores`, alone or under `torchrun`, where the processes share the text.

The file is a safetensors: `removal` [layers], and per layer `groups.N`, `channels.N` (Taylor scores), `o_proj.N`, `down_proj.N` (gradient
covariances, [hidden, hidden]), all float64; its metadata name preset, seed and text. `read` gives them back as `refit.sweep` and
`allocation` take them.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from gqalib import importance, parallel
from gqalib.corpora import evaluation_windows
from gqalib.errors import InputError
from gqalib.models import load_model, load_tokenizer, resolve_device
from gqalib.presets import Preset, Sample
from gqalib.progress import replacing


@dataclass(frozen=True)
class Scores:
    """What `importance` finds, of the whole calibration text."""

    taylor: dict[int, tuple[torch.Tensor, torch.Tensor]]
    removal: torch.Tensor
    covariances: list[tuple[torch.Tensor, torch.Tensor]]

    def tensors(self) -> dict[str, torch.Tensor]:
        """By the names of the file."""
        named = {"removal": self.removal}
        for names, pairs in ((("groups", "channels"), self.taylor.values()), (("o_proj", "down_proj"), self.covariances)):
            for index, pair in enumerate(pairs):
                named |= {f"{name}.{index}": tensor.cpu().contiguous() for name, tensor in zip(names, pair, strict=True)}
        return named


def scores_of(model: nn.Module, calibration: torch.Tensor, removal: torch.Tensor, refit: torch.Tensor) -> Scores:
    """Taylor scores, layer removal and gradient covariances on windows [count, length] each; every process gives all of them the same.

    Raises:
        InputError: fewer windows than processes.
    """
    size = parallel.rank_and_size()[1]
    fewest = min(len(calibration), len(removal), len(refit))
    if fewest < size:
        raise InputError(f"{fewest} windows are too few for {size} processes: start at most {fewest}, or give more examples")
    taylor = importance.taylor_scores(model, parallel.share(calibration))
    removed = importance.removal_importance(model, parallel.share(removal))
    return Scores(taylor, removed, importance.gradient_covariances(model, parallel.share(refit)))


def write(preset: Preset, seed: int, path: Path) -> None:
    """Score a preset's model on its calibration samples; the first process writes the file, whole or not at all.

    Raises:
        InputError: the folder is missing, `path` is one, or as `scores_of`.
    """
    path = path.absolute()
    if not path.parent.is_dir():
        raise InputError(f"folder {path.parent} does not exist: make it, or give another --out")
    if path.is_dir():
        raise InputError(f"{path} is a folder: give a file, such as --out {path / 'scores.safetensors'}")
    with parallel.processes(resolve_device(preset.device)) as device:
        model, tokenizer = load_model(preset.model, preset.dtype, device), load_tokenizer(preset.model)

        def text(sample: Sample) -> torch.Tensor:
            length = min(sample.length, model.config.max_position_embeddings)
            return evaluation_windows(preset.corpus, "train", tokenizer, length, sample.num_tokens, seed)

        scores = scores_of(model, text(preset.calibration), text(preset.removal), text(preset.frontier.calibration))
        if parallel.rank_and_size()[0] == 0:
            metadata = {"format": "pt", "preset": json.dumps(preset.to_dict()), "seed": str(seed)}
            with replacing(path) as temporary:
                save_file(scores.tensors(), temporary, metadata)


def read(path: Path) -> Scores:
    """The scores in a file.

    Raises:
        InputError: the file is missing or is none of these.
    """
    try:
        with safe_open(path, "pt") as file:
            named = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        layers = range(len(named["removal"]))
        pairs = [[(named[f"{a}.{i}"], named[f"{b}.{i}"]) for i in layers] for a, b in (("groups", "channels"), ("o_proj", "down_proj"))]
    except Exception as error:  # safetensors has an exception of its own for what it cannot read
        raise InputError(f"{path} holds no scores: write it with `python -m gqalib scores --out {path}`") from error
    return Scores(dict(enumerate(pairs[0])), named["removal"], pairs[1])
