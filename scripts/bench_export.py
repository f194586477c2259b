"""How fast `bitpolicy export` is and how much memory it takes, on a synthetic U-Net of a few GB in INT8 and INT4.

The model is written to disk layer by layer (random weights, sharded), so this process never holds all of it. Its text
encoder and VAE are those of the bundled pipeline. The export runs in its own process. The script compares that
process's peak of resident memory, mapped files included, with its memory after all imports. Prints one table and writes
JSON. Linux only.

    python scripts/bench_export.py --folder /tmp/bench
    python scripts/bench_export.py --gigabytes 1 --json export.json
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from bitpolicy.api import export
from bitpolicy.kernels.formats.format import TensorSpec
from bitpolicy.kernels.formats.named import format_named
from bitpolicy.kernels.layers import quantizable_layers
from bitpolicy.pipelines.loading import BUNDLED_FOLDER, open_parts
from bitpolicy.policies.checkpoints.checkpoint import export_diffusers_model
from bitpolicy.policies.loading.diffusers_files import skeleton
from bitpolicy.policies.policy import Choice, Policy
from bitpolicy.policies.policy_records import ModelReference
from bitpolicy.policies.quantization import Quantization
from bitpolicy.policies.storage.source import source_hash

SHARD = 10**9  # bytes
FORMATS = ("int8", "int4")  # the layers alternate between them


class RandomSource:
    """Normally distributed weights for a model on `meta`; each is drawn when it is read."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._specs = {name: TensorSpec(torch.float16, tuple(t.shape)) for name, t in model.state_dict().items()}
        self._generator = torch.Generator().manual_seed(0)

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        return self._specs

    def read(self, name: str) -> torch.Tensor:
        return torch.randn(self._specs[name].shape, generator=self._generator).mul_(0.02).half()


def unet_of(gigabytes: float) -> Any:
    """A U-Net like Stable Diffusion's on `meta`, with the channels whose float16 size is closest to `gigabytes`."""
    config = json.loads((BUNDLED_FOLDER / "unet" / "config.json").read_text())
    config |= {
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "attention_head_dim": 8,
        "sample_size": 64,
    }
    widths = [32 * i for i in range(2, 40)]
    models = (
        skeleton("UNet2DConditionModel", {**config, "block_out_channels": [w, 2 * w, 4 * w, 4 * w]}) for w in widths
    )
    return min(models, key=lambda model: abs(2 * model.num_parameters() - gigabytes * 1e9))


def make(folder: Path, gigabytes: float) -> tuple[int, float]:
    """Write the pipeline and a policy for it. Returns the denoiser's bytes and the seconds that hashing it took."""
    shutil.copytree(BUNDLED_FOLDER, folder / "model", ignore=shutil.ignore_patterns("unet"))
    unet = unet_of(gigabytes)
    nbytes = export_diffusers_model(
        unet, {}, folder / "model" / "unet", SHARD, RandomSource(unet), quantization=Quantization()
    )
    unet.save_config(folder / "model" / "unet")  # without the entry that marks a packed checkpoint
    formats = zip(quantizable_layers(unet), cycle(FORMATS), strict=False)
    start = time.perf_counter()
    sha256 = source_hash(open_parts(str(folder / "model"), ["unet"], torch.float16).sources["unet"], torch.float16)
    seconds = time.perf_counter() - start
    reference = ModelReference(
        id="synthetic", component="unet", class_name=UNet2DConditionModel.__name__, sha256=sha256
    )
    policy = Policy.of({name: Choice(format_named(f)) for (name, _), f in formats}, model=reference)
    policy.save(folder / "policy.yaml")
    return nbytes, seconds


def status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure(folder: Path) -> None:
    """Export in this process and print JSON."""
    torch.empty(2**20).sum()  # starts torch's threads
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, start, worked = status("VmRSS"), time.perf_counter(), time.process_time()
    written = export(folder / "model", folder / "policy.yaml", folder / "checkpoint")
    found = {
        "seconds": time.perf_counter() - start,
        "processor_seconds": time.process_time() - worked,
        "peak_growth_bytes": status("VmHWM") - before,
        "written_bytes": written,
    }
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--gigabytes", type=float, default=4.0, help="size of the denoiser in float16 (default: %(default)s)"
    )
    parser.add_argument(
        "--folder", type=Path, help="working folder (needs about 1.5 times the size); default: a temporary one"
    )
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        return measure(given.measure)
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        nbytes, hashing = make(Path(name), given.gigabytes)
        line = [sys.executable, __file__, "--measure", name]
        found = json.loads(subprocess.run(line, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    result = {
        "input_bytes": nbytes,
        **found,
        "mb_per_second": nbytes / 1e6 / found["seconds"],
        "hash_seconds": hashing,
        "formats": FORMATS,
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "torch": torch.__version__,
    }
    for name, value in result.items():
        print(f"{name:>18}  {value}")
    if given.json:
        given.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
