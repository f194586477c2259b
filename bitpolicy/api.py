"""The Python API: the same road as the command line, on a pipeline that is in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from bitpolicy.hub import push, require_login
from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats import DEFAULT, parse_formats
from bitpolicy.kernels.quantizers import DEFAULT as DEFAULT_QUANTIZER
from bitpolicy.loading import open_parts, open_pipeline, source_of, stored_dtype
from bitpolicy.over_budget import warn_if_over_budget
from bitpolicy.plan import make_plan
from bitpolicy.policies.apply import choices_for
from bitpolicy.policies.calibration import Calibration, calibration_of
from bitpolicy.policies.checkpoint import MAX_SHARD_SIZE
from bitpolicy.policies.export import export_parts
from bitpolicy.policies.exporters.export import Exported, export_to
from bitpolicy.policies.measured_compute import measured_compute
from bitpolicy.policies.model_card import Card
from bitpolicy.policies.parts import Parts
from bitpolicy.policies.policy import Policy
from bitpolicy.policies.source import source_hash
from bitpolicy.sensitivity.inventory import inventory, warn_of_unsupported
from bitpolicy.sensitivity.progress import Stages
from bitpolicy.sensitivity.samples import Request
from bitpolicy.sensitivity.table import SensitivityTable
from bitpolicy.settings import Settings
from bitpolicy.workflow import SearchRun


def probe(
    pipe: DiffusionPipeline,
    *,
    call: Mapping[str, Any] | None = None,
    prompts: Sequence[Request] | None = None,
    formats: str | Sequence[str] = DEFAULT,
    probe: str = "adjoint",
    quantizer: str = DEFAULT_QUANTIZER,
    compute: str = "exact",
    samples: int = 16,
    vectors: int = 2,
    seed: int = 0,
    component: str | None = None,
    quiet: bool = False,
) -> SensitivityTable:
    """Score what quantizing each layer of a pipeline does to its final latent.

    Args:
        pipe: an unquantized diffusers pipeline. Its denoiser is rounded, in place, to the storage dtype.
        call: arguments of every pipeline call, e.g. {"num_inference_steps": 20}.
        prompts: what to draw: prompts, class labels, or mappings of call arguments such as {"prompt": "a cat", "image":
            picture}, of which a part is calibrated on; None is a built-in list.
        formats: candidates, as names.
        probe: "adjoint", "stepwise", "ablation" or "weight".
        quantizer: who rounds weights: "gptq", "rtn", "mse", "hqq", "gptq-trajectory" or "auto".
        compute: "exact", "int8": packed layers round their inputs to 8 bits, too, and that is part of the scores; or
            "fp8": those in `fp8` round theirs to float8.
        samples: calibration trajectories.
        vectors: random directions a sample (adjoint, stepwise).

    Raises:
        BitPolicyError: an argument is wrong, or a trajectory is not finite.
    """
    settings = Settings(
        budget="100%",
        prompts=tuple(prompts) if prompts else None,
        call=tuple((call or {}).items()),
        formats=tuple(format.name for format in parse_formats(formats)),
        probe=probe,
        quantizer=quantizer,
        compute=compute,
        calibration_samples=samples,
        vectors=vectors,
        seed=seed,
    )
    plan = make_plan(settings, source_of(pipe, component))
    with tempfile.TemporaryDirectory() as folder:
        run = plan.probe(settings, Path(folder), Stages(quiet))
        return run.table(run.reference())


def search(
    pipe: DiffusionPipeline,
    budget: str | None = None,
    *,
    target_psnr: float | None = None,
    call: Mapping[str, Any] | None = None,
    prompts: Sequence[Request] | None = None,
    formats: str | Sequence[str] = DEFAULT,
    probe: str = "adjoint",
    quantizer: str = DEFAULT_QUANTIZER,
    compute: str = "exact",
    trials: int = 24,
    seed: int = 0,
    component: str | None = None,
    output_dir: str | Path | None = None,
    quiet: bool = False,
    **options: Any,
) -> Policy:
    """Find the policy that harms the finished image least within `budget`, or the smallest that reaches a quality.

    Args:
        pipe: an unquantized diffusers pipeline. Its denoiser is rounded, in place, to the storage dtype.
        budget: "3GB", "3GiB", "700MB", "45%" or "4.5bit".
        target_psnr: dB against the unquantized pipeline, instead of a budget.
        quantizer: who rounds weights: "gptq", "rtn", "mse", "hqq", "gptq-trajectory" or "auto".
        compute: "exact", "int8": packed layers round their inputs to 8 bits, too: faster on CPUs with VNNI and on
            GPUs, for some accuracy; or "fp8": those in `fp8` round theirs to float8, for GPUs from Ada on. All that is
            predicted and measured is under it, and the policy records it.
        trials: Optuna trials; 0 keeps the exact solution of the knapsack.
        output_dir: keep policy.yaml, calibration, sensitivity table and journal here, and resume from them; None keeps
            none.
        options: other fields of `bitpolicy.settings.Settings`, e.g. calibration_samples=8, keep=("conv_in=fp16",),
            target_lpips=0.01, share_qkv=True.

    Returns:
        The policy, holding its calibration, ready for `export`.

    Raises:
        BitPolicyError: an argument is wrong, or no policy fits the budget.
    """
    settings = Settings(
        budget=budget,
        target_psnr=target_psnr,
        quantizer=quantizer,
        compute=compute,
        component=component,
        formats=tuple(f.name for f in parse_formats(formats)),
        prompts=tuple(prompts) if prompts else None,
        call=tuple(sorted((call or {}).items())),
        seed=seed,
        trials=trials,
        probe=probe,
        **options,
    )
    plan = make_plan(settings, source_of(pipe, component))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(output_dir or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        run = SearchRun(settings, plan, folder, Stages(quiet))
        policy = run.decide()
        assert policy is not None  # only a run without a budget and a target has none
        return policy.with_calibration({key: tensor.clone() for key, tensor in run.calibration.items()})


def export(
    pipe: DiffusionPipeline | str | Path,
    policy: Policy | str | Path,
    output_dir: str | Path,
    *,
    component_dtype: torch.dtype | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    revision: str | None = None,
    variant: str | None = None,
    config: str | None = None,
    push_to_hub: str | None = None,
    compute: str | None = None,
) -> int:
    """Write a pipeline as a diffusers folder whose denoiser is packed as `policy` says.

    Args:
        pipe: the unquantized pipeline that the policy was made for: in memory, or a hub id, a folder or a single
            .safetensors file, which is then not loaded but read layer by layer. Both ways write the same bytes.
        policy: a policy, or the path of a policy.yaml with calibration.safetensors beside it.
        component_dtype: dtype the other components are stored in; None is the policy's storage dtype.
        max_shard_size: bytes; a larger denoiser is split into files of at most so many.
        revision, variant: of what is on the hub or in a folder.
        config: folder or hub id with the configs of a single file.
        push_to_hub: OWNER/NAME of a model repository that the folder is uploaded to.
        compute: "exact", "int8" or "fp8", of the packed layers once the checkpoint is loaded; None is the policy's own.

    Returns:
        Tensor bytes of the packed denoiser.

    Raises:
        BitPolicyError: the policy is for another model, its calibration is missing, or the hub refuses.
    """
    given = policy if isinstance(policy, Policy) else Policy.load(policy)
    if compute is not None:
        given = given.under(measured_compute(compute))
    if push_to_hub is not None:
        require_login(push_to_hub)
    parts = _parts(pipe, given, revision, variant, config)
    layers = inventory(parts.denoiser)
    warn_of_unsupported(parts.denoiser)
    warn_if_over_budget(given, parts.denoiser)
    nbytes = export_parts(
        parts,
        given,
        _calibration(given, policy, parts),
        Path(output_dir),
        component_dtype=component_dtype,
        max_shard_size=max_shard_size,
        card=Card(push_to_hub or "this/folder", {layer.name: layer.role for layer in layers}),
    )
    if push_to_hub is not None:
        push(Path(output_dir), push_to_hub)
    return nbytes


def export_for(
    pipe: DiffusionPipeline | str | Path,
    policy: Policy | str | Path,
    output_dir: str | Path,
    target: str,
    *,
    requantize: bool = False,
    revision: str | None = None,
    variant: str | None = None,
    config: str | None = None,
) -> Exported:
    """Write the denoiser of a pipeline, packed as `policy` says, in the files of another program.

    Args:
        pipe, policy, revision, variant, config: as for `export`.
        target: "comfy", "comfy-int8", "sdnq", "torchao" or "modelopt"; see docs/exporters.md.
        requantize: round layers anew whose format the target does not have, instead of refusing.

    Returns:
        Bytes, layers that were rounded anew, and what of the policy the target does not carry.

    Raises:
        BitPolicyError: as `export`; or the target does not hold the policy, or does not know this class of model.
    """
    given = policy if isinstance(policy, Policy) else Policy.load(policy)
    parts = _parts(pipe, given, revision, variant, config)
    calibration = _calibration(given, policy, parts)
    warn_of_unsupported(parts.denoiser)
    warn_if_over_budget(given, parts.denoiser)
    return export_to(target, parts, given, calibration, Path(output_dir), requantize=requantize)


def _parts(
    pipe: DiffusionPipeline | str | Path,
    policy: Policy,
    revision: str | None,
    variant: str | None,
    config: str | None,
) -> Parts:
    """Where what is exported lies.

    Raises:
        BitPolicyError: there is no such model, or the policy is for another.
    """
    storage = getattr(torch, policy.storage_dtype)
    if isinstance(pipe, str | Path):
        parts = open_parts(str(pipe), policy.model.component, storage, revision, variant, config)
    else:
        parts = source_of(pipe, policy.model.component, storage).parts
    _require_model(policy, source_hash(parts.sources, storage))
    return parts


def load_pipeline(
    folder: str | Path, dtype: torch.dtype | None = None, device: str | torch.device | None = None
) -> DiffusionPipeline:
    """Load an exported pipeline; its layers stay packed in memory.

    Args:
        folder: what `export` or search-policy's checkpoint/ wrote.
        dtype: compute dtype; None keeps the storage dtype.

    Raises:
        BitPolicyError: it is no such folder.
    """
    pipe = open_pipeline(Path(folder), dtype or stored_dtype(Path(folder)))
    return pipe.to(device) if device is not None else pipe


def _require_model(policy: Policy, found: str) -> None:
    model = policy.model
    for (component, wanted), has in zip(model.hashes.items(), found.split(","), strict=True):
        if has != wanted:
            raise BitPolicyError(
                f"the policy was made for {model.id} ({model.class_name}, "
                f"sha256 {wanted[:12]}...), this {component} has sha256 {has[:12]}...; "
                "give that model, or run search-policy on this one"
            )


def _calibration(policy: Policy, given: Policy | str | Path, parts: Parts) -> Calibration:
    """Of a policy that was given in memory or as a file."""
    path = None if isinstance(given, Policy) else Path(given)
    return calibration_of(policy, path, choices_for(parts.denoiser, policy).values())
