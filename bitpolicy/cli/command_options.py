"""The options of each command, beyond those that several share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from bitpolicy.cli.options import RUN, CallOptions, PrintOptions, ProgressOptions
from bitpolicy.declared import Option, seed_option
from bitpolicy.policies.exporters.names import NAMES
from bitpolicy.settings import ComponentOptions, ConfigOptions, DeviceOptions, HubOptions, ModelOptions


@dataclass(frozen=True, kw_only=True)
class SearchOptions(ProgressOptions):
    """Where a search writes, and what it does with what is there."""

    group: ClassVar = RUN

    output_dir: Annotated[
        Path, Option("Receives policy.yaml, checkpoint/, compare.png, the sensitivity table and the study.")
    ] = Path("bitpolicy-out")
    overwrite: Annotated[bool, Option("Replace what the output folder holds.")] = False
    resume: Annotated[bool, Option("Continue an equal search that was stopped.")] = True
    dry_run: Annotated[
        bool, Option("Print what the search would do and the time, memory and disk it would take; write nothing.")
    ] = False


@dataclass(frozen=True, kw_only=True)
class ProbeRunOptions(ProgressOptions):
    """Where a probe writes, and what it finds out beyond the scores."""

    group: ClassVar = RUN

    output_dir: Annotated[
        Path, Option("Receives sensitivity.safetensors and .csv, split.safetensors and check.json.")
    ] = Path("bitpolicy-probe")
    split: Annotated[
        bool,
        Option(
            "Also separate bias, scale error and noise, and say at which step errors enter. It takes a sketch more for "
            "each of --shared and the stepwise probe, and every format is multiplied with every gradient at each step."
        ),
    ] = False
    check_it: Annotated[
        bool, Option("Compare with the truth: every layer alone, and random policies. Slow.", name="check")
    ] = False
    check_policies: Annotated[int, Option("Random policies of --check.", least=2)] = 100


@dataclass(frozen=True, kw_only=True)
class ExportOptions(PrintOptions, ConfigOptions, HubOptions, ModelOptions):
    """One export."""

    group: ClassVar = RUN

    policy: Annotated[Path, Option("The policy.yaml; calibration.safetensors is read from the same folder.")]
    output_dir: Annotated[Path, Option("The checkpoint folder to write.")]
    max_shard_size: Annotated[str, Option("Split a larger denoiser into files of this size.")] = "10GB"
    push_to_hub: Annotated[
        str | None,
        Option("Upload the folder to this model repository; takes a token (`hf auth login`).", metavar="OWNER/NAME"),
    ] = None
    target: Annotated[
        str | None, Option(f"Write the files of another program: {', '.join(NAMES)}. Default: a diffusers pipeline.")
    ] = None
    requantize: Annotated[bool, Option("Requantize layers whose format the target does not have.")] = False
    compute: Annotated[
        str | None,
        Option(
            "Record another activation quantization than the policy's: exact, int8 (inputs rounded to 8 bits: faster "
            "on CPUs with VNNI and on GPUs; `bitpolicy eval` measures the error), fp8 (inputs of fp8 and fp8-tensor "
            "layers rounded to float8), mxfp8 (those of mxfp8 and mxfp4 layers, in blocks) or nvfp4 (those of nvfp4 "
            "layers, to 4 bits in blocks)."
        ),
    ] = None
    overwrite: Annotated[bool, Option("Replace the folder once the new one is complete.")] = False


@dataclass(frozen=True, kw_only=True)
class QualityOptions:
    """What is measured."""

    group: ClassVar = "Quality"

    metrics: Annotated[
        str | None,
        Option(
            "Some of psnr, ssim, lpips, latent, fid, kid and clip, separated by commas, or all. Default: psnr, or all "
            "with --features or --real-images."
        ),
    ] = None
    features: Annotated[Path | None, Option("File or folder with the networks of lpips, fid, kid and clip.")] = None
    real_images: Annotated[Path | None, Option("Folder of pictures to measure fid and kid against as well.")] = None


@dataclass(frozen=True, kw_only=True)
class ReferenceOptions:
    """What the checkpoint is compared with."""

    group: ClassVar = "Model"

    model: Annotated[
        str | None,
        Option(
            "The unquantized pipeline: hub id, folder or .safetensors file. Default: the source of the checkpoint, as "
            "its policy.yaml records it."
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class EvalOptions(ProgressOptions, QualityOptions, DeviceOptions, HubOptions, ReferenceOptions, CallOptions):
    """One comparison."""

    group: ClassVar = RUN

    checkpoint: Annotated[Path, Option("The folder that search-policy or export wrote.", positional=True)]
    images: Annotated[int, Option("Number of images to compare.", least=1)] = 16
    picture: Annotated[Path | None, Option("Write the first images, in pairs, to this PNG.")] = None
    compute: Annotated[
        str | None,
        Option(
            "Activation quantization: exact (none), float (none; sums in another order), int8 (inputs rounded to 8 "
            "bits: faster, less accurate), fp8 (inputs of fp8 and fp8-tensor layers rounded to float8), mxfp8 (those "
            "of mxfp8 and mxfp4 layers, in blocks) or nvfp4 (those of nvfp4 layers, to 4 bits in blocks). Default: as "
            "the checkpoint records."
        ),
    ] = None
    seed: Annotated[int, seed_option("Seed of the images. The same seed draws the same images.")] = 0


@dataclass(frozen=True, kw_only=True)
class InspectOptions(PrintOptions, DeviceOptions, HubOptions, ComponentOptions, CallOptions):
    """What is looked at, and how."""

    group: ClassVar = RUN

    what: Annotated[
        str | None,
        Option(
            "Hub id, pipeline folder, checkpoint folder or policy.yaml. Default: the bundled pipeline.",
            positional=True,
        ),
    ] = None
    kernels: Annotated[
        bool, Option("Draw once with a checkpoint, and list the kernel that each packed layer gets, and why.")
    ] = False
    compute: Annotated[
        str | None,
        Option("With --kernels: exact, float, int8, fp8, mxfp8 or nvfp4, in place of what the checkpoint records."),
    ] = None
    low_memory: Annotated[bool, Option("With --kernels: kernels keep no layouts of their own.")] = False


@dataclass(frozen=True, kw_only=True)
class ReportOptions(PrintOptions):
    """One report."""

    group: ClassVar = RUN

    folder: Annotated[
        Path, Option("The --output-dir of `bitpolicy probe --split --check`, or of a search.", positional=True)
    ]
    budget: Annotated[
        str | None,
        Option("Size that the lists of layers to spare are made for: 3GB, 45%, 4.5bit. Default: the policy's, or 45%."),
    ] = None
    output: Annotated[Path | None, Option("The page. Default: report.html in the folder.")] = None
    pictures: Annotated[Path | None, Option("Also write the pictures as PNG files, and layers.csv, here.")] = None


@dataclass(frozen=True, kw_only=True)
class FormatsOptions:
    """Which formats are listed."""

    group: ClassVar = RUN

    target: Annotated[str | None, Option(f"Only the formats that a program can load: {', '.join(NAMES)}.")] = None
    debug: Annotated[bool, Option("Show the traceback of an error.")] = False
