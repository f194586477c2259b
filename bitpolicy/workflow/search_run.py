"""The whole search: load, probe, search, export, reload from disk, compare.

If a run is killed, each stage continues where the run stopped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bitpolicy.kernels.formats.named import FP16
from bitpolicy.output_folder import OutputFolder
from bitpolicy.policies.calibration import Calibration
from bitpolicy.policies.checkpoints.checkpoint import checkpoint_bytes
from bitpolicy.policies.checkpoints.pipeline import describe_checkpoint, export_parts
from bitpolicy.policies.measured_compute import measured_compute
from bitpolicy.policies.policy import Choice, Policy
from bitpolicy.policies.policy_records import BudgetRecord, ModelReference, Result
from bitpolicy.policies.quantization import Quantization
from bitpolicy.policies.storage.calibration_file import save_calibration
from bitpolicy.search.budget import BudgetError
from bitpolicy.search.closeness import beyond_first_order, close_choices
from bitpolicy.search.generation import Generations
from bitpolicy.search.problem import Problem
from bitpolicy.search.quality.metrics import Comparison, measure
from bitpolicy.search.quality.objective import objective_named
from bitpolicy.search.quality.psnr import Psnr, Unavailable
from bitpolicy.search.quality.sound import sampling_rate
from bitpolicy.sensitivity.cost.progress import Stages
from bitpolicy.sensitivity.inventory import Layer
from bitpolicy.sensitivity.table import SensitivityTable
from bitpolicy.sensitivity.table_files import ModelContext, write_table
from bitpolicy.sensitivity.trajectory.trajectories import Trajectories
from bitpolicy.settings import Settings
from bitpolicy.workflow.compare import OWN, Row, save_comparison, save_sounds
from bitpolicy.workflow.curve import Point, file_name, points, save_picture, save_table
from bitpolicy.workflow.decision import (
    Decision,
    in_words,
    mean_db,
    networks_of,
    reaching_target,
    why_stopped,
    within_budget,
)
from bitpolicy.workflow.plan import Plan
from bitpolicy.workflow.swapped import swapped_components
from bitpolicy.workflow.transfer import corrected_as
from bitpolicy.workflow.uniform import drawn_uniform

_QUALITY = ("psnr", "ssim", "lpips", "fid")  # of the held-out results, if they can be measured here


@dataclass(frozen=True)
class Evaluated:
    """What the held-out samples say.

    Attributes:
        policy: with its PSNR.
        psnr: of every held-out sample.
        quality: the other measures of quality that are available here, e.g. the mel distance of sounds, as JSON.
        uniform: the best uniform format in the policy's bytes, as JSON; None if the policy quantizes nothing.
    """

    policy: Policy
    psnr: Psnr
    quality: dict[str, Any]
    uniform: dict[str, Any] | None


class SearchRun:
    """One search in one output folder.

    Attributes:
        calibration: what exporting the policy needs; set by `decide`.
        points: the curve, if it was requested; set by `decide`.
    """

    def __init__(self, settings: Settings, plan: Plan, folder: Path, stages: Stages) -> None:
        self._settings, self._plan, self._folder, self._stages = settings, plan, folder, stages
        self._measured = Calibration()  # for every candidate
        self._never_called = 0  # layers that stay FP16 because no sample calls them
        self._searched: tuple[Problem, Generations] | None = None  # set by `decide`, unless nothing is quantized
        self.calibration = Calibration()
        self.points: list[Point] = []

    def decide(self) -> Policy | None:
        """Probe and search. Writes the sensitivity table, the calibration, the journal, frontier/ and policy.yaml.

        Returns:
            The policy; None if only the curve was requested.
        """
        settings, plan = self._settings, self._plan
        if settings.budget is not None and plan.fits_unquantized and not settings.frontier:
            choices = {layer.name: Choice(FP16) for layer in plan.layers}
            about: dict[str, Any] = {"search": "the budget holds all of it unquantized"}
            return self._saved(self._policy(choices, 0.0, about, Calibration()))
        objective = objective_named(settings.objective, networks_of(settings, plan))
        problem = self._probed()
        quantization = Quantization(
            calibration=self._measured, storage=plan.source.storage, compute=measured_compute(settings.compute)
        )
        generations = Generations(plan.trajectories, quantization=quantization, objective=objective)
        self._searched = (problem, generations)
        if settings.frontier:
            self._write_curve(problem, generations)
        if not settings.aims:
            return None
        with self._stages.timed("search"):
            if settings.budget is None and settings.policy is None:
                found = reaching_target(settings, plan, problem, generations, self._stages)
            else:
                found = within_budget(settings, plan, problem, generations, self._folder, self._stages)
            if plan.base is not None:
                found = self._as_given(found, plan.base.model)
        self.calibration = self._measured.needed_for(found.choices).stamped(plan.source.sha256)
        save_calibration(self.calibration, self._folder / "calibration.safetensors")
        formats = [found.choices[layer.name].format for layer in plan.layers]
        about = {"probe": self._about_probe(problem), "search": found.about}
        predicted = problem.table.additive_error(formats)
        return self._saved(self._policy(found.choices, predicted, about, self.calibration))

    def _as_given(self, found: Decision, model: ModelReference) -> Decision:
        """The formats and bias corrections of the given policy. No single format is drawn for comparison, because no
        layer could have another."""
        self._searched = None
        about = {"won": f"the formats of the policy for {model.id}", "from": model.model_dump(exclude_defaults=True)}
        return Decision(corrected_as(self._plan.given, found.choices), about)

    def _saved(self, policy: Policy) -> Policy:
        policy.save(self._folder / "policy.yaml")
        return policy

    def _about_probe(self, problem: Problem) -> dict[str, Any]:
        table = problem.table
        return {
            "name": table.probe,
            "samples": len(self._plan.split.calibration),
            "vectors": self._settings.vectors,
            "quantizer": self._settings.quantizer,
            "measured": 0 if table.measured is None else int(table.measured.sum()),
            **({"never_called": self._never_called} if self._never_called else {}),
        }

    def _probed(self) -> Problem:
        """The problem with the probe's scores, after measuring the scores that decide the solution."""
        plan = self._plan
        run = plan.probe(self._settings, self._folder / "work", self._stages)
        reference = run.reference()
        self._measured = reference.calibration
        problem = self._posed(run.table(reference))
        if problem.table.probe == "adjoint" and self._settings.budget is not None:
            for find, most in (
                (beyond_first_order, self._settings.remeasure),
                (close_choices, self._settings.remeasure_close),
            ):
                left = most
                while places := find(problem, problem.solve(), left):
                    problem = replace(problem, table=run.remeasured(problem.table, reference, places))
                    left -= len(places)
        write_table(problem.table, self._folder, ModelContext(plan.layers, plan.account, plan.model))
        return problem

    def _posed(self, table: SensitivityTable) -> Problem:
        """The problem, with the layers that no sample calls kept at FP16.

        Raises:
            BudgetError: with these layers at FP16, no policy fits.
        """
        plan = self._plan
        never = [name for name in plan.never_called(table, self._measured) if name not in plan.pinned]
        self._never_called = len(never)
        problem = plan.problem(table, never)
        if not never:
            return problem
        notice = (
            f"no calibration sample calls {len(never)} layers, e.g. {never[0]}: the effect of quantizing them is "
            "unknown, so they stay FP16; use --keep 'GLOB=FORMAT' to give them another format"
        )
        try:
            plan.require_budget(problem.smallest)
        except BudgetError as error:
            raise BudgetError(f"{error}; {notice}") from error
        self._stages.warn(notice)
        return problem

    def _write_curve(self, problem: Problem, generations: Generations) -> None:
        """Write frontier/: policies of all sizes with one calibration, a table and a picture. trials=0 draws no
        images."""
        plan, folder = self._plan, self._folder / "frontier"
        found = points(problem, plan.account, self._settings.frontier)
        with self._stages.timed("frontier"):
            if self._settings.trials:
                tracked = self._stages.track(found, "frontier, real images")
                found = [replace(p, psnr_db=mean_db(generations, p.choices, plan.split.search)) for p in tracked]
            needed = self._measured.needed_for(*(point.choices for point in found))
            shared = needed.stamped(plan.source.sha256)
            save_calibration(shared, folder / "calibration.safetensors")
            for point in found:
                about = {"probe": self._about_probe(problem), "search": {"won": "the exact solution"}}
                policy = self._policy(point.choices, point.error, about, shared)
                own = BudgetRecord(asked=f"{point.nbytes}B", bytes=point.nbytes)
                policy.model_copy(update={"budget": own}).save(folder / file_name(point, plan.account))
            save_table(folder / "frontier.csv", found, plan.account)
            save_picture(folder / "frontier.png", found, plan.account)
        self.points = found

    def _policy(
        self,
        choices: Mapping[str, Choice],
        predicted: float | None,
        provenance: dict[str, Any],
        calibration: Calibration,
    ) -> Policy:
        plan, source = self._plan, self._plan.source
        nbytes = plan.account.total({name: choice.format for name, choice in choices.items()})
        versions = {name: version(name) for name in ("bitpolicy", "torch", "diffusers", "optuna")}
        calibrated = any(choice.needs_calibration for choice in choices.values())
        return Policy.of(
            choices,
            model=ModelReference.of(source.target, source.hashes, source.id, source.revision, source.lora),
            budget=self._budget_record(nbytes),
            storage_dtype=str(source.storage).removeprefix("torch."),
            compute=measured_compute(self._settings.compute).value,
            result=Result(
                policy_bytes=nbytes, predicted_error=None if predicted is None else float(f"{predicted:.6g}")
            ),
            provenance={
                **versions,
                "call": {k: v for k, v in plan.trajectories.call.items() if isinstance(v, str | int | float | bool)},
                "seed": self._settings.seed,
                **provenance,
                **({"calibration": calibration.sha256} if calibrated else {}),
            },
        )

    def _budget_record(self, nbytes: int) -> BudgetRecord:
        """The budget; if a quality was requested, the bytes that the policy took."""
        settings = self._settings
        if settings.target_psnr is not None:
            return BudgetRecord(asked=f"{settings.target_psnr:g} dB", bytes=nbytes)
        if settings.target_lpips is not None:
            return BudgetRecord(asked=f"LPIPS {settings.target_lpips:g}", bytes=nbytes)
        if settings.policy is not None:
            return BudgetRecord(asked=f"the formats of {settings.policy}", bytes=nbytes)
        return self._plan.budget.record

    def export(self, policy: Policy) -> int:
        """Write checkpoint/; returns the tensor bytes of the packed components, as found on disk."""
        source = self._plan.source
        with self._stages.timed("export"):
            folder = self._folder / "checkpoint"
            with self._stages.bar(1, "writing the checkpoint") as advance:
                export_parts(source.parts, policy, self.calibration, folder, card=self._plan.card)
                advance()
            return sum(checkpoint_bytes(folder / name) for name in source.components)

    def evaluate(self, policy: Policy) -> Evaluated:
        """Reload the checkpoint, compare it on held-out samples, write compare.png, and record the measured PSNR in the
        policy."""
        plan, source = self._plan, self._plan.source
        samples = plan.split.held_out
        assert policy.result is not None
        with self._stages.timed("evaluate"):
            before = list(plan.trajectories.images(self._stages.track(samples, "held-out, reference")))
            with swapped_components(source, self._folder / "checkpoint"):
                reloaded = Trajectories(source.pipe, source.components, plan.trajectories.call)
                after = list(reloaded.images(self._stages.track(samples, "held-out, checkpoint")))
            (reference, latents), (images, found) = zip(*before, strict=True), zip(*after, strict=True)
            psnr = Psnr.of(reference, images)
            rate = sampling_rate(source.pipe)
            own = Row.of(OWN, policy.result.policy_bytes, images, reference, rate)
            uniform = self._searched and drawn_uniform(plan, *self._searched, policy, own, reference, self._stages)
            rows = [Row.of("original", plan.account.reference, reference), own, *([uniform[0]] if uniform else [])]
            save_comparison(self._folder / "compare.png", [sample.prompt for sample in samples], rows)
            save_sounds(self._folder / "compare.png", rows, rate)
            measured = measure(
                _QUALITY, Comparison(reference, images, (latents, found), rate=rate), networks_of(self._settings, plan)
            )
        quality = {name: found.as_dict() for name, found in measured.items() if not isinstance(found, Unavailable)}
        del quality["psnr"]  # has a place of its own
        return Evaluated(self._with_quality(policy, psnr), psnr, quality, uniform[1] if uniform else None)

    def _with_quality(self, policy: Policy, psnr: Psnr) -> Policy:
        assert policy.result is not None
        result = policy.result.model_copy(update={"psnr_db": None if psnr.mean is None else round(psnr.mean, 2)})
        policy = policy.model_copy(update={"result": result})
        policy.save(self._folder / "policy.yaml")
        describe_checkpoint(self._folder / "checkpoint", policy, self._plan.source.target, self._plan.card)
        return policy


