"""The whole road: load, probe, search, export, reload from disk, compare.

Each stage goes on where a killed run stopped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitpolicy.compare import save_comparison
from bitpolicy.kernels.format import Format
from bitpolicy.kernels.formats import FP16, parse_formats
from bitpolicy.loading import BUNDLED, Source, load_source, open_pipeline
from bitpolicy.policies.accounting import ByteAccount
from bitpolicy.policies.calibration import calibration_hash, save_calibration
from bitpolicy.policies.checkpoint import checkpoint_bytes, describe_checkpoint, export_pipeline
from bitpolicy.policies.denoiser import denoisers_in
from bitpolicy.policies.policy import BudgetRecord, Choice, ModelReference, Policy, Result
from bitpolicy.prompting import Split, default_requests, split
from bitpolicy.search.budget import Budget, read
from bitpolicy.search.closeness import beyond_first_order, close_choices
from bitpolicy.search.finalists import Confirmed, confirm
from bitpolicy.search.generation import Generations
from bitpolicy.search.problem import Problem
from bitpolicy.search.quality import Psnr
from bitpolicy.search.study import Study, journal
from bitpolicy.sensitivity.inventory import Layer, inventory
from bitpolicy.sensitivity.probe import ProbeRun, ProbeSettings
from bitpolicy.sensitivity.progress import Stages
from bitpolicy.sensitivity.records import settings_key
from bitpolicy.sensitivity.samples import Sample
from bitpolicy.sensitivity.trajectory import Trajectories
from bitpolicy.settings import OutputFolder, Settings

BUNDLED_CALL = {"num_inference_steps": 20, "guidance_scale": 3.0}
DEFAULT_STEPS = 20  # where the pipeline is not the bundled one and no number is given
_FINALISTS = 3
_PICTURES = 8  # columns of compare.png


@dataclass(frozen=True)
class Plan:
    """What a run is going to do, known before any image is made.

    Attributes:
        source: the loaded pipeline.
        layers: of its denoiser.
        formats: the candidates.
        account: exact bytes.
        budget: in bytes.
        split: the samples of each part.
        trajectories: the pipeline with its call arguments.
    """

    source: Source
    layers: list[Layer]
    formats: tuple[Format, ...]
    account: ByteAccount
    budget: Budget
    split: Split
    trajectories: Trajectories

    @property
    def model(self) -> str:
        """A name for people."""
        return f"{class_name(self.source.denoiser)} of {self.source.id}"

    def probe(self, settings: Settings, folder: Path, stages: Stages) -> ProbeRun:
        """A probe over the calibration samples; `folder` keeps its records."""
        wanted = ProbeSettings(settings.probe, self.split.calibration, settings.vectors, settings.shared)
        weights, storage = self.source.everything_sha256, self.source.storage
        return ProbeRun(self.trajectories, self.layers, self.formats, storage, weights, wanted, folder, stages)

    @property
    def smallest(self) -> int:
        """Bytes of the smallest policy that the formats allow."""
        return self.account.fixed + sum(
            min(self.account.layer(layer.name, f) for f in self.formats) for layer in self.layers
        )

    @property
    def fits_unquantized(self) -> bool:
        return self.budget.nbytes >= self.account.reference


def make_plan(settings: Settings, source: Source | None = None) -> Plan:
    """Load the pipeline and check everything that can be checked before work begins.

    Raises:
        BitPolicyError: any part of `settings` is wrong, or the budget is below the smallest policy.
    """
    formats = parse_formats(settings.formats)
    read(settings.budget)
    bundled = source is None and settings.model in (None, BUNDLED)
    ProbeSettings(settings.probe, (Sample("", 0),))  # what is wrong so far is said before a model is loaded
    if source is None:
        source = load_source(
            settings.model,
            settings.component,
            dtype=settings.dtype,
            device=settings.device,
            revision=settings.revision,
            variant=settings.variant,
            offload=settings.offload,
        )
    account = ByteAccount.of(source.denoiser, source.storage)
    layers = inventory(source.denoiser)
    budget = Budget.parse(settings.budget, account)
    trajectories = Trajectories(source.pipe, source.component, {**default_call(bundled), **dict(settings.call)})
    requests = list(settings.prompts) if settings.prompts else default_requests(source.pipe, bundled)
    sizes = (settings.calibration_samples, settings.search_samples, settings.confirm_samples, settings.held_out_samples)
    parts = split(requests, settings.seed, *sizes)
    for request in requests:
        trajectories.require(Sample.of(request, 0).arguments)
    plan = Plan(source, layers, formats, account, budget, parts, trajectories)
    budget.require(plan.smallest, [f.name for f in formats])
    return plan


def class_name(denoiser: nn.Module) -> str:
    """Of the denoiser, or of each of several."""
    return ",".join(dict.fromkeys(type(part).__name__ for part in denoisers_in(denoiser)))


def default_call(bundled: bool) -> dict[str, Any]:
    """Arguments of the pipeline call where none are given."""
    return dict(BUNDLED_CALL) if bundled else {"num_inference_steps": DEFAULT_STEPS}


class SearchRun:
    """One search in one output folder.

    Attributes:
        policy: once `decide` has run, the policy without its measured quality.
        calibration: E[x] per layer.
    """

    def __init__(self, settings: Settings, plan: Plan, folder: Path, stages: Stages) -> None:
        self._settings, self._plan, self._folder, self._stages = settings, plan, folder, stages
        self.calibration: dict[str, torch.Tensor] = {}

    def decide(self) -> Policy:
        """Probe and search; writes the sensitivity table, the calibration, the journal and policy.yaml."""
        if self._plan.fits_unquantized:
            choices = {layer.name: Choice(FP16) for layer in self._plan.layers}
            policy = self._policy(choices, 0.0, {"search": "the budget holds the unquantized denoiser"})
        else:
            policy = self._searched()
        policy.save(self._folder / "policy.yaml")
        return policy

    def _searched(self) -> Policy:
        problem = self._probed()
        table, exact = problem.table, problem.solve()
        found, study = self._study(problem)
        formats = [found.choices[layer.name].format for layer in self._plan.layers]
        provenance = {
            "probe": {
                "name": table.probe,
                "samples": len(self._plan.split.calibration),
                "vectors": self._settings.vectors,
                "measured": 0 if table.measured is None else int(table.measured.sum()),
            },
            "search": {
                "trials": len(study.finished) if study else 0,
                "exact_gap": float(f"{exact.gap:.2g}"),
                "finalists_mse": [float(f"{error:.5g}") for error in found.error],
                "won": "the exact solution" if found.choices == problem.choices(exact) else "a trial of the study",
            },
        }
        return self._policy(dict(found.choices), table.additive_error(formats), provenance)

    def _probed(self) -> Problem:
        """Scores, with those measured that decide the solution."""
        plan = self._plan
        run = plan.probe(self._settings, self._folder / "work", self._stages)
        reference = run.reference()
        self.calibration = reference.calibration
        problem = Problem(plan.layers, plan.formats, run.table(reference), plan.account, plan.budget.nbytes)
        if problem.table.probe == "adjoint":
            for find, most in (
                (beyond_first_order, self._settings.remeasure),
                (close_choices, self._settings.remeasure_close),
            ):
                left = most
                while places := find(problem, problem.solve(), left):
                    problem = replace(problem, table=run.remeasured(problem.table, reference, places))
                    left -= len(places)
        problem.table.save(self._folder, plan.layers, plan.account, plan.model)
        save_calibration(reference.calibration, self._folder / "calibration.safetensors")
        return problem

    def _study(self, problem: Problem) -> tuple[Confirmed, Study | None]:
        plan, trials = self._plan, self._settings.trials
        generations = Generations(plan.trajectories, self.calibration, plan.source.storage)
        with self._stages.timed("search"):
            if trials == 0:
                return Confirmed(problem.choices(problem.solve()), ()), None
            storage = self._settings.storage or journal(str(self._folder / "study.journal"))
            name = settings_key({**self._settings.identity(), "weights": plan.source.sha256})
            study = Study(problem, generations, plan.split.search, storage, name, self._settings.seed)
            with self._stages.bar(trials, "search trials") as advance:
                for _ in study.finished:
                    advance()
                study.run(trials, after_each=advance)
            finalists = self._stages.track(study.best(_FINALISTS), "confirming on fresh seeds")
            return confirm(finalists, generations, plan.split.confirm), study

    def _policy(self, choices: dict[str, Choice], predicted: float | None, provenance: dict[str, Any]) -> Policy:
        plan, source = self._plan, self._plan.source
        nbytes = plan.account.total({name: choice.format for name, choice in choices.items()})
        versions = {name: version(name) for name in ("bitpolicy", "torch", "diffusers", "optuna")}
        calibrated = any(choice.bias_correction for choice in choices.values())
        return Policy.of(
            choices,
            model=ModelReference.model_validate(
                {
                    "id": source.id,
                    "revision": source.revision,
                    "component": source.component,
                    "class": class_name(source.denoiser),
                    "sha256": source.sha256,
                }
            ),
            budget=BudgetRecord(asked=plan.budget.asked, bytes=plan.budget.nbytes),
            storage_dtype=str(source.storage).removeprefix("torch."),
            result=Result(
                policy_bytes=nbytes, predicted_error=None if predicted is None else float(f"{predicted:.6g}")
            ),
            provenance={
                **versions,
                "call": {k: v for k, v in plan.trajectories.call.items() if isinstance(v, str | int | float | bool)},
                "seed": self._settings.seed,
                **provenance,
                **({"calibration": calibration_hash(self.calibration)} if calibrated else {}),
            },
        )

    def export(self, policy: Policy) -> int:
        """Write checkpoint/; returns the denoiser's tensor bytes as found on disk."""
        source = self._plan.source
        with self._stages.timed("export"):
            folder = self._folder / "checkpoint"
            export_pipeline(source.pipe, source.component, policy, self.calibration, folder)
            return sum(checkpoint_bytes(folder / name) for name in source.component.split(","))

    def evaluate(self, policy: Policy) -> tuple[Policy, Psnr]:
        """Reload the checkpoint, compare on held-out samples, write compare.png and the measured PSNR into the
        policy."""
        plan, source = self._plan, self._plan.source
        samples = plan.split.held_out
        with self._stages.timed("evaluate"):
            tracked = self._stages.track(samples, "held-out, reference")
            reference = [image for image, _ in plan.trajectories.images(tracked)]
            with swapped_denoiser(source, self._folder / "checkpoint"):
                reloaded = Trajectories(source.pipe, source.component, plan.trajectories.call)
                tracked = self._stages.track(samples, "held-out, checkpoint")
                images = [image for image, _ in reloaded.images(tracked)]
            psnr = Psnr.of(reference, images)
            label = f"{policy.result.policy_bytes / 1e6:.3g} MB" if policy.result else "quantized"
            rows = [(f"{plan.account.reference / 1e6:.3g} MB", reference[:_PICTURES]), (label, images[:_PICTURES])]
            captions = [sample.prompt for sample in samples[:_PICTURES]]
            save_comparison(self._folder / "compare.png", captions, rows, psnr.per_image)
        return self._measured(policy, psnr), psnr

    def _measured(self, policy: Policy, psnr: Psnr) -> Policy:
        assert policy.result is not None
        result = policy.result.model_copy(update={"psnr_db": None if psnr.mean is None else round(psnr.mean, 2)})
        policy = policy.model_copy(update={"result": result})
        policy.save(self._folder / "policy.yaml")
        describe_checkpoint(self._folder / "checkpoint", policy, self._plan.source.denoiser)
        return policy


