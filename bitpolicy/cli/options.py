"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bitpolicy.kernels.formats import DEFAULT

MODEL = "Model"
CALL = "Pipeline call"
RUN = "Run"

DEFAULT_FORMATS = ",".join(DEFAULT)

Model = Annotated[
    str | None,
    typer.Option(help="Hub id or diffusers folder. Default: the bundled emoji pipeline.", rich_help_panel=MODEL),
]
Component = Annotated[
    str | None, typer.Option(help="The denoiser, if it is not 'unet' or 'transformer'.", rich_help_panel=MODEL)
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.", rich_help_panel=MODEL)]
Variant = Annotated[str | None, typer.Option(help="Weight files to load, e.g. fp16.", rich_help_panel=MODEL)]
Dtype = Annotated[
    str,
    typer.Option(
        help="Compute dtype: auto (float32 on the CPU, else as stored), float16, bfloat16, float32.",
        rich_help_panel=MODEL,
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.", rich_help_panel=MODEL)]
Formats = Annotated[str, typer.Option(help="Candidates: int4, int4-g32, int4-g128, int8, fp16.", rich_help_panel=RUN)]
Prompts = Annotated[
    Path | None, typer.Option(help="Text file, one prompt a line. Default: a built-in list.", rich_help_panel=CALL)
]
Steps = Annotated[
    int | None, typer.Option("--num-inference-steps", min=1, help="Sampling steps. Default: 20.", rich_help_panel=CALL)
]
Guidance = Annotated[
    float | None,
    typer.Option(
        "--guidance-scale", help="Classifier-free guidance. Default: the pipeline's own.", rich_help_panel=CALL
    ),
]
Seed = Annotated[
    int, typer.Option(min=0, help="Of samples, split and sampler: same seed, same policy.", rich_help_panel=RUN)
]
Probe = Annotated[
    str,
    typer.Option(
        help="How layers are scored: adjoint (backward through the sampler), ablation (one by one, slow), "
        "weight (no image at all).",
        rich_help_panel=RUN,
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.", rich_help_panel=RUN)
]
Debug = Annotated[  # `bitpolicy.cli.main` looks for it before any command runs
    bool,
    typer.Option("--debug", help="Show the traceback of an error and other libraries' messages.", rich_help_panel=RUN),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.", rich_help_panel=RUN)]


def pipeline_call(steps: int | None, guidance: float | None) -> dict[str, Any]:
    """Arguments of the pipeline call that were given."""
    call = {"num_inference_steps": steps, "guidance_scale": guidance}
    return {name: value for name, value in call.items() if value is not None}
