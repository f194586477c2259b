"""What a rival delivers: the weights that its quantized denoiser computes with, their bytes and how they were made.

An entry is a folder `<name>/` with `entry.json` and `effective.safetensors`. The latter is a float32 state dict of the
plain denoiser, with which an ordinary model gives the same output as the tool's own layers. Every tool's script imports
this module in its own environment, so it needs only torch and safetensors.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "bitpolicy" / "models" / "emoji"
WORK = Path("build") / "peers"
SHARES = (0.30, 0.33, 0.38, 0.45)  # of FP16; the sizes that are compared
OWN_FILE, ACCOUNTED = "own file", "accounted"


@dataclass(frozen=True)
class Entry:
    """One quantized denoiser.

    Attributes:
        name: the name of its folder; unique.
        family: the rival that this is a setting of; the best fitting setting of each family is compared.
        kind: "tool" (another program's weights), "assignment" (another way to choose, our three formats) or "ours".
        nbytes: bytes of its tensors.
        counted: how they were counted, `OWN_FILE` or `ACCOUNTED`.
        assignment: what chose each layer's format.
        share: the budget that it was made for, as a share of FP16; None if there was none.
        settings: the tool's settings, for readers of the table.
    """

    name: str
    family: str
    kind: str
    nbytes: int
    counted: str
    assignment: str
    share: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


def write_entry(folder: Path, entry: Entry, weights: Mapping[str, torch.Tensor]) -> None:
    """Write `folder/<name>/`; `weights` has the plain denoiser's names and shapes, in any float dtype."""
    place = folder / entry.name
    place.mkdir(parents=True, exist_ok=True)
    # copies, because safetensors refuses tied or strided tensors
    plain = {name: tensor.detach().to(torch.float32).clone().contiguous() for name, tensor in weights.items()}
    save_file(plain, place / "effective.safetensors", metadata={"format": "pt"})
    (place / "entry.json").write_text(json.dumps(asdict(entry), indent=2) + "\n")


def read_entries(folder: Path) -> Iterator[Entry]:
    """Every finished entry below `folder`, sorted by name."""
    for path in sorted(folder.glob("*/entry.json")):
        yield Entry(**json.loads(path.read_text()))


def read_weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder / name / "effective.safetensors")


def tensor_bytes(folder: Path) -> int:
    """Bytes of all tensors in the safetensors files of `folder`; headers do not count."""
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors = (file.get_tensor(key) for key in file.keys())  # noqa: SIM118 - not a dict
            total += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return total


def weights_key(weights: Mapping[str, torch.Tensor]) -> str:
    """A short hash of names and values, which identifies what an entry computes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:24]


def tool_arguments(about: str | None) -> argparse.Namespace:
    """The command line of every tool's script."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL, help="folder of the pipeline")
    parser.add_argument("--work", type=Path, default=WORK, help="folder that `bench_peers.py prepare` wrote to")
    parser.add_argument("--check", type=int, default=0, metavar="N", help="images to compare with the tool's own model")
    parser.add_argument("--only", default="*", help="pattern of the entries to make; others are left unchanged")
    return parser.parse_args()
