"""Every toy by name, and the schedulers to put into them.

`TOYS["FluxPipeline"]` draws with `toy.new()("a red heart", **toy.call, **toy.extra, generator=generator)`. `EVERY` adds
those of `families/`.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from toy_recipe import Toy
from toy_schedulers import FLOW_SCHEDULERS, SCHEDULERS
from toy_transformer_pipelines import TRANSFORMER_TOYS
from toy_unet_pipelines import UNET_TOYS
from toy_video_pipelines import VIDEO_TOYS

__all__ = ["EVERY", "FLOW_SCHEDULERS", "SCHEDULERS", "TOYS", "Toy"]

_FAMILIES = sorted(path.stem for path in (Path(__file__).parent / "families").glob("*.py"))
TOYS: dict[str, Toy] = {toy.name: toy for toy in [*UNET_TOYS, *TRANSFORMER_TOYS, *VIDEO_TOYS]}
EVERY: dict[str, Toy] = {
    **TOYS,
    **{toy.name: toy for family in _FAMILIES for toy in importlib.import_module(f"families.{family}").TOYS},
}
