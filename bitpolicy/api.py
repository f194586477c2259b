"""The Python API: the same road as the command line, on a pipeline that is in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats import DEFAULT, parse_formats
from bitpolicy.loading import Source, open_pipeline, source_of, stored_dtype
from bitpolicy.plan import make_plan
from bitpolicy.policies.calibration import Calibration, load_calibration
from bitpolicy.policies.checkpoint import export_pipeline
from bitpolicy.policies.exporters.export import Exported, export_to
from bitpolicy.policies.policy import Policy
from bitpolicy.sensitivity.inventory import inventory
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
    quantizer: str = "rtn",
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
        quantizer: "rtn", "mse", "hqq", "gptq", "gptq-trajectory" or "auto".
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
    quantizer: str = "rtn",
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
        quantizer: "rtn", "mse", "hqq", "gptq", "gptq-trajectory" or "auto".
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
        return policy.with_calibration(run.calibration)


def export(
    pipe: DiffusionPipeline,
    policy: Policy | str | Path,
    output_dir: str | Path,
    *,
    component_dtype: torch.dtype | None = None,
) -> int:
    """Write `pipe` as a diffusers folder whose denoiser is packed as `policy` says.

    Args:
        pipe: the unquantized pipeline that the policy was made for.
        policy: a policy, or the path of a policy.yaml with calibration.safetensors beside it.
        component_dtype: dtype the other components are stored in; None is the policy's storage dtype.

    Returns:
        Tensor bytes of the packed denoiser.

    Raises:
        BitPolicyError: the policy is for another model, or its calibration is missing.
    """
    given, source, calibration = _checked(pipe, policy)
    return export_pipeline(
        pipe, source.component, given, calibration, Path(output_dir), component_dtype=component_dtype
    )


def export_for(
    pipe: DiffusionPipeline,
    policy: Policy | str | Path,
    output_dir: str | Path,
    target: str,
    *,
    requantize: bool = False,
) -> Exported:
    """Write the denoiser of `pipe`, packed as `policy` says, in the files of another program.

    Args:
        pipe, policy: as for `export`.
        target: "comfy", "comfy-int8", "sdnq", "torchao" or "modelopt"; see docs/exporters.md.
        requantize: round layers anew whose format the target does not have, instead of refusing.

    Returns:
        Bytes, layers that were rounded anew, and what of the policy the target does not carry.

    Raises:
        BitPolicyError: as `export`; or the target does not hold the policy, or does not know this class of model.
    """
    given, source, calibration = _checked(pipe, policy)
    return export_to(target, pipe, source.component, given, calibration, Path(output_dir), requantize=requantize)


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


def _checked(pipe: DiffusionPipeline, policy: Policy | str | Path) -> tuple[Policy, Source, Calibration]:
    """The policy, the model it was made for, and its calibration."""
    given = policy if isinstance(policy, Policy) else Policy.load(policy)
    source = source_of(pipe, given.model.component, getattr(torch, given.storage_dtype))
    found = source.sha256
    if found != given.model.sha256:
        raise BitPolicyError(
            f"the policy was made for {given.model.id} ({given.model.class_name}, "
            f"sha256 {given.model.sha256[:12]}...), this {given.model.component} has sha256 {found[:12]}...; "
            "give that model, or run search-policy on this one"
        )
    calibration = given.calibration
    if calibration is None:
        recorded = given.provenance.get("calibration")
        beside = (
            Path(policy).parent / "calibration.safetensors"
            if not isinstance(policy, Policy)
            else Path("calibration.safetensors")
        )
        calibration = load_calibration(beside, recorded) if _needs_calibration(given, source.denoiser) else {}
    return given, source, calibration


def _needs_calibration(policy: Policy, denoiser: torch.nn.Module) -> bool:
    choices = policy.resolve(layer.name for layer in inventory(denoiser)).values()
    return any(choice.needs_calibration for choice in choices)
