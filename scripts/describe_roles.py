"""Write docs/roles.md: what role and what stage the layers of the published models get, with an example of each.

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

from bitpolicy.sensitivity.inventory import Layer, inventory

MEANINGS = {
    "input_stem": "reads the sample: the first convolution, or the embedding of its patches",
    "conv": "a convolution over places or frames",
    "shortcut": "takes a residual block's input past its convolutions",
    "resample": "the convolution of a step down or up in resolution",
    "attention_qkv": "queries, keys and values of the sample's attention to itself, over places or frames",
    "attention_out": "what that attention hands back",
    "cross_attention_qkv": "the same where attention reads texts or images; in joint attention, the context's own",
    "cross_attention_out": "what that attention hands back; in joint attention, to the context",
    "feed_forward": "the network beside attention in a block, gated and convolutional ones too",
    "projection": "a change of width on the way: in and out of a stack of blocks, after a skip connection",
    "timestep_embedding": "embeds the timestep and what joins it (guidance, sizes, frame), or lets it into a block",
    "modulation": "makes the shifts, scales and gates of normalizations out of the timestep",
    "context_embedding": "projects, pools or embeds texts, labels and images that guide",
    "output_head": "writes the result; in a ControlNet, what each block hands over",
    "other": "what no rule knows",
}
STAGES = ("ends", "encoder", "early", "middle", "late", "decoder")
INTRO = """\
# Roles and stages

Every `nn.Linear` and `nn.Conv1d/2d/3d` of a denoiser is a layer with a role (what it does) and a stage (where it sits).
The search scales layers of the same role and stage together, and `bitpolicy inspect` prints both. They are found
without running the model, by [roles.py](../sensitivity/roles.py) and [inventory.py](../sensitivity/inventory.py):

1. The modules around a layer are asked, the nearest first. A module with a query projection is attention, and cross
   attention if it says so or if its keys have another width than its queries. Beside attention in a block stand the
   feed-forward network (two layers or more) and the modulation (one). A layer in a normalization is modulation. The
   linear layer in a block of convolutions lets the timestep in. The embeddings of timesteps, texts and images are known
   by their class.
2. Outside the blocks the sample's shape finds the stem and the head: `in_channels` and `out_channels`, times the patch.
   What widens the trunk by a whole factor there is modulation.
3. Names decide what is left, and between layers of the same shape. A convolution that sees more than one place is
   `conv` wherever it stands. The rest is `other`; it is measured and searched like any layer.

A layer that does two things counts by the larger: `proj_out` in Flux's single blocks hands back attention and network,
and is `feed_forward`. A U-Net's stages are encoder, middle and decoder. A transformer's are thirds of its depth, one
stack of blocks after the other. `ends` is everything outside the blocks. Several denoisers of one pipeline are
described each on its own.

Text encoders, image encoders and autoencoders, studied with `--component`, have roles of the same names, found mostly
by name in [outside_roles.py](../sensitivity/outside_roles.py), and one stage each: `conditioning` and `autoencoder`.
Their embedding tables are not quantized, nor is a layer that shares its weight with one.
"""
MODELS = """\
## The published models

They are built without weights by [published_configs.py](../scripts/published_configs.py), which also says where their
parameters were counted; a test compares. Share is the role's part of the weights of all layers. The example is the
first layer of that role in the blocks, if there is one. Written by `python scripts/describe_roles.py` with diffusers
{version}.
"""


def main() -> None:
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1] / "docs" / "roles.md"
    target.write_text(page(), encoding="utf-8")


def page() -> str:
    described = {name: inventory(published(name)) for name in PUBLISHED}
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
    """A row for each model: its class, its size, and its layers by stage."""
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
