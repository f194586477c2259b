"""Memory while a model is loaded, measured in a separate process on about 200 MB."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import accelerate
import pytest
import torch
from diffusers import DiTTransformer2DModel

from bitpolicy.kernels.formats.named import format_named
from bitpolicy.kernels.layers import quantizable_layers
from bitpolicy.policies.apply import to_storage
from bitpolicy.policies.checkpoints.checkpoint import checkpoint_bytes
from bitpolicy.policies.identity import weights_hash
from bitpolicy.policies.loading.packed_config import BitPolicyConfig
from bitpolicy.policies.loading.packed_model import expected_tensors, make_shells
from bitpolicy.policies.policy import Choice, Policy
from bitpolicy.policies.policy_records import ModelReference
from bitpolicy.policies.storage.safetensors_writer import SafetensorsWriter

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures through Linux's /proc")
SCRIPT = Path(__file__).parents[1] / "toys" / "peak_of_a_load.py"
MB = 10**6


def transformer(layers: int, width: int) -> DiTTransformer2DModel:
    return DiTTransformer2DModel(
        num_layers=layers, attention_head_dim=64, num_attention_heads=width // 64, norm_num_groups=1, sample_size=8
    )


def measured(*jobs: tuple[Path, str | None, Path | None]) -> list[dict[str, int]]:
    given = json.dumps([[part and str(part) for part in job] for job in jobs])
    done = subprocess.run([sys.executable, str(SCRIPT), given], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def make_packed(folder: Path) -> int:
    """Write a packed transformer of random bytes, alternately in INT8 and INT4; return its largest layer's size."""
    with accelerate.init_empty_weights():
        model = transformer(10, 1024)
    names = [name for name, _ in quantizable_layers(model)]
    choices = {name: Choice(format_named(("int8", "int4")[i % 4 == 0])) for i, name in enumerate(names)}
    largest = max(layer.weight.numel() for _, layer in quantizable_layers(model))
    model.save_config(folder)
    model.half()
    make_shells(model, BitPolicyConfig.of(choices, torch.float16))
    specs = expected_tensors(model)
    with SafetensorsWriter(folder / "diffusion_pytorch_model.safetensors", specs) as file:
        for name, spec in specs.items():
            file.write(name, torch.randint(0, 100, spec.shape, dtype=torch.uint8).to(spec.dtype))
    checksums = "".join(file.checksums[name] for name in sorted(specs))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = BitPolicyConfig.of(choices, torch.float16, checksums).to_dict()
    (folder / "config.json").write_text(json.dumps(config))
    return largest


def make_full(folder: Path) -> None:
    """Write a float32 transformer and a policy for it, policy.yaml, that gives every layer INT4."""
    model = transformer(9, 512)
    model.save_pretrained(folder)
    to_storage(model, torch.float16)
    choices = {name: Choice(format_named("int4")) for name, _ in quantizable_layers(model)}
    about = ModelReference(
        id="toy",
        component="transformer",
        class_name=type(model).__name__,
        sha256=weights_hash(model, torch.float16),
    )
    Policy.of(choices, model=about).save(folder / "policy.yaml")


def test_loading_needs_the_file_and_a_layer_and_packing_needs_no_full_copy(tmp_path: Path) -> None:
    packed, full = tmp_path / "packed", tmp_path / "full"
    packed.mkdir()
    largest = make_packed(packed)
    make_full(full)
    dtypes = (None, "float16", "float32")
    *loads, packing = measured(*((packed, dtype, None) for dtype in dtypes), (full, None, full / "policy.yaml"))

    stored = checkpoint_bytes(packed)
    assert 150 * MB < stored < 250 * MB
    for dtype, found in zip(dtypes, loads, strict=True):
        print(f"{dtype}: {stored:,} stored, {found}")
        assert 0.9 * stored < found["peak"] <= 1.15 * stored + largest, dtype

    stored = checkpoint_bytes(full)
    print(f"packed while read: {stored:,} stored, {packing}")
    assert 150 * MB < stored < 250 * MB
    assert packing["private"] < 0.7 * stored, "a full-precision copy would be as large as the file"
