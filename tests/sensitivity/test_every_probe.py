"""Tests that every probe has to pass. A new probe in the registry is tested automatically."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats.named import parse_formats
from bitpolicy.sensitivity.cost.progress import Stages
from bitpolicy.sensitivity.inventory import inventory
from bitpolicy.sensitivity.probes.named import PROBES, probe_named
from bitpolicy.sensitivity.probes.run import ProbeRun, ProbeSettings
from bitpolicy.sensitivity.samples import split_samples
from bitpolicy.sensitivity.table import SensitivityTable
from bitpolicy.sensitivity.trajectory.reference import ReferencePass
from bitpolicy.sensitivity.trajectory.trajectories import Trajectories

NewTrajectories = Callable[..., Trajectories]
SAMPLES = tuple(split_samples(["a red heart", "pizza"], 2, seed=0))
FORMATS = "int4,int8,fp16"


@dataclass(frozen=True)
class Run:
    """A probe that ran once."""

    trajectories: Trajectories
    folder: Path
    reference: ReferencePass
    table: SensitivityTable


def new_run(trajectories: Trajectories, folder: Path, probe: str, quantizers: tuple[str, ...] = ("rtn",)) -> ProbeRun:
    settings = ProbeSettings(probe, SAMPLES, vectors=1, quantizers=quantizers)
    layers = inventory(trajectories.target)
    formats = parse_formats(FORMATS)
    return ProbeRun(trajectories, layers, formats, torch.float16, "toy", settings, folder, Stages(quiet=True))


@pytest.fixture(scope="module", params=PROBES)
def ran(
    request: pytest.FixtureRequest, new_trajectories: NewTrajectories, tmp_path_factory: pytest.TempPathFactory
) -> Run:
    trajectories = new_trajectories(num_inference_steps=1, guidance_scale=1.0)
    folder = tmp_path_factory.mktemp(request.param)
    run = new_run(trajectories, folder, request.param)
    reference = run.reference()
    return Run(trajectories, folder, reference, run.table(reference))


def test_the_table_has_every_layer_in_every_packed_format(ran: Run) -> None:
    layers = [layer.name for layer in inventory(ran.trajectories.target)]
    assert ran.table.layers == tuple(layers)
    assert [format.name for format in ran.table.formats] == ["int4", "int8"]
    for values in (ran.table.error, ran.table.corrected):
        assert values.shape == (len(layers), 2)
    assert (ran.table.error >= 0).all()
    assert ran.table.error.sum() > 0


def test_the_table_names_its_probe(ran: Run) -> None:
    assert probe_named(ran.table.probe).name == ran.table.probe


def test_only_a_probe_that_takes_gradients_has_sketches(ran: Run) -> None:
    assert (ran.table.sketches is not None) == PROBES[ran.table.probe].takes_gradients


def test_a_probe_costs_nothing_exactly_if_it_is_data_free(ran: Run) -> None:
    assert ran.table.cost is not None
    assert (ran.table.cost.probe == 0) == PROBES[ran.table.probe].data_free


def test_a_second_run_reuses_its_records(ran: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for method in ("latents", "signals", "differentiable_signal"):
        monkeypatch.setattr(Trajectories, method, lambda *_: pytest.fail("the pipeline ran"))
    again = new_run(ran.trajectories, ran.folder, ran.table.probe).table(ran.reference)
    assert torch.equal(again.error, ran.table.error)
    assert torch.equal(again.corrected, ran.table.corrected)


@pytest.mark.parametrize("name", PROBES)
def test_several_quantizers_need_a_probe_that_can_choose(name: str) -> None:
    if PROBES[name].chooses_quantizer:
        ProbeSettings(name, SAMPLES, quantizers=("rtn", "mse"))
        return
    with pytest.raises(BitPolicyError, match=f"the {name} probe .* --quantizer"):
        ProbeSettings(name, SAMPLES, quantizers=("rtn", "mse"))


def test_the_error_for_an_unknown_probe_names_all_probes() -> None:
    with pytest.raises(BitPolicyError, match=f"unknown probe 'nose'; write any of {', '.join(PROBES)}"):
        probe_named("nose")
