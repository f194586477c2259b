"""The Python API: the same workflow as the command line, also for a pipeline that is already in memory."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from bitpolicy.arguments import Named, python_call, settings_for
from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.pipelines.hub import push, require_login
from bitpolicy.pipelines.loading import DTYPES, open_parts, open_pipeline, source_of, stored_dtype
from bitpolicy.policies.apply import choices_for
from bitpolicy.policies.calibration import Calibration
from bitpolicy.policies.checkpoints.checkpoint import MAX_SHARD_SIZE
from bitpolicy.policies.checkpoints.model_card import Card
from bitpolicy.policies.checkpoints.parts import Parts
from bitpolicy.policies.checkpoints.pipeline import export_parts
from bitpolicy.policies.components import asked_components
from bitpolicy.policies.exporters.export import Exported, export_to
from bitpolicy.policies.exporters.targets import exporter_named
from bitpolicy.policies.measured_compute import measured_compute
from bitpolicy.policies.policy import Policy
from bitpolicy.policies.storage.calibration_file import calibration_of
from bitpolicy.policies.storage.folder_lock import working_in
from bitpolicy.policies.storage.source import Unchanged, source_hashes
from bitpolicy.search.budget import read_bytes
from bitpolicy.sensitivity.cost.progress import Stages
from bitpolicy.sensitivity.inventory import inventory, warn_of_unsupported
from bitpolicy.sensitivity.table import SensitivityTable
from bitpolicy.settings import (
    AimOptions,
    CallArguments,
    PipelineOptions,
    ProbeOptions,
    QuantizationOptions,
    Settings,
    StudyOptions,
)
from bitpolicy.workflow.forecast import Forecast
from bitpolicy.workflow.over_budget import warn_if_over_budget
from bitpolicy.workflow.plan import Plan, make_plan
from bitpolicy.workflow.search_run import SearchRun
from bitpolicy.workflow.transfer import for_transfer


@python_call(PipelineOptions, CallArguments, QuantizationOptions, ProbeOptions)
def probe(pipe: DiffusionPipeline | Named | Path, *, quiet: bool = False, **options: Any) -> SensitivityTable:
    """Score what quantizing each layer of a pipeline does to its final latent.

    Args:
        pipe: an unquantized diffusers pipeline, its folder, a single .safetensors file, or a hub id; "bitpolicy/emoji"
            is the bundled pipeline. The denoiser of a pipeline in memory is rounded to the storage dtype in place.
        quiet: show no progress bars.
        options: those of docs/options.md except "What to ask for" and the study, e.g. samples=16, formats="int4,int8",
            call={"num_inference_steps": 20}.

    Raises:
        BitPolicyError: an argument is invalid, or a trajectory is not finite.
    """
    settings = settings_for({"budget": "100%", **options}, _name(pipe))
    stages = Stages(quiet)
    with stages.whole_run(), tempfile.TemporaryDirectory() as folder:
        plan = _plan(pipe, settings)
        stages.expect(Forecast(settings, plan).of_probe())
        run = plan.probe(settings, Path(folder), stages)
        return run.table(run.reference())


@python_call(AimOptions, PipelineOptions, CallArguments, QuantizationOptions, ProbeOptions, StudyOptions)
def search(
    pipe: DiffusionPipeline | Named | Path,
    budget: int | float | str | None = None,
    *,
    output_dir: Named | Path | None = None,
    quiet: bool = False,
    **options: Any,
) -> Policy:
    """Find the policy that harms the finished image least within `budget`, or the smallest policy that reaches a
    quality.

    Args:
        pipe: as for `probe`.
        budget: bytes, as a number or as text: 5000000, "3GB", "3GiB", "700MB", "45%" or "4.5bit".
        output_dir: folder for policy.yaml, calibration, sensitivity table and journal. A search resumes from what it
            finds there. None keeps nothing.
        quiet: show no progress bars.
        options: those of docs/options.md, e.g. target_psnr=45, keep={"conv_in": "fp16"}, trials=0,
            call={"num_inference_steps": 20}. dtype, device, offload, revision, variant and config apply only to a
            pipeline given by its path or hub id.

    Returns:
        The policy with its calibration, ready for `export`.

    Raises:
        BitPolicyError: an argument is invalid, or no policy fits the budget.
    """
    settings = for_transfer(settings_for({"budget": budget, **options}, _name(pipe)))
    if not settings.aims:
        raise BitPolicyError("--frontier alone chooses no policy; add --budget or --target-psnr")
    stages = Stages(quiet)
    with stages.whole_run(), ExitStack() as stack:
        plan = _plan(pipe, settings)
        folder = Path(output_dir or stack.enter_context(tempfile.TemporaryDirectory()))
        stages.expect(Forecast(settings, plan).of_search(evaluated=False))
        stack.enter_context(working_in(folder))
        run = SearchRun(settings, plan, folder, stages)
        policy = run.decide()
        assert policy is not None  # it is None only without a budget and a target
        held = {name: tensor.clone() for name, tensor in run.calibration.tensors().items()}
        return policy.with_calibration(held)


def _name(pipe: DiffusionPipeline | str | Path) -> str | None:
    """The path or hub id of a pipeline that is not in memory, otherwise None."""
    return None if isinstance(pipe, DiffusionPipeline) else str(pipe)


def _plan(pipe: DiffusionPipeline | str | Path, settings: Settings) -> Plan:
    if not isinstance(pipe, DiffusionPipeline):
        return make_plan(settings)
    default = Settings(budget="100%")
    names = ("dtype", "device", "offload", "revision", "variant", "config", "lora")
    _require_path(**{name: getattr(settings, name) != getattr(default, name) for name in names})
    return make_plan(settings, source_of(pipe, asked_components(settings.component)))


def _require_path(**given: bool) -> None:
    """Check that no loading option is given for a pipeline in memory.

    Raises:
        BitPolicyError: one is.
    """
    for name in (name for name, is_given in given.items() if is_given):
        raise BitPolicyError(
            f"{name} is for loading a pipeline, but this one is already in memory; leave it out, or give the folder or "
            "hub id instead of the pipeline"
        )


@python_call()
def export(
    pipe: DiffusionPipeline | Named | Path,
    policy: Policy | Named | Path,
    output_dir: Named | Path,
    *,
    component_dtype: torch.dtype | str | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    revision: str | None = None,
    variant: str | None = None,
    config: str | Path | None = None,
    push_to_hub: str | None = None,
    compute: str | None = None,
    overwrite: bool = False,
) -> int:
    """Write a pipeline as a diffusers folder, with its denoiser packed as `policy` says.

    Args:
        pipe: the unquantized pipeline that the policy was made for: in memory, or a hub id, a folder or a single
            .safetensors file. The last three are read layer by layer, without loading the pipeline, unless the policy
            names LoRAs, which are then merged first. All of them write the same bytes.
        policy: a policy, or the path of a policy.yaml with calibration.safetensors in the same folder.
        output_dir: the folder to write.
        component_dtype: dtype in which the other components are stored, torch.float16 or "float16"; None means the
            policy's storage dtype.
        max_shard_size: bytes, as a number or as text such as "10GB"; a larger denoiser is split into files of at most
            this size.
        revision, variant: of a pipeline on the hub or in a folder.
        config: folder or hub id with the configs for a single file.
        push_to_hub: OWNER/NAME of the model repository to upload the folder to.
        compute: compute mode of the packed layers once the checkpoint is loaded, "exact", "int8", "fp8", "mxfp8" or
            "nvfp4"; None means the policy's own.
        overwrite: replace a pipeline in `output_dir` once the new one is complete.

    Returns:
        Tensor bytes of the packed denoiser.

    Raises:
        BitPolicyError: an argument is invalid, `output_dir` already exists, the policy is for another model, its
            calibration is missing, or the hub refuses.
    """
    shard = read_bytes(str(max_shard_size), "--max-shard-size")
    if shard < 1:
        raise BitPolicyError(f"--max-shard-size is {max_shard_size}; write a size such as 10GB")
    _require_free(Path(output_dir), overwrite)
    given = policy if isinstance(policy, Policy) else Policy.load(policy)
    if compute is not None:
        given = given.under(measured_compute(compute))
    if push_to_hub is not None:
        require_login(push_to_hub)
    parts = _parts(pipe, given, revision, variant, config)
    layers = inventory(parts.target)
    warn_of_unsupported(parts.target)
    warn_if_over_budget(given, parts.target)
    nbytes = export_parts(
        parts,
        given,
        _calibration(given, policy, parts),
        Path(output_dir),
        component_dtype=_dtype("component_dtype", component_dtype),
        max_shard_size=shard,
        card=Card(push_to_hub or "this/folder", {layer.name: layer.role for layer in layers}),
    )
    if push_to_hub is not None:
        push(Path(output_dir), push_to_hub)
    return nbytes


@python_call()
def export_for(
    pipe: DiffusionPipeline | Named | Path,
    policy: Policy | Named | Path,
    output_dir: Named | Path,
    target: str,
    *,
    requantize: bool = False,
    revision: str | None = None,
    variant: str | None = None,
    config: str | Path | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write the denoiser of a pipeline, packed as `policy` says, in another program's file format.

    Args:
        pipe, policy, output_dir, revision, variant, config, overwrite: as for `export`.
        target: "comfy", "comfy-int8", "sdnq", "torchao" or "modelopt"; see docs/exporters.md.
        requantize: round layers again if the target does not have their format, instead of refusing.

    Returns:
        The bytes, the layers that were rounded again, and the parts of the policy that the target does not carry.

    Raises:
        BitPolicyError: as for `export`; or the target cannot hold the policy, or does not know this class of model.
    """
    exporter_named(target)
    _require_free(Path(output_dir), overwrite)
    given = policy if isinstance(policy, Policy) else Policy.load(policy)
    parts = _parts(pipe, given, revision, variant, config)
    calibration = _calibration(given, policy, parts)
    warn_of_unsupported(parts.target)
    warn_if_over_budget(given, parts.target)
    return export_to(target, parts, given, calibration, Path(output_dir), requantize=requantize)


