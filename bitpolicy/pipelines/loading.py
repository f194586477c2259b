"""Load a pipeline (the bundled one, a local folder, a single file or a hub id) and find its storage dtype."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats.format import TensorSpec
from bitpolicy.kernels.layers import packed_layers
from bitpolicy.pipelines.hub import download
from bitpolicy.pipelines.lora import merge
from bitpolicy.pipelines.offload import stream_weights
from bitpolicy.pipelines.single_file import SingleFile
from bitpolicy.policies.apply import to_storage
from bitpolicy.policies.checkpoints.folder_parts import FolderParts, has_names_of_models, is_streamable
from bitpolicy.policies.checkpoints.manifest import verify
from bitpolicy.policies.checkpoints.parts import MemoryParts, Parts, require_no_adapter
from bitpolicy.policies.components import ALL, DENOISERS, to_text
from bitpolicy.policies.identity import config_hash, weights_hash
from bitpolicy.policies.loading.diffusers_files import bounded
from bitpolicy.policies.loading.named_classes import require_known_classes
from bitpolicy.policies.loading.nothing_missing import nothing_missing
from bitpolicy.policies.loading.packed_config import METHOD
from bitpolicy.policies.storage.pipeline_files import PipelineFiles, read_json
from bitpolicy.policies.storage.source import ModuleSource, Unchanged
from bitpolicy.policies.target import Target
from bitpolicy.sensitivity.workers import device_of_this_process

BUNDLED = "bitpolicy/emoji"
BUNDLED_FOLDER = Path(__file__).parent.parent / "models" / "emoji"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def _floats(module: nn.Module) -> Iterator[torch.dtype]:
    return (tensor.dtype for tensor in module.state_dict().values() if tensor.is_floating_point())


@dataclass(frozen=True)
class Source:
    """A loaded, unquantized pipeline.

    Attributes:
        pipe: on its device, in the compute dtype; the target's values are those of the storage dtype.
        components: names of the target's components.
        storage: dtype of the checkpoint to export.
        id: hub id or folder, for the policy file.
        revision: revision of a hub model.
        files: the folder that it was loaded from, if any.
        stamps: stamps of these files, taken before they were read.
        lora: what was merged into the weights, as the user named it.
    """

    pipe: DiffusionPipeline
    components: Sequence[str]
    storage: torch.dtype
    id: str
    revision: str | None = None
    files: PipelineFiles | None = None
    stamps: Mapping[Path, tuple[int, int]] | None = None
    lora: tuple[str, ...] = ()

    @property
    def target(self) -> Target:
        """The components under study, as the pipeline has them now."""
        return Target.of(self.pipe, self.components)

    @cached_property
    def parts(self) -> Parts:
        """What to export: the files that it was loaded from if they can be streamed, otherwise the models in memory."""
        if self.files is not None and is_streamable(self.files.folder, self.components):
            parts = FolderParts(self.files.folder, self.components, self.files.variant, self.stamps)
            parts.sources = {
                name: Unchanged(source, self.storage, ModuleSource(getattr(self.pipe, name)))
                for name, source in parts.sources.items()
            }
            return parts
        return MemoryParts(self.pipe, self.components)

    @cached_property
    def hashes(self) -> dict[str, str]:
        """Identity of the target: component -> hash of its weights in the storage dtype."""
        return self.target.weights_hashes(self.storage)

    @property
    def sha256(self) -> str:
        """`hashes` in the form that files record."""
        return to_text(self.hashes.values())

    @cached_property
    def everything_sha256(self) -> str:
        """Identity of the whole pipeline. Text encoders, schedulers and configs affect the images, too."""
        digest = hashlib.sha256(self.sha256.encode())
        for name, other in sorted(self.pipe.components.items()):
            digest.update(config_hash(other).encode())
            if isinstance(other, nn.Module) and name not in self.components:
                digest.update(f"{name}{weights_hash(other, next(iter(_floats(other)), self.storage))}".encode())
        return digest.hexdigest()


def load_source(
    model: str | None = None,
    components: Sequence[str] | None = None,
    *,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    variant: str | None = None,
    config: str | None = None,
    offload: bool = False,
    storage: torch.dtype | None = None,
    lora: Sequence[str] = (),
) -> Source:
    """Load a diffusers pipeline for probing and search.

    Args:
        model: hub id, folder or .safetensors file; None is the bundled emoji pipeline.
        components: names of the components to study, or "all" alone; None finds the denoisers.
        config: folder or hub id with the configs for a single file.
        dtype: compute dtype; "auto" is float32 on the CPU and the storage dtype on CUDA.
        device: "auto" is CUDA if available.
        offload: keep the weights in main memory and stream them to the device.
        storage: dtype to which the studied components are rounded; None is that of the files.
        lora: LoRA files to merge into the weights, each FILE or FILE:SCALE.

    Raises:
        BitPolicyError: there is no such folder, repository, component, dtype or device, or it is not a diffusers
            pipeline.
    """
    place = device_named(device)
    if dtype not in ("auto", *DTYPES):
        raise BitPolicyError(f"unknown dtype {dtype!r}; write auto, {', '.join(DTYPES)}")
    path = locate(model, revision, variant, config)
    if path.is_file():
        single = SingleFile.of(path, config, components)
        storage, components, files, stamps = storage or dtype_of_file(single), [single.component], None, None
        pipe = single.open(torch.float32 if lora else storage)
    else:
        files = PipelineFiles(path, variant)
        require_pipeline(path)
        stamps = files.stamps()
        storage = storage or storage_dtype(path, components, variant)
        pipe = open_pipeline(path, torch.float32 if lora else storage, variant)
    if lora:
        merge(pipe, lora)
        files = stamps = None  # they hold other weights
    compute = DTYPES.get(dtype) or (torch.float32 if place.type == "cpu" else storage)
    target = Target.chosen(pipe, components)
    for name, studied in target.items():
        if getattr(studied, "hf_quantizer", None) is not None:
            raise BitPolicyError(
                f"{model}: its {name} is already quantized; give the full-precision pipeline it was made from"
            )
    to_storage(target, storage)  # transformers keeps some weights in float32 regardless
    pipe.to(compute) if offload else pipe.to(place, compute)
    if offload:
        stream_weights(pipe, target, place)
    return Source(pipe, target.names, storage, model or BUNDLED, revision, files, stamps, tuple(lora))


def open_parts(
    model: str | None,
    components: Sequence[str] | None,
    storage: torch.dtype,
    revision: str | None = None,
    variant: str | None = None,
    config: str | None = None,
    lora: Sequence[str] = (),
) -> Parts:
    """The parts of a model to export, without loading it.

    Args:
        storage: dtype in which the components of a single file are loaded.
        lora: LoRA files to merge into the weights; the model is then loaded.

    Raises:
        BitPolicyError: as for `load_source`; or the weights are pickles.
    """
    path = locate(model, revision, variant, config)
    if lora:
        source = load_source(
            model, components, dtype="float32", device="cpu", config=config, storage=storage, lora=lora,
            revision=revision, variant=variant,
        )  # fmt: skip
        return source.parts
    if path.is_file():
        return SingleFile.of(path, config, components).parts(storage)
    require_pipeline(path)
    if components is not None and not has_names_of_models(path, components):
        pipe = open_pipeline(path, torch.float32, variant)
        return source_of(pipe, components, storage).parts
    return FolderParts(path, components, variant)


def source_of(
    pipe: DiffusionPipeline, components: Sequence[str] | None = None, storage: torch.dtype | None = None
) -> Source:
    """The source for a pipeline in memory. Its studied components are rounded to the storage dtype in place.

    Args:
        components: names of the components to study, or "all" alone; None finds the denoisers.
        storage: None is bfloat16 for a bfloat16 target and float16 for any other.
    """
    require_no_adapter(pipe)
    target = Target.chosen(pipe, components)
    packed = next((name for name, model in target.items() if any(packed_layers(model))), None)
    if packed is not None:
        raise BitPolicyError(f"the {packed} is already packed; give the full-precision pipeline it was made from")
    if storage is None:
        storage = torch.bfloat16 if target.dtype == torch.bfloat16 else torch.float16
    to_storage(target, storage)
    return Source(pipe, target.names, storage, str(pipe.config.get("_name_or_path") or type(pipe).__name__))


def open_pipeline(
    folder: Path, dtype: torch.dtype | None = None, variant: str | None = None, everything: bool = False
) -> DiffusionPipeline:
    """`DiffusionPipeline.from_pretrained` on a local folder, with errors that a person can use.

    Args:
        everything: compare every file of an exported folder with its manifest, including large ones.

    Raises:
        BitPolicyError: it is not a pipeline, its weights are pickles, a file is not as it was exported, or tensors are
            missing from a model's files.
    """
    require_pipeline(folder)
    verify(folder, everything)
    require_known_classes(read_json(folder / "model_index.json"), folder / "model_index.json")
    files = PipelineFiles(folder, variant)
    for name in files.components:
        files.weights(name)  # refuses pickles
    parts = [folder / name for name in files.components if (folder / name / "config.json").is_file()]
    configs = {f"the config in {part}": read_json(part / "config.json") for part in parts}
    dtypes: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    usual = torch.get_default_dtype()
    try:
        with bounded(configs), nothing_missing():
            return DiffusionPipeline.from_pretrained(
                str(folder), variant=variant, local_files_only=True, use_safetensors=True, **dtypes
            )
    except BitPolicyError:
        raise
    except Exception as error:  # a folder can make it raise anything; tokenizers raises Exception itself
        raise BitPolicyError(f"cannot load the pipeline in {folder}: {' '.join(str(error).split())}") from error
    finally:
        torch.set_default_dtype(usual)  # diffusers changes it, and does not restore it if a model cannot be built


def require_pipeline(folder: Path) -> None:
    """Check that the folder is a diffusers pipeline.

    Raises:
        BitPolicyError: it is not.
    """
    if (folder / "model_index.json").is_file():
        return
    empty = not folder.is_dir() or not any(folder.iterdir())
    found = "it is empty or missing" if empty else "it has no model_index.json"
    raise BitPolicyError(
        f"{folder} is not a diffusers pipeline folder: {found}; give a folder that save_pretrained wrote, or a hub id"
    )


def storage_dtype(folder: Path, components: Sequence[str] | None = None, variant: str | None = None) -> torch.dtype:
    """The dtype of most values in the safetensors files of the denoiser, or of the named components. It is float16 for
    float32 files, and if there are no files."""
    files = PipelineFiles(folder, variant)
    asked = DENOISERS if components is None or list(components) == [ALL] else components
    with_weights = [name for name in asked if files.has_weights(name)]
    if asked is DENOISERS and not with_weights:  # those of a prior, for example, have other names
        others = (name for name in files.components if files.kind(name)[0] != "transformers")
        with_weights = [name for name in others if files.has_weights(name)]
    return _commonest(spec for name in with_weights for file in files.specs(name).values() for spec in file.values())


def dtype_of_file(single: SingleFile) -> torch.dtype:
    """The same for a single file."""
    return _commonest(single.denoiser()[1].specs.values())


def _commonest(specs: Iterable[TensorSpec]) -> torch.dtype:
    counts: Counter[torch.dtype] = Counter()
    for spec in specs:
        counts[spec.dtype] += prod(spec.shape)
    common = counts.most_common(1)
    return torch.bfloat16 if common and common[0][0] == torch.bfloat16 else torch.float16


def stored_dtype(folder: Path) -> torch.dtype | None:
    """The storage dtype that a packed denoiser's config records; None if nothing in the folder is packed.

    Raises:
        BitPolicyError: the config cannot be used, or records an unknown dtype.
    """
    for name in DENOISERS:
        path = folder / name / "config.json"
        if path.is_file():
            recorded = _recorded(path).get("storage_dtype")
            if recorded and recorded not in DTYPES:
                raise BitPolicyError(f"{path}: storage_dtype is {recorded!r}, expected one of {', '.join(DTYPES)}")
            return DTYPES[recorded] if recorded else None
    return None


def _recorded(config: Path) -> dict[str, Any]:
    """The quantization_config in a config.json; empty if there is none."""
    found = read_json(config).get("quantization_config") or {}
    if not isinstance(found, dict):
        raise BitPolicyError(f"{config}: quantization_config is {type(found).__name__}, expected a mapping")
    return found


def packed_components(folder: Path) -> list[str] | None:
    """The components of an exported pipeline that contain packed layers; None if there are none."""
    found = [path.parent.name for path in sorted(folder.glob("*/config.json")) if _packs_layers(path)]
    return found or None


def is_ours(folder: Path) -> bool:
    """Whether a search or an export wrote this pipeline folder, with or without packed layers."""
    return any(_recorded(path).get("quant_method") == METHOD for path in sorted(folder.glob("*/config.json")))


def _packs_layers(config: Path) -> bool:
    return bool(_recorded(config).get("layers"))


def device_named(name: str) -> torch.device:
    """The device that "auto", "cpu" or "cuda" means on this machine.

    Raises:
        BitPolicyError: it is none of these names, or there is no such device.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise BitPolicyError(f"unknown device {name!r}; write auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise BitPolicyError("--device cuda: torch sees no CUDA device; use --device cpu or auto")
    given = device_of_this_process() if name != "cpu" else None
    if given is not None:
        return given
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def locate(model: str | None, revision: str | None, variant: str | None, config: str | None = None) -> Path:
    """The local folder or file of a model, downloaded if it is a hub id.

    Raises:
        BitPolicyError: there is none, or the hub refuses.
    """
    if model is None or model == BUNDLED:
        return BUNDLED_FOLDER
    path = Path(model).expanduser()
    if config is not None and not path.is_file():
        raise BitPolicyError(f"--config is for a single file, and --model {model} is not one; leave it out")
    if path.exists() or model.startswith((".", "/", "~")) or model.count("/") != 1:
        if not path.exists():
            raise BitPolicyError(
                f"--model {model}: there is no such folder or file; give a pipeline folder, a .safetensors file or a "
                "hub id like owner/name"
            )
        return path
    return download(model, revision, variant)