@contextmanager
def swapped_denoiser(source: Source, checkpoint: Path) -> Iterator[None]:
    """While the block runs, the source pipeline computes with the denoiser of the checkpoint, read from disk."""
    dtype = next(source.denoiser.parameters()).dtype
    reloaded = open_pipeline(checkpoint, dtype)
    originals = {name: getattr(source.pipe, name) for name in source.component.split(",")}
    try:
        for name in originals:
            setattr(source.pipe, name, getattr(reloaded, name).to(source.pipe._execution_device))
        yield
    finally:
        for name, original in originals.items():
            setattr(source.pipe, name, original)


def run_search(settings: Settings, plan: Plan, output: OutputFolder, stages: Stages) -> dict[str, Any]:
    """Do everything that is not done yet; returns what `--json` prints."""
    run = SearchRun(settings, plan, output.path, stages)
    policy = run.decide()
    nbytes = run.export(policy)
    policy, psnr = run.evaluate(policy)
    assert policy.result is not None
    choices = policy.resolve(layer.name for layer in plan.layers)
    counts = Counter(choice.format.name for choice in choices.values())
    result = {
        "budget_bytes": plan.budget.nbytes,
        "policy_bytes": policy.result.policy_bytes,
        "checkpoint_bytes": nbytes,
        "reference_bytes": plan.account.reference,
        "layers": {format.name: counts[format.name] for format in plan.formats},
        "predicted_error": policy.result.predicted_error,
        "psnr_db": psnr.as_dict(),
        "seconds": stages.seconds,
        "output_dir": str(output.path),
    }
    output.finish({**result, "roles": _roles(plan.layers, choices)})
    return result


def _roles(layers: list[Layer], choices: Mapping[str, Choice]) -> dict[str, dict[str, int]]:
    """Role -> format name -> number of layers."""
    table: dict[str, Counter[str]] = {}
    for layer in layers:
        table.setdefault(layer.role, Counter())[choices[layer.name].format.name] += 1
    return {role: dict(counts) for role, counts in sorted(table.items())}