def _parts(
    pipe: DiffusionPipeline | str | Path,
    policy: Policy,
    revision: str | None,
    variant: str | None,
    config: str | Path | None,
) -> Parts:
    """The components to export, and where to read them.

    Raises:
        BitPolicyError: there is no such model, or the policy is for another one.
    """
    storage = getattr(torch, policy.storage_dtype)
    if isinstance(pipe, str | Path):
        where = None if config is None else str(config)
        parts = open_parts(
            str(pipe), policy.model.components, storage, revision, variant, where, policy.model.lora or ()
        )
    else:
        _require_path(revision=revision is not None, variant=variant is not None, config=config is not None)
        parts = source_of(pipe, policy.model.components, storage).parts
    _require_model(policy, parts, storage)
    return parts


@python_call()
def load_pipeline(
    folder: Named | Path,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    *,
    verify: str = "quick",
) -> DiffusionPipeline:
    """Load an exported pipeline. Its layers stay packed in memory.

    Args:
        folder: a folder that `export` wrote, or the checkpoint/ of a search.
        dtype: compute dtype, torch.float32 or "float32"; None means the storage dtype.
        device: device to load onto; None means the CPU.
        verify: "quick" compares the lengths of all files with the folder's bitpolicy.json, the checksums of packed
            tensors, and the SHA-256 of files up to 32 MiB; "all" compares the SHA-256 of every file.

    Raises:
        BitPolicyError: it is not such a folder, a file in it is not as it was exported, or the dtype or device is
            unknown.
    """
    if verify not in ("quick", "all"):
        raise BitPolicyError(f"verify is {verify!r}; give quick or all")
    compute = _dtype("dtype", dtype)
    try:
        target = None if device is None else torch.device(device)
    except RuntimeError as error:
        raise BitPolicyError(f"device is {device!r}; give a torch device such as cpu or cuda:0") from error
    pipe = open_pipeline(Path(folder), compute or stored_dtype(Path(folder)), everything=verify == "all")
    return pipe.to(target) if target is not None else pipe


