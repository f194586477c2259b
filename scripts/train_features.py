"""Train the small feature network of the bundled pipeline, which recognizes an emoji under shifts and tints.

It is trained as a classifier of the 359 emoji that the pipeline was trained on (cross entropy with label smoothing,
Szegedy et al. 2016, section 7). Each picture is rotated, scaled, shifted, tinted, and sometimes blurred or speckled.
Batch normalization (Ioffe and Szegedy 2015) speeds up training and is folded into the convolutions at the end, so the
shipped network consists of convolutions and ReLUs. The classifying layer is dropped; the features are its inputs.

    python scripts/train_features.py                                    # ten minutes on one CPU core
    python scripts/train_features.py --check                            # how well the features separate emoji
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from emoji_data import SIZE, Emoji, fetch, load
from safetensors.torch import save_file
from torch import nn

from bitpolicy.search.quality.feature_network import CONFIG, WEIGHTS, FeatureNetwork

ROOT = Path(__file__).resolve().parent.parent
CHANNELS = (24, 48, 96, 128, 128)
BATCH, RATE, WARM_UP = 64, 3e-3, 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, default=ROOT / "build" / "reference", help="folder of the downloaded training pictures"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "bitpolicy" / "models" / "emoji" / "features")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--check", action="store_true", help="only measure the network in --out")
    args = parser.parse_args()
    torch.manual_seed(0)
    emoji = load(fetch(args.work / "emoji"))
    pictures = torch.stack([(e.image + 1) * 127.5 for e in emoji])
    if not args.check:
        save(train(pictures, args.steps), args.out)
    print(json.dumps(check(FeatureNetwork.load(args.out), pictures, emoji)))


class Classifier(nn.Module):
    """The feature network with the parts that only training needs."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.network = FeatureNetwork("emoji", SIZE, CHANNELS)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in CHANNELS)
        self.head = nn.Linear(CHANNELS[-1], classes)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        y = pixels / 127.5 - 1
        for conv, norm in zip(self.network.convs, self.norms, strict=True):
            y = torch.relu(norm(conv(y)))
        return self.head(y.float().mean(dim=(2, 3)))

    @torch.no_grad()
    def folded(self) -> FeatureNetwork:
        """The network without norms: gamma (W y + b - mean) / sigma + beta is again a convolution."""
        for conv, norm in zip(self.network.convs, self.norms, strict=True):
            scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
            conv.weight.mul_(scale[:, None, None, None])
            conv.bias.copy_((conv.bias - norm.running_mean) * scale + norm.bias)
        return self.network.eval()


def train(pictures: torch.Tensor, steps: int) -> FeatureNetwork:
    """The network after `steps` steps; the learning rate falls as a half cosine."""
    model = Classifier(len(pictures)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.02)
    start, average = time.time(), math.log(len(pictures))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = RATE * min((step + 1) / WARM_UP, (1 + math.cos(math.pi * step / steps)) / 2)
        wanted = torch.randint(len(pictures), (BATCH,))
        seen = augmented(pictures[wanted]).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(model(seen).float(), wanted, label_smoothing=0.1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        average += 0.02 * (loss.item() - average)
        if step % 50 == 49:
            print(f"{step + 1}/{steps}: loss {average:.3f}, {time.time() - start:.0f} s", flush=True)
    return model.folded()


def augmented(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures, (B, 3, H, W) in [0, 255], each randomly moved, tinted and degraded."""
    moved = _moved(pictures / 255)
    tint = 1 + 0.15 * torch.randn(len(moved), 3, 1, 1)
    light = 0.1 * torch.randn(len(moved), 1, 1, 1)
    worn = torch.where(torch.rand(len(moved), 1, 1, 1) < 0.2, _blurred(moved), moved) * tint + light
    speckle = 0.05 * torch.rand(len(moved), 1, 1, 1) * (torch.rand(len(moved), 1, 1, 1) < 0.5)
    return (worn + speckle * torch.randn_like(worn)).clamp(0, 1) * 255


def _moved(pictures: torch.Tensor) -> torch.Tensor:
    """Rotate by up to 20 degrees, scale by 0.8 to 1.25, shift by up to 6 pixels and mirror half of the pictures."""
    count = len(pictures)
    angle = math.radians(20) * (2 * torch.rand(count) - 1)
    scale = 2 ** (0.32 * (2 * torch.rand(count) - 1))
    mirror = torch.where(torch.rand(count) < 0.5, 1.0, -1.0)
    shift = 12 / SIZE * (2 * torch.rand(count, 2) - 1)
    rows = [scale * angle.cos() * mirror, -scale * angle.sin(), shift[:, 0]]
    rows += [scale * angle.sin() * mirror, scale * angle.cos(), shift[:, 1]]
    grid = nn.functional.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), list(pictures.shape), align_corners=False)
    return 1 - nn.functional.grid_sample(1 - pictures, grid, align_corners=False)


def _blurred(pictures: torch.Tensor) -> torch.Tensor:
    return nn.functional.avg_pool2d(pictures, 3, stride=1, padding=1, count_include_pad=False)


def save(network: FeatureNetwork, folder: Path) -> None:
    """Write config.json and the weights in float16."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(network.config(), indent=2) + "\n", encoding="utf-8")
    weights = {name: tensor.half().contiguous() for name, tensor in network.state_dict().items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


@torch.no_grad()
def check(network: FeatureNetwork, pictures: torch.Tensor, emoji: list[Emoji]) -> dict[str, float | int]:
    """How often the features of a newly augmented emoji are nearest to its own, and to those of its subcategory."""
    torch.manual_seed(1)
    known = nn.functional.normalize(network(pictures))
    named = related = 0
    rounds = 5
    for _ in range(rounds):
        found = nn.functional.normalize(network(augmented(pictures)))
        for i, j in enumerate((found @ known.T).argmax(1).tolist()):
            named += i == j
            related += emoji[i].subcategory == emoji[j].subcategory
    count = rounds * len(pictures)
    return {"pictures": count, "nearest_is_itself": named / count, "nearest_is_of_its_kind": related / count}


if __name__ == "__main__":
    main()
