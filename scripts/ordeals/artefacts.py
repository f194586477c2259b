"""Undamaged copies of everything that bitpolicy writes. The ordeals damage them, interrupt their writing and compare.

The pipeline is a Stable Diffusion of 65 layers with random weights, so a search takes seconds.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ordeals.commands import Finished, command

PROMPTS = "cat dog pizza heart star moon tree ball".split()
CALL = ("--num-inference-steps", "2", "--guidance-scale", "1")
_CXX = """#!{python}
# Compiles each source once, and copies the stored result when the same source comes again.
import shutil, subprocess, sys
from pathlib import Path
line, kept = sys.argv[1:], Path({kept!r})
if "-o" not in line:
    sys.exit(subprocess.run([{compiler!r}, *line]).returncode)
sources = sorted(Path(part).name for part in line if part.endswith((".cpp", ".o")) and part != line[-1])
held = kept / ("-".join([*sources, *(part for part in line if part == "-fopenmp")]) + ".made")
line = ["-O1" if part == "-O3" else part for part in line]  # compile time matters here, not the speed of the result
if not held.exists():
    code = subprocess.run([{compiler!r}, *line]).returncode
    if code:
        sys.exit(code)
    kept.mkdir(parents=True, exist_ok=True)
    shutil.copy(line[-1], held)
shutil.copy(held, line[-1])
"""


@dataclass(frozen=True)
class Artefacts:
    """Folders below `work`, by their content.

    Attributes:
        toy: the unquantized pipeline.
        run: a finished search of the denoiser; its checkpoint is in several shards.
        whole: a checkpoint with a packed denoiser, text encoder and VAE.
        probed: the output of a probe with --split and --check.
        cache: compiled kernels, and the record of the fastest.
    """

    work: Path

    @property
    def toy(self) -> Path:
        return self.work / "toy"

    @property
    def run(self) -> Path:
        return self.work / "run"

    @property
    def sharded(self) -> Path:
        return self.work / "sharded"

    @property
    def whole(self) -> Path:
        return self.work / "whole"

    @property
    def probed(self) -> Path:
        return self.work / "probed"

    @property
    def cache(self) -> Path:
        return self.work / "cache"

    def model(self) -> tuple[str, ...]:
        return ("--model", str(self.toy), "--prompts", str(self.work / "prompts.txt"), *CALL)

    def search(self, folder: Path, budget: str = "50%") -> list[str]:
        """The command line of the search in `run`, for any output folder."""
        sizes = ("--trials", "2", "--samples", "2", "--formats", "int4,nf4,int8,fp16")
        return ["search", "--budget", budget, *self.model(), *sizes, "--output-dir", str(folder), "--json"]

    def export(self, folder: Path, *more: str) -> list[str]:
        """The command line that packs the policy of `run`."""
        given = ("--policy", str(self.run / "policy.yaml"), "--model", str(self.toy))
        return ["export", *given, "--output-dir", str(folder), *more]

    def probe(self, folder: Path) -> list[str]:
        sizes = ("--samples", "2", "--vectors", "1", "--remeasure", "0", "--formats", "int4")
        return ["probe", *self.model(), *sizes, "--output-dir", str(folder), "--quiet"]

    def evaluate(self, checkpoint: Path) -> list[str]:
        return ["eval", str(checkpoint), *self.model(), "--images", "1", "--json"]


def make(work: Path) -> Artefacts:
    """Make everything that does not exist yet. All computing happens in separate processes."""
    made = Artefacts(work)
    _environment(made)
    if (work / "made").exists():
        return made
    for name in ("toy", "run", "sharded", "whole", "whole-run", "probed", "cache", "undisturbed"):
        shutil.rmtree(work / name, ignore_errors=True)  # left by a run that stopped here
    work.chmod(0o755)
    (work / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    command(["pipeline"], run=lambda: _save_toy(made.toy)).require()
    command(made.search(made.run)).require()
    command(made.export(made.sharded, "--max-shard-size", "20KB")).require()
    search = [*made.search(work / "whole-run"), "--component", "unet,text_encoder,vae", "--trials", "0"]
    command(search, patience=300).require()
    shutil.move(work / "whole-run" / "checkpoint", made.whole)
    shown = ("--split", "--shared", "1", "--check", "--check-policies", "2")
    command([*made.probe(made.probed), *shown], patience=300).require()
    command(["kernels"], run=_use_kernels, patience=600).require()
    (work / "made").touch()
    return made


def _environment(made: Artefacts) -> None:
    os.environ["BITPOLICY_CACHE"] = str(made.cache)
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return
    made.work.mkdir(parents=True, exist_ok=True)
    script = made.work / "c++"
    script.write_text(_CXX.format(python=sys.executable, kept=str(made.work / "objects"), compiler=compiler))
    script.chmod(0o755)
    os.environ["CXX"] = str(script)


def _use_kernels() -> None:
    """Compile the kernels and store a choice among some of them."""
    import torch

    from bitpolicy.kernels import micro_probe
    from bitpolicy.kernels.cpu import extension as cpu_extension
    from bitpolicy.kernels.kernel import Compute

    cpu_extension.library()
    ones = torch.ones(3, 3)
    for call in ("a", "b"):
        tried = {name: lambda: ones @ ones for name in ("one", "other")}
        micro_probe.fastest(call, tried, Compute.EXACT, lambda: ones @ ones)


def _save_toy(folder: Path) -> None:
    import torch

    pipe = toy_pipeline()
    for model in (pipe.unet, pipe.vae, pipe.text_encoder):
        torch.nn.Module.to(model, torch.float16)
    pipe.save_pretrained(folder)


def toy_pipeline() -> Any:
    """A StableDiffusionPipeline that draws 8 x 8 pixels."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=8)
    text = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
        pad_token_id=len(words) - 1,
        initializer_factor=2.0,
    )
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        mid_block_type=None,
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(
        block_out_channels=(8,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=8,
    )
    return StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def without_times(text: str) -> dict[str, Any]:
    """What a search prints, without the values that differ between any two runs."""
    return {key: value for key, value in json.loads(text).items() if key not in ("seconds", "output_dir")}


__all__ = ["Artefacts", "Finished", "make", "toy_pipeline", "without_times"]
