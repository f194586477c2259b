"""Folders of pipelines: what lies in them, compared, read, changed, and exported without being loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from bitpolicy.policies.checkpoints.folder_parts import FolderParts
from bitpolicy.policies.checkpoints.pipeline import export_parts

VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def differing(one: Path, other: Path) -> list[str]:
    first, second = files(one), files(other)
    return sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Of the other models."""
    paths = [path for name in ("vae", "text_encoder") for path in (folder / name).glob("*.safetensors")]
    return {f"{path.parent.name}/{name}": tensor for path in paths for name, tensor in load_file(path).items()}


def change(path: Path, **tensors: torch.Tensor | None) -> None:
    found = load_file(path) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file({name: tensor for name, tensor in found.items() if tensor is not None}, path, metadata={"format": "pt"})


def export(exported: Any, folder: Path, out: Path, variant: str | None = None, **more: Any) -> int:
    parts = FolderParts(folder, ["unet"], variant)
    return export_parts(parts, exported.policy, exported.calibration, out, **more)
