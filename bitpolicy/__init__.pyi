"""What bitpolicy offers. Written by scripts/write_options.py."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from diffusers import DiffusionPipeline

from bitpolicy.api import export as export
from bitpolicy.api import export_for as export_for
from bitpolicy.api import load_pipeline as load_pipeline
from bitpolicy.kernels.compute.setting import resident_bytes as resident_bytes
from bitpolicy.kernels.compute.setting import set_compute as set_compute
from bitpolicy.kernels.dispatch import use_kernels as use_kernels
from bitpolicy.kernels.errors import BitPolicyError as BitPolicyError
from bitpolicy.policies.loading.packed_config import BitPolicyConfig as BitPolicyConfig
from bitpolicy.policies.policy import Policy as Policy
from bitpolicy.sensitivity.table import SensitivityTable

__version__: str

def probe(
    pipe: DiffusionPipeline | str | Path,
    *,
    quiet: bool = ...,
    revision: str | None = ...,
    variant: str | None = ...,
    lora: Sequence[str] | str = ...,
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = ...,
    device: str = ...,
    config: str | None = ...,
    component: str | None = ...,
    offload: bool = ...,
    prompts: str | Path | Mapping[str, Any] | Sequence[str | int | Mapping[str, Any]] | None = ...,
    call: Mapping[str, Any] | None = ...,
    formats: str | Sequence[str] = ...,
    quantizer: str = ...,
    compute: str = ...,
    probe: Literal["adjoint", "stepwise", "ablation", "weight", "prior"] = ...,
    vectors: int = ...,
    remeasure: int = ...,
    probe_memory: int | str | None = ...,
    seed: int = ...,
    samples: int = ...,
) -> SensitivityTable: ...
def search(
    pipe: DiffusionPipeline | str | Path,
    budget: int | float | str | None = ...,
    *,
    output_dir: str | Path | None = ...,
    quiet: bool = ...,
    target_psnr: float | None = ...,
    target_lpips: float | None = ...,
    policy: str | Path | None = ...,
    frontier: int = ...,
    scope: Literal["weights", "pipeline", "peak"] = ...,
    height: int | None = ...,
    width: int | None = ...,
    batch_size: int = ...,
    keep: Mapping[str, str] | Sequence[str] | str = ...,
    share_qkv: bool = ...,
    target: str | None = ...,
    revision: str | None = ...,
    variant: str | None = ...,
    lora: Sequence[str] | str = ...,
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = ...,
    device: str = ...,
    config: str | None = ...,
    component: str | None = ...,
    offload: bool = ...,
    prompts: str | Path | Mapping[str, Any] | Sequence[str | int | Mapping[str, Any]] | None = ...,
    call: Mapping[str, Any] | None = ...,
    formats: str | Sequence[str] = ...,
    quantizer: str = ...,
    compute: str = ...,
    probe: Literal["adjoint", "stepwise", "ablation", "weight", "prior"] = ...,
    vectors: int = ...,
    remeasure: int = ...,
    probe_memory: int | str | None = ...,
    seed: int = ...,
    trials: int = ...,
    all_trials: bool = ...,
    objective: Literal["mse", "ssim", "lpips"] = ...,
    sampler: Literal["tpe", "gp", "cmaes", "nsga2", "random"] = ...,
    space: Literal["group", "layer"] = ...,
    timeout: float | None = ...,
    storage: str | None = ...,
    remeasure_close: int = ...,
    features: str | Path | None = ...,
    search_samples: int = ...,
    confirm_samples: int = ...,
    held_out_samples: int = ...,
    samples: int = ...,
) -> Policy: ...