def _dtype(name: str, dtype: torch.dtype | str | None) -> torch.dtype | None:
    if isinstance(dtype, torch.dtype) or dtype is None:
        return dtype
    if dtype not in DTYPES:
        raise BitPolicyError(f"{name} is {dtype!r}; give {', '.join(DTYPES)}, or a torch dtype")
    return DTYPES[dtype]


def _require_free(folder: Path, overwrite: bool) -> None:
    """Check that the folder is empty or may be replaced.

    Raises:
        BitPolicyError: neither is the case.
    """
    if folder.exists() and not overwrite and (not folder.is_dir() or any(folder.iterdir())):
        raise BitPolicyError(f"{folder} already exists; choose another --output-dir, or give --overwrite")


def _require_model(policy: Policy, parts: Parts, storage: torch.dtype) -> None:
    """Check that the policy was made for these weights and configs. A later read fails if the weights change."""
    model = policy.model
    parts.sources = {name: Unchanged(source, storage) for name, source in parts.sources.items()}
    found = source_hashes(parts.sources, storage)
    for component, wanted in model.hashes.items():
        has = found[component]
        if has != wanted:
            raise BitPolicyError(
                f"the policy was made for {model.id} ({model.class_name}, "
                f"sha256 {wanted[:12]}...), but this {component} has sha256 {has[:12]}...; "
                "give that model, or give this one the policy's formats: search-policy --policy policy.yaml --model ..."
            )
    for component, part in parts.target.items():
        model.require_config(component, part)


def _calibration(policy: Policy, given: Policy | str | Path, parts: Parts) -> Calibration:
    """The calibration of a policy that was given in memory or as a file."""
    path = None if isinstance(given, Policy) else Path(given)
    return calibration_of(policy, path, choices_for(parts.target, policy).values())
