"""Every toy by name, and the schedulers to put into them.

`TOYS["FluxPipeline"]` draws with `toy.new()("a red heart", **toy.call, **toy.extra, generator=generator)`.
"""

from __future__ import annotations

from toy_recipe import Toy
from toy_schedulers import FLOW_SCHEDULERS, SCHEDULERS
from toy_transformer_pipelines import TRANSFORMER_TOYS
from toy_unet_pipelines import UNET_TOYS
from toy_video_pipelines import VIDEO_TOYS

__all__ = ["FLOW_SCHEDULERS", "SCHEDULERS", "TOYS", "Toy"]

TOYS: dict[str, Toy] = {toy.name: toy for toy in [*UNET_TOYS, *TRANSFORMER_TOYS, *VIDEO_TOYS]}
