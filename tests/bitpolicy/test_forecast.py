"""The forecast of a run before it begins: the stages that it will show, their time, its memory and its disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bitpolicy.cli.running import probe, search
from bitpolicy.sensitivity.cost.progress import Stages
from bitpolicy.sensitivity.cost.step_cost import Timing, time_plain
from bitpolicy.sensitivity.samples import Sample
from bitpolicy.sensitivity.trajectory.trajectories import Trajectories
from bitpolicy.workflow import forecast


class Seen(Stages):
    """Records the expected stages, and every progress bar that would have been drawn."""

    def __init__(self, quiet: bool = False) -> None:
        super().__init__(quiet)
        self.expected: dict[str, float] = {}
        self.shown: dict[str, int] = {}
        runs.append(self)

    def expect(self, seconds: Mapping[str, float]) -> None:
        self.expected = dict(seconds)

    @contextmanager
    def bar(self, total: int, description: str) -> Iterator[Callable[[], None]]:
        if total:
            self.shown[description] = self.shown.get(description, 0) + total
        yield lambda: None


runs: list[Seen] = []


@pytest.fixture
def stages_of(command: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Seen]:
    """`stages_of(*arguments)`: the progress of a command that succeeds."""
    for module in (search, probe):
        monkeypatch.setattr(module, "Stages", Seen)

    def run(*arguments: Any) -> Seen:
        runs.clear()
        outcome = command(*arguments)
        assert outcome.code == 0, outcome.err
        return runs[0]

    return run


def tensor_bytes(folder: Path) -> int:
    """Bytes of all safetensors files, without their headers."""
    return sum(
        path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[:8], "little")
        for path in folder.rglob("*.safetensors")
    )


@pytest.mark.parametrize(
    "options",
    [
        ("--budget", "50%"),
        ("--budget", "50%", "--probe", "stepwise", "--quantizer", "gptq-trajectory"),
        ("--target-psnr", "20", "--quantizer", "rtn"),
        ("--frontier", "2", "--budget", "50%", "--probe", "weight", "--quantizer", "rtn"),
    ],
    ids=" ".join,
)
def test_a_search_shows_the_expected_stages(
    stages_of: Callable[..., Seen], small: tuple[str, ...], tmp_path: Path, options: tuple[str, ...]
) -> None:
    seen = stages_of(*small, *options, "--output-dir", tmp_path / "out")
    maybe = {"re-measuring"}  # only where estimates are too large for first order
    assert set(seen.shown) - maybe == set(seen.expected) - maybe
    assert [name for name in seen.expected if name in seen.shown] == list(seen.shown)


def test_a_probe_shows_the_expected_stages(
    stages_of: Callable[..., Seen], small: tuple[str, ...], tmp_path: Path
) -> None:
    options = ("--split", "--check", "--check-policies", "2", "--samples", "2", "--quantizer", "rtn")
    seen = stages_of("probe", *small[:-2], *options, "--output-dir", tmp_path / "out")
    assert set(seen.shown) | {"re-measuring"} == set(seen.expected)
    assert [name for name in seen.expected if name in seen.shown] == list(seen.shown)


def test_time_is_counted_in_steps(
    monkeypatch: pytest.MonkeyPatch, command: Any, small: tuple[str, ...], tmp_path: Path
) -> None:
    monkeypatch.setattr(forecast, "time_plain", lambda _, samples: Timing(2.0 * len(samples), 1.0 * len(samples), 5))
    monkeypatch.setattr(forecast, "time_probed", lambda *_: Timing(20.0, 10.0, 5))
    monkeypatch.setattr(forecast.Forecast, "_products", lambda *_: 3.0)
    options = ("--budget", "50%", "--quantizer", "rtn", "--trials", "6", "--dry-run", "--json")
    seconds = command(*small, *options, "--output-dir", tmp_path / "out").result["seconds"]
    trajectory, probed, products = 2 + 4 * 1, 5 * 10, 3
    assert seconds["reference"] == seconds["held-out, checkpoint"] == 16 * trajectory
    assert seconds["adjoint probe"] == 16 * (trajectory + 2 * (probed + products))
    assert seconds["search trials"] == (6 + 1) * 16 * trajectory


def test_a_time_limit_bounds_the_study(
    monkeypatch: pytest.MonkeyPatch, command: Any, small: tuple[str, ...], tmp_path: Path
) -> None:
    monkeypatch.setattr(forecast, "time_plain", lambda _, samples: Timing(1e4, 1e4, 5))
    options = ("--budget", "50%", "--quantizer", "rtn", "--timeout", "60", "--dry-run", "--json")
    assert command(*small, *options, "--output-dir", tmp_path / "out").result["seconds"]["search trials"] == 60


def test_the_disk_forecast_covers_what_is_written(command: Any, small: tuple[str, ...], tmp_path: Path) -> None:
    arguments = (*small, "--budget", "50%", "--json", "--output-dir", tmp_path / "out")
    foreseen = command(*arguments, "--dry-run").result["disk"]
    assert command(*arguments).code == 0
    checkpoint, work = tmp_path / "out" / "checkpoint", tmp_path / "out" / "work"
    assert tensor_bytes(checkpoint) <= foreseen["checkpoint"] <= 1.01 * tensor_bytes(checkpoint)
    assert tensor_bytes(work) == pytest.approx(foreseen["work"], rel=0.2)


def test_a_disk_without_room_is_refused_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch, command: Any, small: tuple[str, ...], here: Path
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10_000))
    for more in ((), ("--dry-run",)):
        outcome = command(*small, "--budget", "50%", *more)
        outcome.assert_refused("search-policy", "10 kB free", "the search writes up to", "checkpoint", "work/")
    assert list(here.iterdir()) == []


def test_memory_counts_the_weights_a_step_and_the_rounding(command: Any, small: tuple[str, ...], here: Path) -> None:
    def memory(*options: str) -> dict[str, int]:
        return command(*small, "--budget", "50%", "--dry-run", "--json", *options).result["memory"]

    plain, probed, rounded = memory("--probe", "weight", "--quantizer", "rtn"), memory("--quantizer", "rtn"), memory()
    assert plain["weights"] == probed["weights"] == rounded["weights"] > 0
    assert 0 < plain["probe"] < probed["probe"]
    none, some = (memory("--probe-memory", size)["sums"] for size in ("0", "100kB"))
    assert plain["sums"] == none == 0 < some <= 100_000 < probed["sums"]
    assert plain["rounding"] == probed["rounding"] == 0 < rounded["rounding"]


def test_a_step_is_timed_without_running_the_rest(
    half_pipeline: Callable[[], Any],
) -> None:
    trajectories, sample = Trajectories(half_pipeline(), ["unet"], {"num_inference_steps": 20}), Sample("cat", 0)
    trajectories.learn(sample)
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    trajectories.pipe.unet.register_forward_pre_hook(count)
    before = dict(vars(trajectories.pipe.scheduler))
    timing = time_plain(trajectories, [sample])
    assert calls == 2
    assert timing.steps == 20
    assert timing.first > 0 < timing.step
    assert vars(trajectories.pipe.scheduler).keys() == before.keys()


@pytest.mark.parametrize("storage", ["sqlite:///study.db", "journal:///study.journal"])
def test_a_dry_run_creates_no_storage(command: Any, small: tuple[str, ...], here: Path, storage: str) -> None:
    assert command(*small, "--budget", "50%", "--dry-run", "--storage", storage).code == 0
    assert list(here.iterdir()) == []


def test_a_dry_run_refuses_what_the_run_would_refuse(command: Any, small: tuple[str, ...], here: Path) -> None:
    (here / "full").mkdir()
    (here / "full" / "run.json").write_text(json.dumps({"budget": "another"}))
    wrong: list[tuple[str, ...]] = [
        ("--storage", "sqlite:///nowhere/study.db"),
        ("--storage", "postgresql://nobody@127.0.0.1:1/none"),
        ("--features", "nowhere"),
        ("--target-lpips", "0.1"),
        ("--output-dir", "full"),
        ("--output-dir", "x" * 300),
    ]
    for options in wrong:
        aim = () if "--target-lpips" in options else ("--budget", "50%")
        said = {command(*small, *aim, *options, *more).err for more in ((), ("--dry-run",))}
        (line,) = said
        assert line.startswith("search-policy: ")
        assert len(line.splitlines()) == 1
    assert [path.name for path in here.iterdir()] == ["full"]


def test_a_memory_that_is_no_size_is_refused(command: Any, small: tuple[str, ...], here: Path) -> None:
    outcome = command(*small, "--budget", "50%", "--probe-memory", "8Gb", "--dry-run")
    outcome.assert_refused("search-policy", "--probe-memory '8Gb' is in bits; write 8GB for bytes")
