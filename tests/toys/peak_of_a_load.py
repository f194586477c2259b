"""Load models in a process of its own and print how much memory each took.

Its argument is a JSON list of [folder, dtype or null, path of a policy or null]. It prints a JSON list: `peak`, the
most resident bytes beyond those before, mapped files included; `private`, the most that no file backs, sampled every
millisecond; `stored`, bytes of the model in the end.
"""

from __future__ import annotations

import gc
import json
import sys
import threading
import time
from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel

from bitpolicy import BitPolicyConfig


def status(entry: str) -> int:
    """An entry of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{entry}:"))


class Sampler(threading.Thread):
    """Keeps the most private bytes seen until it is stopped."""

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


def measure(folder: str, dtype: str | None, policy: str | None) -> dict[str, int]:
    options = {"quantization_config": BitPolicyConfig(policy=policy)} if policy else {}
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins here
    before, private, sampler = status("VmRSS"), status("RssAnon"), Sampler()
    sampler.start()
    model = DiTTransformer2DModel.from_pretrained(
        folder, torch_dtype=getattr(torch, dtype) if dtype else None, **options
    )
    found = {"peak": status("VmHWM") - before, "private": sampler.stop() - private}
    return found | {"stored": sum(tensor.nbytes for tensor in model.state_dict().values())}


if __name__ == "__main__":
    torch.set_num_threads(1)
    DiTTransformer2DModel(num_layers=1, attention_head_dim=8, num_attention_heads=2, norm_num_groups=1)
    print(json.dumps([measure(*job) for job in json.loads(sys.argv[1])]))