def run_search(settings: Settings, plan: Plan, output: OutputFolder, stages: Stages) -> dict[str, Any]:
    """Do everything that is not done yet; returns the result that `--json` prints."""
    run = SearchRun(settings, plan, output.path, stages)
    policy = run.decide()
    sizes = {"budget_bytes": plan.budget.total, "reference_bytes": plan.budget.scope.reference}
    curve = {"frontier": [[point.nbytes, point.error, point.psnr_db] for point in run.points]} if run.points else {}
    if policy is None:
        result = {**sizes, **curve, "seconds": stages.seconds, "output_dir": str(output.path)}
        output.finish(result)
        return result
    nbytes = run.export(policy)
    found = run.evaluate(policy)
    policy = found.policy
    assert policy.result is not None
    choices = policy.resolve(layer.name for layer in plan.layers)
    counts = Counter(choice.format.name for choice in choices.values())
    study = why_stopped(policy.provenance["search"])
    result = {
        **({} if settings.budget or policy.budget is None else {"target": policy.budget.asked}),
        "budget_bytes": plan.budget.total if settings.budget else policy.result.policy_bytes,
        "policy_bytes": policy.result.policy_bytes,
        "checkpoint_bytes": nbytes,
        "reference_bytes": plan.account.reference,
        "layers": {format.name: counts[format.name] for format in plan.formats},
        "chosen": in_words(policy.provenance["search"]),
        **({} if study is None else {"study": study}),
        "predicted_error": policy.result.predicted_error,
        "error_of": "image" if plan.trajectories.draws else "latent",
        "compute": policy.compute,
        "psnr_db": found.psnr.as_dict(),
        **({} if found.uniform is None else {"uniform": found.uniform}),
        **({} if plan.base is None else {"given_policy": _measured_there(plan.base)}),
        "quality": found.quality,
        **curve,
        "seconds": stages.seconds,
        "output_dir": str(output.path),
    }
    output.finish({**result, "roles": _roles(plan.layers, choices)})
    return result


def _measured_there(policy: Policy) -> dict[str, Any]:
    """What the given policy has in the model that it was made for."""
    return {"model": policy.model.id, "psnr_db": None if policy.result is None else policy.result.psnr_db}


def _roles(layers: list[Layer], choices: Mapping[str, Choice]) -> dict[str, dict[str, int]]:
    """Role -> format name -> number of layers."""
    table: dict[str, Counter[str]] = {}
    for layer in layers:
        table.setdefault(layer.role, Counter())[choices[layer.name].format.name] += 1
    return {role: dict(counts) for role, counts in sorted(table.items())}
