"""Every option of a search, declared once: its type, its default, the values it takes and what it does.

The command line, the keywords of `bitpolicy.probe` and `bitpolicy.search`, `run.json` and docs/options.md are all made
from the fields below. This module imports nothing heavy, so that `--help` answers at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from bitpolicy.declared import Option, declared_options, seed_option
from bitpolicy.kernels import names
from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.policies.exporters.names import NAMES as TARGETS

AIMS = ("budget", "target_psnr", "target_lpips", "policy")


@dataclass(frozen=True)
class AimOptions:
    """What is asked for: a size or a quality, and what the search may choose."""

    group: ClassVar = "What to ask for"

    budget: Annotated[
        str | None,
        Option(
            "Size of the denoiser, or of all of --component: 3GB, 3GiB, 700MB, 45% of FP16, 4.5bit a parameter.",
            python=int | float | str | None,
        ),
    ] = None
    target_psnr: Annotated[
        float | None,
        Option(
            "Instead of a budget: the smallest size whose images reach this PSNR against FP16, in dB.",
            above=0,
            most=150,
            allowed="dB above 0, at most 150: float32 images cannot be told apart beyond",
        ),
    ] = None
    target_lpips: Annotated[
        float | None,
        Option(
            "Instead of a budget: the smallest size whose images stay within this LPIPS distance of FP16. The bundled "
            "pipeline is measured with its own small network, lpips-emoji.",
            above=0,
            most=1,
            allowed="a distance above 0, at most 1, e.g. 0.01",
        ),
    ] = None
    policy: Annotated[
        str | None,
        Option(
            "Instead of a budget: the formats of this policy.yaml, made for a model with the same layers, such as the "
            "one that this model was fine-tuned from. Weights are rounded and biases corrected again; nothing is "
            "probed or searched.",
            python=str | Path | None,
            metavar="FILE",
        ),
    ] = None
    frontier: Annotated[
        int,
        Option(
            "Also write the whole curve to frontier/: N policies from the smallest to FP16, a table and a plot.",
            least=0,
            most=200,
            allowed="a number of policies from 0 to 200",
            metavar="N",
        ),
    ] = 0
    scope: Annotated[
        Literal["weights", "pipeline", "peak"],
        Option(
            "What the budget covers: the weights of the denoiser or of --component; the whole pipeline; or the peak "
            "memory of one pipeline call, activations included."
        ),
    ] = "weights"
    height: Annotated[int | None, Option("Image height in pixels, for --scope peak.", least=1)] = None
    width: Annotated[int | None, Option("Image width in pixels, for --scope peak.", least=1)] = None
    batch_size: Annotated[int, Option("Images per call, for --scope peak.", least=1)] = 1
    keep: Annotated[
        tuple[str, ...],
        Option(
            "Fix the format of some layers, e.g. `--keep '*time_embedding*=fp16'`. May be repeated; the last match "
            "wins.",
            typed=list[str] | None,
            python=Mapping[str, str] | Sequence[str] | str,
            metavar="GLOB=FORMAT",
        ),
    ] = ()
    share_qkv: Annotated[bool, Option("Give the query, key and value projections of an attention the same format.")] = (
        False
    )
    target: Annotated[
        str | None, Option(f"Use only what another program can load, layer by layer: {', '.join(TARGETS)}.")
    ] = None


@dataclass(frozen=True)
class ModelOptions:
    """Which model."""

    group: ClassVar = "Model"

    model: Annotated[
        str | None,
        Option("Hub id, diffusers folder or single .safetensors file. Default: the bundled emoji pipeline."),
    ] = None


@dataclass(frozen=True)
class HubOptions:
    """Which files of a model are read."""

    group: ClassVar = "Model"

    revision: Annotated[str | None, Option("Branch, tag or commit of a hub model.")] = None
    variant: Annotated[str | None, Option("Variant of the weight files, e.g. fp16.")] = None


@dataclass(frozen=True)
class DeviceOptions:
    """How and where a pipeline computes."""

    group: ClassVar = "Model"

    dtype: Annotated[
        Literal["auto", "float16", "bfloat16", "float32"],
        Option(
            "Dtype of the computation: auto (float32 on a CPU, else the dtype of the weights), float16, bfloat16 or "
            "float32.",
            metavar="DTYPE",
        ),
    ] = "auto"
    device: Annotated[str, Option("auto, cpu or cuda.")] = "auto"


@dataclass(frozen=True)
class ConfigOptions:
    """What a single file lacks."""

    group: ClassVar = "Model"

    config: Annotated[
        str | None,
        Option(
            "Configs for a model that is a single file: a diffusers folder or hub id of the same kind of model. "
            "Default: the repository that diffusers finds for the file."
        ),
    ] = None


@dataclass(frozen=True)
class ComponentOptions:
    """What is quantized."""

    group: ClassVar = "Model"

    component: Annotated[
        str | None,
        Option(
            "Components to quantize, separated by commas: unet,text_encoder,vae; or all. Default: the denoiser. Errors "
            "are measured in the final latent, or in the image if the VAE is among them."
        ),
    ] = None


@dataclass(frozen=True)
class LoraOptions:
    """What is merged into the model."""

    group: ClassVar = "Model"

    lora: Annotated[
        tuple[str, ...],
        Option(
            "A LoRA to merge into the weights before anything else: a .safetensors file or a hub id, with a scale if "
            "it is not 1. May be repeated.",
            typed=list[str] | None,
            python=Sequence[str] | str,
            metavar="FILE[:SCALE]",
        ),
    ] = ()


@dataclass(frozen=True)
class PipelineOptions(ComponentOptions, ConfigOptions, DeviceOptions, LoraOptions, HubOptions, ModelOptions):
    """The unquantized pipeline."""

    group: ClassVar = "Model"

    offload: Annotated[
        bool, Option("Keep the weights in main memory and stream them to the GPU, for models larger than it.")
    ] = False


@dataclass(frozen=True)
class CallArguments:
    """What every pipeline call is given."""

    group: ClassVar = "Pipeline call"

    prompts: Annotated[
        tuple[str | Mapping[str, Any], ...] | None,
        Option(
            "Prompts, class labels, or mappings of call arguments; a path is a file of prompts. Default: a built-in "
            "list.",
            python=str | Path | Mapping[str, Any] | Sequence[str | int | Mapping[str, Any]] | None,
            only_python=True,
        ),
    ] = None
    call: Annotated[
        tuple[tuple[str, Any], ...],
        Option(
            'Arguments of every pipeline call, e.g. {"num_inference_steps": 20}.',
            python=Mapping[str, Any] | None,
            only_python=True,
        ),
    ] = ()


@dataclass(frozen=True)
class QuantizationOptions:
    """What a layer may become."""

    group: ClassVar = "Quantization"

    formats: Annotated[
        tuple[str, ...],
        Option(f"Candidate formats: {names.WRITE}.", typed=str, python=str | Sequence[str]),
    ] = names.DEFAULT_FORMATS
    quantizer: Annotated[
        str,
        Option(
            "Rounding method: gptq (rounding errors compensate each other), rtn (round to nearest), mse, hqq, "
            "gptq-trajectory, or auto, which tries them all and keeps the best for each layer and format."
        ),
    ] = names.DEFAULT_QUANTIZER
    compute: Annotated[
        str,
        Option(
            "Activation quantization of packed layers: exact (none; weights are dequantized), int8 (inputs are rounded "
            "to 8 bits: faster on CPUs with VNNI and on GPUs), fp8 (inputs of fp8 and fp8-tensor layers are rounded to "
            "float8, for GPUs from Ada on), mxfp8 (inputs of mxfp8 and mxfp4 layers, to float8 in blocks) or nvfp4 "
            "(inputs of nvfp4 layers, to 4 bits in blocks; both for GPUs from Blackwell on). Its error is part of "
            "every score."
        ),
    ] = "exact"


@dataclass(frozen=True)
class ProbeOptions:
    """How layers are scored."""

    group: ClassVar = "Probe"

    probe: Annotated[
        Literal["adjoint", "stepwise", "ablation", "weight", "prior"],
        Option(
            "How layers are scored: adjoint (backward through the whole sampling loop), stepwise (each step alone), "
            "ablation (quantize one layer at a time and draw; slow), weight (weight error only; no image) or prior "
            "(weight error, times what such layers did in other models; no image).",
            metavar="NAME",
        ),
    ] = "adjoint"
    calibration_samples: Annotated[int, Option("Calibration trajectories.", least=1, name="samples")] = 16
    vectors: Annotated[int, Option("Random probe vectors per trajectory.", least=1)] = 2
    remeasure: Annotated[
        int,
        Option(
            "Measure at most this many scores by quantizing and drawing, where an error is too large to be predicted.",
            least=0,
        ),
    ] = 8
    probe_memory: Annotated[
        str | None,
        Option(
            "Memory for the adjoint and the stepwise probe beyond the model and one step, e.g. 8GB: 4 bytes for each "
            "weight, and its candidates' codes. With less, the scores take longer. Default: half of what is free.",
            python=int | str | None,
            metavar="SIZE",
        ),
    ] = None
    seed: Annotated[int, seed_option("Seed of samples, split and sampler. The same seed gives the same policy.")] = 0


@dataclass(frozen=True)
class SplitOptions:
    """What `bitpolicy probe --split` needs more."""

    group: ClassVar = "Probe"

    shared: Annotated[int, Option("Probe vectors shared by all trajectories, for --split.", least=1)] = 8


@dataclass(frozen=True)
class StudyOptions:
    """How policies are tried on real generations."""

    group: ClassVar = "Study"

    trials: Annotated[
        int,
        Option(
            "Optuna trials at most, each on real generations; the study stops earlier if more are unlikely to improve "
            "anything. 0 keeps the exact solution of the knapsack.",
            least=0,
        ),
    ] = 24
    all_trials: Annotated[bool, Option("Run all --trials, even if they are unlikely to improve anything.")] = False
    objective: Annotated[
        Literal["mse", "ssim", "lpips"],
        Option(
            "What trials minimise on finished images: mse, ssim (1 - SSIM) or lpips. The probe's scores and the exact "
            "solution are for squared errors with each of them.",
            metavar="NAME",
        ),
    ] = "mse"
    sampler: Annotated[
        Literal["tpe", "gp", "cmaes", "nsga2", "random"],
        Option("Optuna sampler: tpe, gp, cmaes (pip install 'bitpolicy[cmaes]'), nsga2 or random.", metavar="NAME"),
    ] = "tpe"
    space: Annotated[
        Literal["group", "layer"],
        Option("What a trial varies: the weight of each group of layers (a role in a stage), or of each layer."),
    ] = "group"
    timeout: Annotated[float | None, Option("Seconds after which no new trial starts.", least=0)] = None
    storage: Annotated[
        str | None, Option("Optuna storage URL, to share a study between workers. Default: a journal file.")
    ] = None
    remeasure_close: Annotated[
        int, Option("Measure at most this many scores that close decisions depend on.", least=0)
    ] = 0
    features: Annotated[
        str | None,
        Option("File or folder with the networks that measure quality, such as LPIPS.", python=str | Path | None),
    ] = None
    search_samples: Annotated[int, Option("Images each trial draws.", least=1)] = 16
    confirm_samples: Annotated[int, Option("Images that decide between the finalists.", least=1)] = 16
    held_out_samples: Annotated[int, Option("Images the reported quality is measured on.", least=1)] = 16


@dataclass(frozen=True)
class Settings(
    StudyOptions, SplitOptions, ProbeOptions, QuantizationOptions, CallArguments, PipelineOptions, AimOptions
):
    """One search. Two runs with equal settings give the same policy.

    Raises:
        BitPolicyError: on construction, if a value is not allowed, or if not exactly one aim is given.
    """

    def __post_init__(self) -> None:
        if len(self.aims) > 1 or not (self.aims or self.frontier):
            found = " and ".join(f"--{name.replace('_', '-')}" for name in self.aims) or "nothing"
            raise BitPolicyError(
                f"asked for {found}; give one of --budget SIZE, --target-psnr DB, --target-lpips DISTANCE, "
                "--policy FILE, or --frontier"
            )
        for declared in declared_options(Settings):
            declared.checked(getattr(self, declared.name))

    @property
    def aims(self) -> list[str]:
        """What decides the policy: the options of `AIMS` that are given. Without any, only the curve is asked for."""
        return [name for name in AIMS if getattr(self, name) is not None]
