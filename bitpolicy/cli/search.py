"""`search-policy`, which is also `bitpolicy search`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from bitpolicy.cli.dry_run import described, print_plan
from bitpolicy.cli.options import (
    DEFAULT_FORMATS,
    RUN,
    Call,
    Component,
    Compute,
    Config,
    Debug,
    Device,
    Dtype,
    Formats,
    Guidance,
    Json,
    Model,
    Offload,
    Probe,
    Prompts,
    Quantizer,
    Quiet,
    Remeasure,
    Revision,
    Samples,
    Seed,
    Steps,
    Variant,
    Version,
)
from bitpolicy.cli.report import print_json, print_result
from bitpolicy.cli.settings import settings_of
from bitpolicy.kernels.quantizers.named import DEFAULT as DEFAULT_QUANTIZER
from bitpolicy.policies.exporters.targets import NAMES
from bitpolicy.search.study.samplers import require_sampler
from bitpolicy.sensitivity.cost.progress import Stages
from bitpolicy.settings import OutputFolder, Settings
from bitpolicy.workflow.forecast import Forecast
from bitpolicy.workflow.plan import Plan, make_plan
from bitpolicy.workflow.preflight import require_disk, require_quality, require_storage
from bitpolicy.workflow.search_run import run_search

AIM = "What to ask for"
STUDY = "Study"

Budget = Annotated[
    str | None,
    typer.Option(
        help="Bytes for the denoiser, or for all of --component: 3GB, 3GiB, 700MB, 45% of FP16, 4.5bit a parameter.",
        rich_help_panel=AIM,
    ),
]
TargetPsnr = Annotated[
    float | None,
    typer.Option(help="Instead of a budget: as few bytes as this PSNR against FP16 takes, in dB.", rich_help_panel=AIM),
]
TargetLpips = Annotated[
    float | None,
    typer.Option(
        help="Instead of a budget: as few bytes as this LPIPS distance takes (for the bundled pipeline that of its own "
        "small network, lpips-emoji).",
        rich_help_panel=AIM,
    ),
]
Frontier = Annotated[
    int,
    typer.Option(
        min=0,
        max=200,
        metavar="N",
        help="Write the whole curve, too: N policies from the smallest to FP16, a table and a plot, in frontier/.",
        rich_help_panel=AIM,
    ),
]
Scope = Annotated[
    str,
    typer.Option(
        help="What the budget covers: weights (of the denoiser or of --component), pipeline (all models), peak (all "
        "that one pipeline call holds at once, activations included).",
        rich_help_panel=AIM,
    ),
]
Height = Annotated[
    int | None,
    typer.Option(min=1, help="Of the image, in pixels, with --scope peak.", rich_help_panel=AIM),
]
Width = Annotated[int | None, typer.Option(min=1, help="The same.", rich_help_panel=AIM)]
BatchSize = Annotated[int, typer.Option(min=1, help="Images a call, with --scope peak.", rich_help_panel=AIM)]
Keep = Annotated[
    list[str] | None,
    typer.Option(
        metavar="GLOB=FORMAT",
        help="Layers that keep a format, e.g. `--keep '*time_embedding*=fp16'`. May be repeated; later ones win.",
        rich_help_panel=AIM,
    ),
]
ShareQkv = Annotated[
    bool,
    typer.Option("--share-qkv", help="Query, key and value of an attention share a format.", rich_help_panel=AIM),
]
Target = Annotated[
    str | None,
    typer.Option(
        help=f"Choose, layer by layer, only what another program can hold: {', '.join(NAMES)}.", rich_help_panel=AIM
    ),
]
OutputDir = Annotated[
    Path,
    typer.Option(help="Gets policy.yaml, checkpoint/, compare.png, sensitivity table, study.", rich_help_panel=RUN),
]
Trials = Annotated[
    int,
    typer.Option(min=0, help="Optuna trials on real generations; 0 keeps the exact solution.", rich_help_panel=STUDY),
]
Sampler = Annotated[
    str, typer.Option(help="tpe, gp, cmaes (pip install 'bitpolicy[cmaes]'), nsga2 or random.", rich_help_panel=STUDY)
]
Space = Annotated[
    str,
    typer.Option(help="What a trial bends: group (of a role and stage) or layer.", rich_help_panel=STUDY),
]
Timeout = Annotated[
    float | None, typer.Option(min=0, help="Seconds after which no trial is begun.", rich_help_panel=STUDY)
]
Features = Annotated[
    Path | None, typer.Option(help="File or folder of the networks that measure quality.", rich_help_panel=RUN)
]
RemeasureClose = Annotated[
    int, typer.Option(min=0, help="The same for scores that close choices hang on.", rich_help_panel=RUN)
]
Storage = Annotated[
    str | None,
    typer.Option(help="Optuna storage URL, for several workers. Default: a journal file.", rich_help_panel=STUDY),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace what the output folder holds.", rich_help_panel=RUN)
]
Resume = Annotated[
    bool, typer.Option("--resume/--no-resume", help="Go on where an equal run was stopped.", rich_help_panel=RUN)
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Say what the search would do, and the time, memory and disk it would take; write nothing.",
        rich_help_panel=RUN,
    ),
]


def search(
    budget: Budget = None,
    target_psnr: TargetPsnr = None,
    target_lpips: TargetLpips = None,
    frontier: Frontier = 0,
    scope: Scope = "weights",
    height: Height = None,
    width: Width = None,
    batch_size: BatchSize = 1,
    keep: Keep = None,
    share_qkv: ShareQkv = False,
    target: Target = None,
    model: Model = None,
    component: Component = None,
    output_dir: OutputDir = Path("bitpolicy-out"),
    formats: Formats = DEFAULT_FORMATS,
    prompts: Prompts = None,
    num_inference_steps: Steps = None,
    guidance_scale: Guidance = None,
    call: Call = None,
    samples: Samples = 16,
    seed: Seed = 0,
    trials: Trials = 24,
    sampler: Sampler = "tpe",
    space: Space = "group",
    timeout: Timeout = None,
    probe: Probe = "adjoint",
    quantizer: Quantizer = DEFAULT_QUANTIZER,
    compute: Compute = "exact",
    remeasure: Remeasure = 8,
    remeasure_close: RemeasureClose = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    offload: Offload = False,
    revision: Revision = None,
    variant: Variant = None,
    config: Config = None,
    storage: Storage = None,
    features: Features = None,
    overwrite: Overwrite = False,
    resume: Resume = True,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
    version: Version = False,
) -> None:
    """Shrink a diffusion model to the size you ask for, with the least harm to its images.

    Scores every layer by what quantizing it does to the finished image, gives each INT4, INT8 or FP16 so that the whole
    fits --budget, checks the choice on real generations, and writes policy.yaml and a checkpoint that diffusers loads.

    Examples:

    search-policy --budget 5MB --output-dir out

    search-policy --target-psnr 45 --formats all --quantizer auto --output-dir small

    search-policy --component unet,text_encoder,vae --budget 40% --output-dir whole

    search-policy --frontier 20 --trials 0 --output-dir curve
    """
    settings = settings_of(locals())
    require_sampler(sampler)
    stages = Stages(quiet or as_json)
    held = OutputFolder.peek(output_dir, settings, overwrite=overwrite, resume=resume)
    if dry_run:
        with stages.whole_run():
            plan, forecast = _checked(settings, output_dir, stages, dry_run)
            foreseen = {"memory": asdict(forecast.memory()), "disk": asdict(forecast.disk())}
        (print_json if as_json else print_plan)({**described(plan), "seconds": forecast.of_search(), **foreseen})
        return
    if held is None:
        with stages.whole_run():
            plan, forecast = _checked(settings, output_dir, stages, dry_run)
            stages.expect(forecast.of_search())
            with OutputFolder.claimed(output_dir, settings, overwrite=overwrite, resume=resume) as output:
                _say_notices(settings, plan)
                run_search(settings, plan, output, stages)
        held = output.finished()
    elif not quiet:
        print(
            f"{output_dir} holds this search, finished; here is its result (--no-resume makes it anew)", file=sys.stderr
        )
    assert held is not None
    (print_json if as_json else print_result)(held)


def _checked(settings: Settings, output_dir: Path, stages: Stages, dry_run: bool) -> tuple[Plan, Forecast]:
    """The plan and what it will take; all that would stop the run later stops it here, with nothing written."""
    with stages.timed("load"):
        plan = make_plan(settings)
        require_quality(settings, plan)
        require_storage(settings.storage, dry_run)
        forecast = Forecast(settings, plan)
        require_disk(output_dir, forecast.disk())
    return plan, forecast


def _say_notices(settings: Settings, plan: Plan) -> None:
    """What the user should know before the work begins, on stderr."""
    if plan.fits_unquantized and settings.budget is not None:
        print(
            f"{plan.budget.scope.at_fp16}, which fits {plan.budget}: every layer stays FP16",
            file=sys.stderr,
        )
    if not plan.split.by_prompt:
        print(
            "fewer than 8 prompts: calibration, search and held-out images share prompts and have seeds of their own",
            file=sys.stderr,
        )
