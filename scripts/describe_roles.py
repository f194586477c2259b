"""Write docs/roles.md: the role and stage of every layer of the published models, with an example of each role.

python scripts/describe_roles.py [docs/roles.md]
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import diffusers
from published_configs import PUBLISHED, parameter_count, published

from bitpolicy.policies.target import Target
from bitpolicy.sensitivity.inventory import Layer, inventory

MEANINGS = {
    "input_stem": "reads the sample: the first convolution, or the embedding of its patches",
    "conv": "a convolution over positions or frames",
    "shortcut": "carries a residual block's input past its convolutions",
    "resample": "the convolution that lowers or raises the resolution",
    "attention_qkv": "queries, keys and values of the sample's self-attention, over positions or frames",
    "attention_out": "the output projection of that attention",
    "cross_attention_qkv": "the same where attention reads texts or images; in joint attention, the context's own",
    "cross_attention_out": "the output projection of that attention; in joint attention, the context's",
    "feed_forward": "the network next to attention in a block, including gated and convolutional ones",
    "projection": "changes the width: in and out of a stack of blocks, after a skip connection",
    "timestep_embedding": "embeds the timestep and what joins it (guidance, sizes, frame), or passes it into a block",
    "modulation": "computes the shifts, scales and gates of normalizations from the timestep",
    "context_embedding": "projects, pools or embeds the texts, labels and images that condition the model",
    "output_head": "writes the result; in a ControlNet, the output of each block",
    "other": "matches no rule",
}
STAGES = ("ends", "encoder", "early", "middle", "late", "decoder")
INTRO = """\
# Roles and stages

Every `nn.Linear` and `nn.Conv1d/2d/3d` of a denoiser is a layer with a role (what it does) and a stage (where it is).
The search scales layers of the same role and stage together, and `bitpolicy inspect` prints both.
[roles.py](../sensitivity/roles.py) and [inventory.py](../sensitivity/inventory.py) find them without running the model:

1. The modules around a layer come first, the nearest before the others. A module with a query projection is attention.
   It is cross attention if a flag, its class or its name says so, or if its keys and queries differ in width. Next to
   attention in a block are the feed-forward network (two layers or more) and the modulation (one layer). A layer in a
   normalization is modulation. The linear layer in a block of convolutions is the timestep's input to that block. The
   embeddings of timesteps, texts and images are recognized by their class.
2. Outside the blocks, the sample's shape identifies the stem and the head: `in_channels` and `out_channels`, times the
   patch size. A layer that widens the trunk by a whole factor there is modulation.
3. Names decide the remaining cases, and between layers of the same shape. A convolution whose kernel is larger than one
   position is `conv` wherever it is. The rest is `other`; it is measured and searched like any layer.

If a layer does two things, the larger part decides: `proj_out` in Flux's single blocks is the output of both attention
and the feed-forward network, and is `feed_forward`. A U-Net's stages are encoder, middle and decoder. A transformer's
stages are thirds of its depth, with its stacks of blocks taken one after the other. `ends` is everything outside the
blocks. If a pipeline has several denoisers, each is described separately.

Text encoders, image encoders and autoencoders are included with `--component`. Their roles have the same names and are
found mostly by name, in [outside_roles.py](../sensitivity/outside_roles.py). They have one stage each: `conditioning`
and `autoencoder`. Their embedding tables are not quantized, nor is a layer that shares its weight with one.
"""
MODELS = """\
## The published models

[published_configs.py](../scripts/published_configs.py) builds them without weights. It also gives the source of each
parameter count, which a test compares. *share* is the role's part of the weights of all layers. The example is the
first layer of that role in the blocks, if there is one. `python scripts/describe_roles.py` wrote this page with
diffusers {version}.
"""


def main() -> None:
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1] / "docs" / "roles.md"
    target.write_text(page(), encoding="utf-8")


def page() -> str:
    described = {name: inventory(Target({"unet": published(name)})) for name in PUBLISHED}
    meanings = [(f"`{role}`", meaning) for role, meaning in MEANINGS.items()]
    parts = [
        INTRO,
        table(("role", "what it does"), meanings),
        MODELS.format(version=diffusers.__version__),
        overview(described),
        *(section(name, layers) for name, layers in described.items()),
    ]
    return "\n".join(parts)


def overview(described: dict[str, list[Layer]]) -> str:
    """A row for each model: its class, its size and its layers by stage."""
    rows = []
    for name, layers in described.items():
        parameters = parameter_count(published(name)) / 1e9
        rows.append((name, f"`{PUBLISHED[name].kind}`", f"{parameters:.3g}B", len(layers), by_stage(layers)))
    return table(("model", "class", "parameters", "layers", "by stage"), rows)


def section(name: str, layers: list[Layer]) -> str:
    """A row for each role of one model."""
    weights = sum(map(size, layers))
    rows = []
    for role in MEANINGS:
        own = [layer for layer in layers if layer.role == role]
        if own:
            example = next((layer for layer in own if layer.stage != "ends"), own[0]).name
            share = sum(map(size, own)) / weights
            percent = f"{share:.1%}" if share >= 0.001 else "<0.1%"
            rows.append((f"`{role}`", len(own), percent, by_stage(own), f"`{example}`"))
    heading = f"### {PUBLISHED[name].kind}: {name}\n"
    return "\n".join([heading, table(("role", "layers", "share", "by stage", "example"), rows)])


def by_stage(layers: list[Layer]) -> str:
    counts = Counter(layer.stage for layer in layers)
    return ", ".join(f"{counts[stage]} {stage}" for stage in STAGES if counts[stage])


def size(layer: Layer) -> int:
    return math.prod(layer.shape)


def table(header: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


if __name__ == "__main__":
    main()
