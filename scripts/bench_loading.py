"""Load time and memory of a packed pipeline, compared with float16 and with SDNQ under the same policy.

There are two pipelines: the bundled one, and one with a synthetic U-Net (random weights, written layer by layer). The
layers alternate between INT8 and INT4, rounded to nearest. SDNQ's checkpoint comes from `bitpolicy export --target
sdnq` with the same policy. Each load is `DiffusionPipeline.from_pretrained(folder, dtype=float16)` in its own process,
after all imports. The checkpoints take turns, and the files are in the page cache. The table shows medians:

    load        seconds until the call returns
    ready       seconds until every tensor has been read once (mapped files are read when first touched)
    processor   seconds of processor time until then
    peak        peak resident bytes beyond those before the load, mapped files included
    private     peak bytes that no file backs, sampled every millisecond
    stored      bytes of all tensors of all models after the load

Without sdnq its rows are left out. Prints one table and writes JSON. Linux only.

    python scripts/bench_loading.py
    python scripts/bench_loading.py --gigabytes 0.2 --rounds 1 --folder /tmp/bench --json loading.json
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from itertools import cycle
from pathlib import Path

import diffusers
import torch
from bench_export import FORMATS, make, status
from diffusers import DiffusionPipeline
from torch import nn

from bitpolicy.api import export, export_for
from bitpolicy.kernels.formats.named import format_named
from bitpolicy.kernels.layers import quantizable_layers
from bitpolicy.pipelines.loading import BUNDLED_FOLDER
from bitpolicy.policies.identity import weights_hash
from bitpolicy.policies.policy import Choice, Policy
from bitpolicy.policies.policy_records import ModelReference

COLUMNS = {  # name -> unit in the table, and that unit in seconds or bytes
    "load": ("s", 1.0),
    "ready": ("s", 1.0),
    "processor": ("s", 1.0),
    "peak": ("MB", 1e6),
    "private": ("MB", 1e6),
    "stored": ("MB", 1e6),
}
has_sdnq = importlib.util.find_spec("sdnq") is not None


# The folders


def bundled(folder: Path) -> dict[str, Path]:
    pipe = DiffusionPipeline.from_pretrained(BUNDLED_FOLDER, dtype=torch.float16)
    formats = zip(quantizable_layers(pipe.unet), cycle(FORMATS), strict=False)
    reference = ModelReference(
        id="bundled",
        component="unet",
        class_name=type(pipe.unet).__name__,
        sha256=weights_hash(pipe.unet, torch.float16),
    )
    policy = Policy.of({name: Choice(format_named(format)) for (name, _), format in formats}, model=reference)
    return exported(BUNDLED_FOLDER, policy, folder)


def synthetic(folder: Path, gigabytes: float) -> dict[str, Path]:
    folder.mkdir()
    make(folder, gigabytes)
    return exported(folder / "model", Policy.load(folder / "policy.yaml"), folder / "packed")


def exported(model: Path, policy: Policy, folder: Path) -> dict[str, Path]:
    """The pipeline's folder in each kind of storage, by its name."""
    found = {"float16": model, "bitpolicy": folder / "bitpolicy"}
    export(model, policy, found["bitpolicy"])
    if has_sdnq:
        found["sdnq"] = folder / "sdnq"
        shutil.copytree(model, found["sdnq"], ignore=shutil.ignore_patterns("unet"))
        pipe = DiffusionPipeline.from_pretrained(model, dtype=torch.float16)
        export_for(pipe, policy, folder / "only", "sdnq")
        (folder / "only" / "unet").rename(found["sdnq"] / "unet")
    return found


# One load


class PrivateBytes(threading.Thread):
    """Samples the bytes that no file backs and keeps the maximum."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self._go_on = status("RssAnon"), True

    def run(self) -> None:
        while self._go_on:
            self.most = max(self.most, status("RssAnon"))
            time.sleep(0.001)

    def stop(self) -> int:
        self._go_on = False
        self.join()
        return self.most


def measure(way: str, folder: Path) -> dict[str, float]:
    """Load in this process and measure it."""
    DiffusionPipeline.from_pretrained(BUNDLED_FOLDER, dtype=torch.float16)  # imports every class
    if way == "sdnq":
        importlib.import_module("sdnq")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, private = status("VmRSS"), PrivateBytes()
    held, start, worked = private.most, time.perf_counter(), time.process_time()
    private.start()
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float16)
    load = time.perf_counter() - start
    tensors = [
        t for part in pipe.components.values() if isinstance(part, nn.Module) for t in part.state_dict().values()
    ]
    for tensor in tensors:
        tensor.view(-1).view(torch.uint8).max()
    return {
        "load": load,
        "ready": time.perf_counter() - start,
        "processor": time.process_time() - worked,
        "peak": status("VmHWM") - before,
        "private": private.stop() - held,
        "stored": sum(tensor.nbytes for tensor in tensors),
    }


# All of them


def by_turns(folders: Mapping[str, Path], rounds: int) -> dict[str, dict[str, float]]:
    """Medians for each kind of storage."""
    found: dict[str, list[dict[str, float]]] = {way: [] for way in folders}
    for _ in range(rounds):
        for way, folder in folders.items():
            line = [sys.executable, __file__, "--measure", way, str(folder)]
            quiet = {**os.environ, "TQDM_DISABLE": "1"}
            done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True, env=quiet)
            found[way].append(json.loads(done.stdout.splitlines()[-1]))
    return {way: {name: statistics.median(one[name] for one in all) for name in COLUMNS} for way, all in found.items()}


def table(models: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    header = ["pipeline", "as", *(f"{name}, {unit}" for name, (unit, _) in COLUMNS.items())]
    lines = [header, ["---"] * len(header)]
    for model, ways in models.items():
        for way, row in ways.items():
            numbers = [f"{row[name] / size:.{0 if unit == 'MB' else 2}f}" for name, (unit, size) in COLUMNS.items()]
            lines.append([model, way, *numbers])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--gigabytes", type=float, default=1.0, help="size of the synthetic denoiser in float16 (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="loads of each checkpoint; the median is reported")
    parser.add_argument(
        "--folder", type=Path, help="working folder (needs about twice the size); default: a temporary one"
    )
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        return print(json.dumps(measure(given.measure[0], Path(given.measure[1]))))
    if not has_sdnq:
        print("sdnq is not installed: its rows are left out (pip install sdnq)")
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        made = {
            "bundled": bundled(Path(name) / "bundled"),
            f"synthetic, {given.gigabytes:g} GB": synthetic(Path(name) / "synthetic", given.gigabytes),
        }
        result = {model: by_turns(folders, given.rounds) for model, folders in made.items()}
    print(table(result), end="")
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "load_average": os.getloadavg()[0]}
    print(", ".join(f"{name} {value}" for name, value in versions.items()))
    if given.json:
        given.json.write_text(json.dumps({**versions, "rounds": given.rounds, "pipelines": result}, indent=2) + "\n")


if __name__ == "__main__":
    main()
