"""The files of a diffusers folder that make up the pipeline: each component's safetensors and everything else it needs.

Weights may be one file or shards with an index, and may have a variant, as in
`diffusion_pytorch_model.fp16.safetensors`. A component without the variant is read without it, as diffusers does.
Pickles (.bin, .ckpt) are not read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats.format import TensorSpec
from bitpolicy.policies.storage.file_source import header

DIFFUSERS, TRANSFORMERS = "diffusion_pytorch_model", "model"
_AGAIN = "download the model again"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_MOST_IN_ONE = 10  # models in one component
_WEIGHTS = (".safetensors", *_PICKLES, ".msgpack", ".h5", ".onnx", ".onnx_data", ".pb", ".gguf")


@dataclass(frozen=True)
class PipelineFiles:
    """A diffusers folder.

    Attributes:
        folder: contains a model_index.json.
        variant: of the weights, for components that have it.
    """

    folder: Path
    variant: str | None = None

    @property
    def index(self) -> dict[str, Any]:
        """The content of model_index.json."""
        return read_json(self.folder / "model_index.json")

    @property
    def components(self) -> list[str]:
        """The components that have a folder. Several ControlNets in one component have a folder each: `controlnet`,
        `controlnet_1` and so on.

        Raises:
            BitPolicyError: a name is a path, which could lead out of the folder.
        """
        named = [
            name for name, value in self.index.items() if isinstance(value, list) and value[:1] not in ([], [None])
        ]
        for name in named:
            _require_plain(name, self.folder / "model_index.json")
        numbered = (f"{name}_{i}" for name in named for i in range(1, _MOST_IN_ONE))
        return [name for name in dict.fromkeys([*named, *numbered]) if (self.folder / name).is_dir()]

    def kind(self, component: str) -> tuple[str, str]:
        """Library and class of a component, as model_index.json names them."""
        own = self.config(component).get("_class_name")
        named = self.index.get(component, ["diffusers", own] if own else None)
        if not isinstance(named, list) or len(named) != 2:
            raise BitPolicyError(
                f"{self.folder / 'model_index.json'}: {component} is {named!r}, needed a library and a class; {_AGAIN}"
            )
        return str(named[0]), str(named[1])

    def config(self, component: str) -> dict[str, Any]:
        """The content of its config.json; empty if there is none."""
        path = self.folder / component / "config.json"
        return read_json(path) if path.is_file() else {}

    def weights(self, component: str) -> dict[str, Path]:
        """The safetensors files of a component, by their names without the variant; empty for a tokenizer.

        Raises:
            BitPolicyError: there are only pickles, or a shard is missing.
        """
        folder = self.folder / component
        for variant in dict.fromkeys((self.variant, None)):
            for stem in (DIFFUSERS, TRANSFORMERS):
                if found := _weights(folder, stem, variant):
                    return found
        pickles = sorted(path.name for path in folder.glob("*") if path.suffix in _PICKLES)
        if pickles:
            raise BitPolicyError(
                f"{folder} has its weights only as {pickles[0]}, a pickle, which can run code when it is read; "
                "if you trust it, convert it with DiffusionPipeline.from_pretrained(...).save_pretrained(folder), and "
                "give that folder"
            )
        return {}

    def has_weights(self, component: str) -> bool:
        """Whether a component has safetensors."""
        variants = (self.variant, None)
        return any(_weights(self.folder / component, s, v) for s in (DIFFUSERS, TRANSFORMERS) for v in variants)

    def specs(self, component: str) -> dict[str, dict[str, TensorSpec]]:
        """File name without the variant -> the dtypes and shapes of the file's tensors."""
        return {name: header(path) for name, path in self.weights(component).items()}

    def require_variant(self) -> None:
        """Refuse a variant that no component has.

        Raises:
            BitPolicyError: no component has weights of the variant.
        """
        some = (stem for name in self.components for stem in (DIFFUSERS, TRANSFORMERS) if self._has(name, stem))
        if self.variant is not None and next(some, None) is None:
            raise BitPolicyError(
                f"{self.folder} has no weights of the variant {self.variant!r}; omit --variant, or name one that it has"
            )

    def _has(self, component: str, stem: str) -> bool:
        return bool(_weights(self.folder / component, stem, self.variant))

    def others(self, component: str) -> Iterator[Path]:
        """The files of a component that hold no weights: configs, vocabularies and the like.

        Raises:
            BitPolicyError: a file is a link to something outside the folder, which would be copied and published.
        """
        for path in sorted((self.folder / component).iterdir()):
            weights = path.suffix in _WEIGHTS or ".index." in path.name
            if path.is_file() and not weights and not path.name.startswith("."):
                self._require_inside(path)
                yield path

    def stamps(self) -> dict[Path, tuple[int, int]]:
        """Path -> time of the last write, in nanoseconds, and bytes of each file of the pipeline."""
        found = {self.folder / "model_index.json": (self.folder / "model_index.json").stat()}
        for name in self.components:
            for path in sorted((self.folder / name).iterdir()):
                if path.is_file() and not path.name.startswith("."):
                    found[path] = path.stat()
        return {path: (about.st_mtime_ns, about.st_size) for path, about in found.items()}

    def _require_inside(self, path: Path) -> None:
        folder, target = self.folder.resolve(), path.resolve()
        snapshots = [parent for parent in folder.parents if parent.name == "snapshots"]
        blobs = [parent.parent / "blobs" for parent in snapshots[:1]]  # what a snapshot of the hub's cache links to
        if not any(target.is_relative_to(inside) for inside in (folder, *blobs)):
            raise BitPolicyError(
                f"{path} is a link to {target}, outside {self.folder}; put the file itself there, or remove the "
                "link if it does not belong to the model"
            )


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file.

    Raises:
        BitPolicyError: the file cannot be read, or does not hold a mapping.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BitPolicyError(f"cannot read {path}: {' '.join(str(error).split())}; {_AGAIN}") from error
    if not isinstance(found, dict):
        raise BitPolicyError(f"{path} holds a {type(found).__name__}, needed a mapping; {_AGAIN}")
    return found


def _require_plain(name: str, named_in: Path) -> None:
    """Refuse a name that is a path, because it could lead anywhere."""
    if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise BitPolicyError(f"{named_in} names {name!r}, which is a path; {_AGAIN}")


def weights_index(weights: Mapping[str, Mapping[str, TensorSpec]]) -> str:
    """The text of the index file for some shards, as diffusers writes it.

    Args:
        weights: file name -> its tensors.
    """
    total = sum(spec.nbytes for specs in weights.values() for spec in specs.values())
    places = {name: file for file, specs in weights.items() for name in specs}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2, sort_keys=True) + "\n"


def shard_names(stem: str, count: int) -> list[str]:
    """The file names of a model in `count` files."""
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def _weights(folder: Path, stem: str, variant: str | None) -> dict[str, Path]:
    index = folder / f"{stem}.safetensors.index{f'.{variant}' if variant else ''}.json"
    single = folder / f"{stem}{f'.{variant}' if variant else ''}.safetensors"
    if not index.is_file():
        return {f"{stem}.safetensors": single} if single.is_file() else {}
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
        raise BitPolicyError(f"{index} has no weight_map that names files; {_AGAIN}")
    files = sorted(set(listed.values()))
    for name in files:
        _require_plain(name, index)
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise BitPolicyError(f"{folder} lacks {missing[0]}, which {index.name} names; download the model again")
    return dict(zip(shard_names(stem, len(files)), (folder / name for name in files), strict=True))
