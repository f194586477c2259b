"""Export a pipeline from a folder without loading it.

The components to pack are built on `meta`, and their tensors are read one by one. The files of all other components are
taken unchanged if they have the wanted dtype; otherwise they are cast tensor by tensor.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats.format import TensorSpec
from bitpolicy.policies.apply import as_stored
from bitpolicy.policies.checkpoints.checkpoint import rewrite_json, write_config
from bitpolicy.policies.components import DENOISERS, SECOND_DENOISERS
from bitpolicy.policies.loading.diffusers_files import fitted, skeleton
from bitpolicy.policies.loading.transformers_files import TextEncoderSource, places, text_encoder_skeleton
from bitpolicy.policies.storage.file_source import FileSource
from bitpolicy.policies.storage.linking import can_link, link_or_copy
from bitpolicy.policies.storage.pipeline_files import DIFFUSERS, TRANSFORMERS, PipelineFiles, weights_index
from bitpolicy.policies.storage.safetensors_writer import SafetensorsWriter
from bitpolicy.policies.storage.source import TensorSource
from bitpolicy.policies.target import Target


class FolderParts:
    """A diffusers folder.

    Args:
        stamps: of its files when they were first read (`PipelineFiles.stamps`); None takes them now.

    Raises:
        BitPolicyError: it is not a pipeline or has no such component, or its weights are only pickles or do not fit
            its config.
    """

    def __init__(
        self,
        folder: Path,
        components: Sequence[str] | None = None,
        variant: str | None = None,
        stamps: Mapping[Path, tuple[int, int]] | None = None,
    ) -> None:
        self._files = PipelineFiles(folder, variant)
        self._stamps = self._files.stamps() if stamps is None else stamps
        self._files.require_variant()
        models: dict[str, Any] = {}
        sources: dict[str, TensorSource] = {}
        for name in _to_pack(self._files, components):
            models[name], sources[name] = _unquantized(self._files, name)
        self.sources: Mapping[str, TensorSource] = sources
        self.target = Target(models)
        self._others = {name: self._files.specs(name) for name in self._files.components if name not in sources}

    def others(self, dtype: torch.dtype) -> dict[str, int]:
        written = {name: self._as_written(name, dtype) for name, files in self._others.items() if files}
        return {name: sum(_nbytes(specs) for specs in files.values()) for name, files in written.items()}

    def to_write(self, dtype: torch.dtype, folder: Path) -> int:
        sizes = self.others(dtype).items()
        return sum(size for name, size in sizes if not (self._as_it_is(name, dtype) and self._links(name, folder)))

    def write_others(self, dtype: torch.dtype, folder: Path) -> None:
        shutil.copyfile(self._files.folder / "model_index.json", folder / "model_index.json")
        rewrite_json(folder / "model_index.json", _diffusers_version=diffusers.__version__)
        for name in self._others:
            self._write(name, dtype, folder / name)
        self._require_unchanged()

    def _require_unchanged(self) -> None:
        now = self._files.stamps()
        differing = sorted(path for path in {*now, *self._stamps} if now.get(path) != self._stamps.get(path))
        if differing:
            raise BitPolicyError(
                f"{differing[0]} was written to while the model was in use, so measurements may be of another model; "
                "run the command again, which keeps everything that is still valid"
            )

    def _links(self, component: str, folder: Path) -> bool:
        return all(can_link(path, folder) for path in self._files.weights(component).values())

    def _write(self, component: str, dtype: torch.dtype, folder: Path) -> None:
        folder.mkdir()
        for path in self._files.others(component):
            shutil.copyfile(path, folder / path.name)
        weights = self._files.weights(component)
        written = self._as_written(component, dtype)
        for name, path in weights.items():
            if self._as_it_is(component, dtype):
                link_or_copy(path, folder / name)
            else:
                _cast(path, dtype, written[name], folder / name)
        if len(weights) > 1:
            stem = DIFFUSERS if next(iter(weights)).startswith(DIFFUSERS) else TRANSFORMERS
            (folder / f"{stem}.safetensors.index.json").write_text(weights_index(written), encoding="utf-8")
        self._update_config(component, dtype, folder)

    def _update_config(self, component: str, dtype: torch.dtype, folder: Path) -> None:
        """Record the dtype of the weights in the config."""
        config = self._files.config(component)
        if not self._others[component] or "quantization_config" in config:
            return
        if "_class_name" in config:
            library, _ = self._files.kind(component)
            write_config(skeleton(config["_class_name"], self._files.folder / component, library), {}, dtype, folder)
        elif not self._as_it_is(component, dtype):
            entry = {"dtype": str(dtype).removeprefix("torch.")}
            rewrite_json(folder / "config.json", leave_out=["torch_dtype"], **entry)

    def _as_it_is(self, component: str, dtype: torch.dtype) -> bool:
        """Whether its files can be taken unchanged; files that another method quantized always can."""
        specs = [spec for file in self._others[component].values() for spec in file.values()]
        quantized = "quantization_config" in self._files.config(component)
        return quantized or all(spec.dtype == dtype for spec in specs if spec.dtype.is_floating_point)

    def _as_written(self, component: str, dtype: torch.dtype) -> dict[str, dict[str, TensorSpec]]:
        files = self._others[component]
        if self._as_it_is(component, dtype):
            return files
        return {file: {name: _stored(spec, dtype) for name, spec in specs.items()} for file, specs in files.items()}


def _nbytes(specs: Mapping[str, TensorSpec]) -> int:
    return sum(spec.nbytes for spec in specs.values())


def _stored(spec: TensorSpec, dtype: torch.dtype) -> TensorSpec:
    return TensorSpec(dtype, spec.shape) if spec.dtype.is_floating_point else spec


def _cast(source: Path, dtype: torch.dtype, specs: Mapping[str, TensorSpec], target: Path) -> None:
    """Copy a file with its floats cast to another dtype, one tensor in memory at a time."""
    tensors = FileSource([source])
    with SafetensorsWriter(target, specs) as writer:
        for name in specs:
            writer.write(name, as_stored(name, tensors.read(name), dtype))


def _to_pack(files: PipelineFiles, components: Sequence[str] | None) -> list[str]:
    """Names of the components to pack: those given, otherwise every denoiser in the folder."""
    there = files.components
    if components:
        wanted = list(components)
    else:
        wanted = [name for name in DENOISERS if name in there][:1]
        wanted += [name for name in SECOND_DENOISERS if name in there]
    absent = [name for name in wanted if name not in there]
    if absent or not wanted:
        raise BitPolicyError(
            f"{files.folder} has no component {' or '.join(map(repr, absent or DENOISERS))}; "
            f"it has {', '.join(there) or 'none'}: choose one with --component"
        )
    return wanted


def _unquantized(files: PipelineFiles, name: str) -> tuple[Any, TensorSource]:
    """The component on `meta`, and its tensors."""
    config, folder = files.config(name), files.folder / name
    if config.get("quantization_config"):
        raise BitPolicyError(
            f"{files.folder}: its {name} is already quantized; give the full-precision pipeline that it was made from"
        )
    library, class_name = files.kind(name)
    if config and library == "transformers":
        encoder = text_encoder_skeleton(class_name, folder)
        return encoder, TextEncoderSource(FileSource(files.weights(name).values()), encoder, folder)
    if "_class_name" not in config:
        raise BitPolicyError(f"{folder} has no config.json that names a model class; download it again")
    model = skeleton(config["_class_name"], folder, library)
    return model, fitted(FileSource(files.weights(name).values()), model, folder)


def has_names_of_models(folder: Path, components: Iterable[str]) -> bool:
    """Whether the files of the components to pack hold every tensor under one unambiguous name. They may not, because
    transformers converts some models' tensors while it loads them."""
    files = PipelineFiles(folder)
    return all(_names_are_clear(files, name) for name in components if name in files.components)


def _names_are_clear(files: PipelineFiles, name: str) -> bool:
    library, class_name = files.kind(name)
    if library != "transformers" or not files.has_weights(name):
        return True  # without weights, another check reports the problem
    model = text_encoder_skeleton(class_name, files.folder / name)
    try:
        places(model, FileSource(files.weights(name).values()).specs)
    except BitPolicyError:
        return False
    return True


def is_streamable(folder: Path, components: Iterable[str]) -> bool:
    """Whether every component's weights are safetensors, with unambiguous names in the components to pack."""
    files = PipelineFiles(folder)
    try:
        there = all(files.weights(name) is not None for name in files.components)
        return there and has_names_of_models(folder, components)
    except (BitPolicyError, OSError):
        return False
