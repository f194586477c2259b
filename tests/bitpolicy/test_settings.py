"""The options of a search: what each takes, and that everything made from them agrees."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from typer.main import get_command

import bitpolicy
from bitpolicy.cli import main
from bitpolicy.declared import declared_options
from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.output_folder import identity_of
from bitpolicy.pipelines.loading import DTYPES
from bitpolicy.search.budget import SCOPES
from bitpolicy.search.study.samplers import SAMPLERS, SPACES
from bitpolicy.sensitivity.probes.named import PROBES
from bitpolicy.settings import Settings

SETTINGS = Settings("5MB", prompts=("cat", "dog"), call=(("num_inference_steps", 2),))


def test_every_setting_counts() -> None:
    other = Settings(
        "6MB",
        model="m",
        component="unet",
        formats=("int8",),
        prompts=("cat",),
        call=(),
        seed=1,
        trials=1,
        probe="weight",
        dtype="float32",
        device="cpu",
        revision="r",
        variant="fp16",
        storage="s",
        offload=True,
        calibration_samples=1,
        vectors=1,
        shared=1,
        remeasure=1,
        remeasure_close=1,
        probe_memory="1GB",
        search_samples=1,
        confirm_samples=1,
        held_out_samples=1,
        quantizer="mse",
        compute="int8",
        frontier=3,
        keep=("a=fp16",),
        share_qkv=True,
        target="sdnq",
        scope="peak",
        height=8,
        width=8,
        batch_size=2,
        sampler="random",
        space="layer",
        timeout=1.0,
        all_trials=True,
        objective="ssim",
        features="f",
        lora=("l.safetensors",),
    )
    ours, theirs = identity_of(SETTINGS), identity_of(other)
    assert [name for name in ours if ours[name] == theirs[name]] == ["target_psnr", "target_lpips", "policy", "config"]
    for aim in ("target_psnr", "target_lpips"):
        assert identity_of(Settings(None, **{aim: 0.5}))[aim] == 0.5


@pytest.mark.parametrize("name", ["trials", "remeasure", "remeasure_close", "frontier", "timeout", "seed"])
def test_numbers_are_not_negative(name: str) -> None:
    with pytest.raises(BitPolicyError, match=f"^--{name.replace('_', '-')} is -1; give "):
        Settings("5MB", **{name: -1})


def test_names_are_those_that_the_code_knows() -> None:
    """Where another module has a list of names of its own, it is the same list."""
    choices = {one.name: one.choices for one in declared_options(Settings)}
    assert choices["probe"] == tuple(PROBES)
    assert choices["scope"] == SCOPES
    assert choices["sampler"] == SAMPLERS
    assert choices["space"] == SPACES
    assert choices["dtype"] == ("auto", *DTYPES)


def test_commands_and_python_take_every_option_under_its_name() -> None:
    keywords = {one.keyword for one in declared_options(Settings)} - {"model", "shared"}
    parameters: Any = get_command(main.search_app)
    on_the_line = {option[2:].replace("-", "_") for param in parameters.params for option in param.opts}
    assert keywords <= on_the_line
    assert keywords <= set(inspect.signature(bitpolicy.search).parameters)
    assert {"samples", "probe"} <= set(inspect.signature(bitpolicy.probe).parameters)
    with pytest.raises(BitPolicyError, match="probe has no argument 'trials'"):
        bitpolicy.probe("./nothing", trials=3)
