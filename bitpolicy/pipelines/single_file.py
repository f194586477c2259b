"""A pipeline whose weights are in one checkpoint file, in the layout of the model's authors.

The file has no configs. They come from a diffusers folder (`config`), or from the hub repository that diffusers knows
for this kind of model. diffusers' converters do the rest. For export, the denoiser's tensors are converted one at a
time. diffusers loads the text encoders and the VAE, and maps the file into memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders import single_file_model, single_file_utils
from safetensors import SafetensorError

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.pipelines.hub import download_configs
from bitpolicy.policies.checkpoints.parts import MemoryParts
from bitpolicy.policies.components import DENOISERS, to_text
from bitpolicy.policies.loading.diffusers_files import bounded, fitted, skeleton
from bitpolicy.policies.loading.named_classes import class_named, require_known_classes
from bitpolicy.policies.loading.nothing_missing import nothing_missing
from bitpolicy.policies.storage.file_source import FileSource
from bitpolicy.policies.storage.pipeline_files import PipelineFiles, read_json
from bitpolicy.policies.storage.source import TensorSource
from bitpolicy.policies.storage.source_converted import Converter

_GIVE = "give a pipeline folder, a .safetensors file or a hub id"
_STARTS = {  # how a component's tensor names begin in original checkpoints
    "vae": ("first_stage_model.", "vae."),
    "text": ("cond_stage_model.", "conditioner.embedders.", "text_encoder", "text_model."),
}


@dataclass(frozen=True)
class SingleFile:
    """A checkpoint in one file.

    Attributes:
        path: a .safetensors file.
        configs: a diffusers folder of the same kind of model; its weights, if any, are used for components that the
            file lacks.
        component: the component to pack, the denoiser.
    """

    path: Path
    configs: PipelineFiles
    component: str

    @classmethod
    def of(cls, path: Path, config: str | None = None, components: Sequence[str] | None = None) -> SingleFile:
        """Find the configs.

        Args:
            config: folder or hub id; None is the hub repository that diffusers associates with the file.
            components: the name of the component to pack; None finds the denoiser.

        Raises:
            BitPolicyError: the file is a pickle or damaged, or there are no configs.
        """
        if path.suffix != ".safetensors":
            pickled = path.suffix in (".ckpt", ".bin", ".pt", ".pth")
            remedy = (
                "a pickle can run code when it is read: if you trust it, convert it to safetensors"
                if pickled
                else _GIVE
            )
            raise BitPolicyError(f"{path} is not a safetensors file; {remedy}")
        configs = PipelineFiles(_configs(path, config))
        require_known_classes(configs.index, configs.folder / "model_index.json")
        candidates = [to_text(components)] if components else DENOISERS
        there = [name for name in candidates if name in configs.components]
        if not there:
            raise BitPolicyError(
                f"{configs.folder} has no component {' or '.join(candidates)}; "
                f"it has {', '.join(configs.components) or 'none'}: give another --config or --component"
            )
        return cls(path, configs, there[0])

    def denoiser(self) -> tuple[Any, TensorSource]:
        """The denoiser on `meta`, and its tensors.

        Raises:
            BitPolicyError: the config is for another model.
        """
        config = self.configs.config(self.component)
        model = skeleton(config["_class_name"], self.configs.folder / self.component)
        try:
            return model, fitted(FileSource([self.path]), model, self.path, _converter(model, config))
        except (RuntimeError, KeyError, IndexError, TypeError, AttributeError) as error:  # from diffusers' converter
            raise BitPolicyError(
                f"diffusers cannot convert {self.path} to a {type(model).__name__}: "
                f"{' '.join(str(error).split())[:300]}; give the --config that belongs to it"
            ) from error

    def open(self, dtype: torch.dtype, **components: Any) -> Any:
        """The pipeline.

        Args:
            components: components that are already loaded.

        Raises:
            BitPolicyError: diffusers cannot read the file.
        """
        name = str(self.configs.index["_class_name"])
        kind = getattr(diffusers, name, None)
        if not hasattr(kind, "from_single_file"):
            raise BitPolicyError(f"{name} cannot be read from a single file; convert it to a folder with diffusers")
        components |= {name: self._from_folder(name, dtype) for name in self._missing() if name not in components}
        try:
            return kind.from_single_file(  # type: ignore[union-attr]
                str(self.path), config=str(self.configs.folder), dtype=dtype, local_files_only=True, **components
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
            raise BitPolicyError(
                f"cannot load {self.path} as {name}: {' '.join(str(error).split())[:400]}; "
                f"use --config with a {name} folder that has what the file lacks"
            ) from error
        except single_file_utils.SingleFileComponentError as error:
            raise BitPolicyError(
                f"{self.path} lacks a component: {' '.join(str(error.message).split())[:300]}; "
                f"use --config with a {name} folder that has its weights"
            ) from error

    def _missing(self) -> list[str]:
        """Models of the pipeline that are not in the file."""
        names = FileSource([self.path]).specs
        starts = {name: _STARTS.get(name.partition("_")[0], ()) for name in self.configs.components}
        return [n for n, start in starts.items() if start and not any(name.startswith(start) for name in names)]

    def _from_folder(self, name: str, dtype: torch.dtype) -> Any:
        """A component that is loaded from the folder with the configs."""
        if not self.configs.weights(name):
            raise BitPolicyError(
                f"{self.path} has no {name}, and {self.configs.folder} has no weights of one; "
                "use --config with a folder that has them"
            )
        kind = class_named(*self.configs.kind(name), self.configs.folder / "model_index.json")
        folder = self.configs.folder / name
        with bounded({f"the config in {folder}": read_json(folder / "config.json")}), nothing_missing():
            return kind.from_pretrained(folder, dtype=dtype, local_files_only=True)

    def parts(self, dtype: torch.dtype) -> MemoryParts:
        """The parts to export: the denoiser stays in the file, everything else is loaded."""
        model, source = self.denoiser()
        return MemoryParts(self.open(dtype, **{self.component: model}), [self.component], {self.component: source})


def _configs(path: Path, config: str | None) -> Path:
    """The folder with the configs."""
    if config is None:
        blank = {n: torch.empty(s.shape, device="meta") for n, s in FileSource([path]).specs.items()}
        config = single_file_utils.fetch_diffusers_config(blank)["pretrained_model_name_or_path"]
        try:
            return download_configs(config)
        except BitPolicyError as error:
            raise BitPolicyError(
                f"{path} looks like {config}, whose configs are needed: {error}; or give a folder with --config"
            ) from error
    folder = Path(config).expanduser()
    if not folder.is_dir() and config.count("/") == 1 and not config.startswith((".", "/", "~")):
        folder = download_configs(config)
    if not (folder / "model_index.json").is_file():
        raise BitPolicyError(f"--config {config}: there is no diffusers pipeline; give its folder or its hub id")
    return folder


def _converter(model: Any, config: dict[str, Any]) -> Converter:
    """diffusers' converter for original checkpoints of this model. It leaves those in diffusers' own layout
    unchanged."""
    kind = single_file_model._get_single_file_loadable_mapping_class(type(model))
    if kind is None:
        raise BitPolicyError(
            f"diffusers cannot read a {type(model).__name__} from a single file; convert it to a folder first"
        )
    convert = single_file_model.SINGLE_FILE_LOADABLE_CLASSES[kind]["checkpoint_mapping_fn"]

    def converted(checkpoint: dict[str, Any]) -> dict[str, Any]:
        if not single_file_model._should_convert_state_dict_to_diffusers(model.state_dict(), checkpoint):
            return checkpoint
        return dict(convert(config=config, checkpoint=checkpoint))

    return converted
