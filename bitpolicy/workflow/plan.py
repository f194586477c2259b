"""What a run is going to do: the loaded pipeline, its layers, bytes and samples, checked before work begins."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from bitpolicy.kernels.dispatch import ROUNDED
from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats.format import Format
from bitpolicy.kernels.formats.named import FP16, parse_formats
from bitpolicy.kernels.kernel import Compute
from bitpolicy.kernels.quantizers.named import parse_quantizer
from bitpolicy.pipelines.loading import BUNDLED, Source, load_source
from bitpolicy.pipelines.prompting import Split, default_requests, split
from bitpolicy.policies.accounting import ByteAccount
from bitpolicy.policies.calibration import Calibration
from bitpolicy.policies.checkpoints.model_card import Card
from bitpolicy.policies.choice import Choice
from bitpolicy.policies.components import asked_components
from bitpolicy.policies.exporters.targets import exporter_named
from bitpolicy.policies.exporters.tied import tied_layers
from bitpolicy.policies.measured_compute import measured_compute
from bitpolicy.policies.policy import Policy
from bitpolicy.search.budget import Budget, Scope, read, read_bytes
from bitpolicy.search.constraints import joined, not_held, pinned, require_one_pin, shared_qkv
from bitpolicy.search.problem import PolicySpace, Problem
from bitpolicy.sensitivity.calls.signature import STEPS, Signature
from bitpolicy.sensitivity.cost.peak_memory import observe
from bitpolicy.sensitivity.cost.progress import Stages
from bitpolicy.sensitivity.inventory import Layer, inventory, warn_of_unsupported
from bitpolicy.sensitivity.probes.named import PROBES
from bitpolicy.sensitivity.probes.run import ProbeRun, ProbeSettings, require_one_quantizer
from bitpolicy.sensitivity.rounding.candidates import useful_formats
from bitpolicy.sensitivity.samples import Sample
from bitpolicy.sensitivity.table import SensitivityTable
from bitpolicy.sensitivity.trajectory.trajectories import Trajectories
from bitpolicy.sensitivity.workers import is_main
from bitpolicy.settings import Settings
from bitpolicy.workflow.transfer import formats_of, transferred

BUNDLED_CALL = {"num_inference_steps": 20, "guidance_scale": 3.0}
DEFAULT_STEPS = 20  # where the pipeline is not the bundled one and no number is given


@dataclass(frozen=True)
class Plan:
    """What a run is going to do, known before any image is made.

    Attributes:
        source: the loaded pipeline.
        layers: of the target.
        formats: the candidates.
        account: exact bytes of what is studied, as exported.
        budget: in bytes; all there is where none was asked for.
        split: the samples of each part.
        trajectories: the pipeline with its call arguments.
        pinned: layer name -> the one format it may have.
        tied: groups of layers that share a format.
        asked: names of the formats that every layer may have; the others are only for layers that are pinned to them.
        barred: (layer name, format) that the program it is exported to cannot hold.
        bundled: whether it is the pipeline that comes with the package.
        program: the one that it is exported to, if it is another.
        base: the policy whose formats are taken, made for another model; None if they are searched.
        given: layer name -> its choice; empty if there is none.
    """

    source: Source
    layers: list[Layer]
    formats: tuple[Format, ...]
    account: ByteAccount
    budget: Budget
    split: Split
    trajectories: Trajectories
    pinned: Mapping[str, Format] = field(default_factory=dict)
    tied: Sequence[Sequence[str]] = ()
    asked: frozenset[str] = frozenset()
    barred: frozenset[tuple[str, Format]] = frozenset()
    bundled: bool = False
    program: str | None = None
    base: Policy | None = None
    given: Mapping[str, Choice] = field(default_factory=dict)

    @property
    def model(self) -> str:
        """A name for people."""
        return f"{', '.join(dict.fromkeys(self.source.target.class_names))} of {self.source.id}"

    @property
    def card(self) -> Card:
        """What the model card of an export says of the layers."""
        return Card(roles={layer.name: layer.role for layer in self.layers})

    def probe(self, settings: Settings, folder: Path, stages: Stages) -> ProbeRun:
        """A probe over the calibration samples; `folder` keeps its records. A call argument that changes nothing is
        told on stderr.

        Raises:
            BitPolicyError: the pipeline refuses the call.
        """
        if is_main():
            warn_of_idle_arguments(self.trajectories, self.split.calibration[0], dict(settings.call), stages)
        wanted = ProbeSettings(
            settings.probe,
            self.split.calibration,
            vectors=settings.vectors,
            shared=settings.shared,
            quantizers=parse_quantizer(settings.quantizer),
            compute=measured_compute(settings.compute),
            memory=memory_of(settings),
        )
        weights, storage = self.source.everything_sha256, self.source.storage
        return ProbeRun(self.trajectories, self.layers, self.formats, storage, weights, wanted, folder, stages)

    def never_called(self, table: SensitivityTable, calibration: Calibration) -> list[str]:
        """Layers outside the loop, and all of a component, that no calibration sample calls: the encoder of an
        autoencoder that only decodes. Their scores say nothing."""
        outside = self.trajectories.outside_layers
        silent = {
            name
            for name, errors in zip(table.layers, table.error, strict=True)
            if name not in calibration.input_means and (PROBES[table.probe].data_free or not errors.any())
        }
        starts = map(self.source.target.prefix, self.source.components)
        parts = [{name for name in table.layers if name.startswith(start)} for start in starts]
        whole = {name for part in parts if part <= silent for name in part}
        return [name for name in table.layers if name in silent and (name in outside or name in whole)]

    def space(self, never_called: Iterable[str] = ()) -> PolicySpace:
        """The policies that the search chooses from.

        Args:
            never_called: layers that stay FP16 if they are not pinned to another format.
        """
        scope = self.budget.scope
        extra = {f for f in self.pinned.values() if f.name not in self.asked and f.packed}
        kept_alone = {(x.name, f) for x in self.layers for f in extra if self.pinned.get(x.name) != f}
        unknown = {(name, f) for name in never_called if name not in self.pinned for f in self.formats if f.packed}
        barred = scope.barred | kept_alone | unknown | self.barred
        return PolicySpace(self.layers, self.formats, scope.account, self.pinned, self.tied, barred)

    def problem(self, table: SensitivityTable, never_called: Iterable[str] = ()) -> Problem:
        """What the search decides, given the scores; `never_called` as for `space`."""
        return self.space(never_called).problem(table, self.budget.nbytes)

    @property
    def smallest(self) -> int:
        """Bytes of the smallest allowed policy, counted as the scope of the budget counts the target."""
        return self.space().smallest

    def require_budget(self, smallest: int) -> None:
        """Check the budget against the size of the smallest policy that is allowed.

        Raises:
            BudgetError: it is below that.
        """
        names = [format.name for format in self.formats]
        if self.program is None:
            self.budget.require(smallest, names)
            return
        packed = [format for format in self.formats if format.packed]
        unpacked = sum(all((layer.name, format) in self.barred for format in packed) for layer in self.layers)
        self.budget.require(smallest, names, exporter_named(self.program).title, unpacked)

    @property
    def fits_unquantized(self) -> bool:
        return self.budget.total >= self.budget.scope.reference and not self.pinned


def make_plan(settings: Settings, source: Source | None = None) -> Plan:
    """Load the pipeline and check everything that can be checked before work begins.

    Raises:
        BitPolicyError: any part of `settings` is wrong, or the budget is below the smallest policy.
    """
    asked = _require_sound(settings)
    bundled = source is None and settings.model in (None, BUNDLED)
    if source is None:
        source = load_source(
            settings.model,
            asked_components(settings.component),
            dtype=settings.dtype,
            device=settings.device,
            revision=settings.revision,
            variant=settings.variant,
            config=settings.config,
            offload=settings.offload,
            lora=settings.lora,
        )
    layers = inventory(source.target)
    warn_of_unsupported(source.target)
    account = ByteAccount.of(source.target, source.storage)
    base = None if settings.policy is None else Policy.load(settings.policy)
    given = {} if base is None else transferred(base, str(settings.policy), source.target, account)
    useful = useful_formats(source.target, parse_formats(settings.formats), source.storage)
    kept = formats_of(given) or pinned(settings.keep, layers)
    if given:
        asked = f"{account.total(kept)}B"
        useful = tuple(dict.fromkeys([*(format for format in kept.values() if format.packed), FP16]))
    merged = tied_layers(exporter_named(settings.target), source.target) if settings.target else []
    tied = joined([*merged, *(shared_qkv(layers) if settings.share_qkv else [])])
    require_one_pin(tied, kept)
    formats = (*dict.fromkeys(f for f in kept.values() if f not in useful), *useful)
    _require_formats_of(measured_compute(settings.compute), formats)
    call = {**default_call(source.pipe, bundled), **dict(settings.call)}
    trajectories = Trajectories(source.pipe, source.components, call)
    if trajectories.outside and not PROBES[settings.probe].outside_loop:
        raise BitPolicyError(
            f"the {settings.probe} probe differentiates denoisers alone; for {', '.join(trajectories.outside)} take "
            "--probe adjoint or --probe ablation"
        )
    requests = list(settings.prompts) if settings.prompts else default_requests(source.pipe, bundled)
    sizes = (settings.calibration_samples, settings.search_samples, settings.confirm_samples, settings.held_out_samples)
    parts = split(requests, settings.seed, *sizes)
    _require_steps(trajectories, trajectories.call)
    for request in requests:
        arguments = Sample.of(request, 0).arguments
        trajectories.require(arguments)
        _require_steps(trajectories, arguments)
    scope = _scope(settings, source, account, trajectories, parts.calibration[0], formats)
    plan = Plan(
        source=source,
        layers=layers,
        formats=formats,
        account=account,
        budget=Budget.parse(asked, scope),
        split=parts,
        trajectories=trajectories,
        pinned=kept,
        tied=tied,
        asked=frozenset(format.name for format in useful),
        barred=_barred(settings.target, layers, formats, kept, merged),
        bundled=bundled,
        program=settings.target,
        base=base,
        given=given,
    )
    plan.require_budget(plan.smallest)
    return plan


def _barred(
    program: str | None,
    layers: Sequence[Layer],
    formats: Sequence[Format],
    kept: Mapping[str, Format],
    merged: Iterable[Sequence[str]],
) -> frozenset[tuple[str, Format]]:
    """What another program cannot hold, if there is one."""
    if program is None:
        return frozenset()
    return not_held(program, layers, formats, kept, {name for group in merged for name in group})


def _require_sound(settings: Settings) -> str:
    """Check everything that can be checked before a model is loaded.

    Returns:
        The budget as written; "100%" where a quality or the whole curve is asked for.

    Raises:
        BitPolicyError: an option is wrong, or two do not go together.
    """
    parse_formats(settings.formats)
    if settings.target is not None:
        exporter_named(settings.target)
    asked = "100%" if settings.budget is None else settings.budget
    read(asked)
    memory_of(settings)
    require_one_quantizer(settings.probe, parse_quantizer(settings.quantizer))
    if settings.objective != "mse" and (settings.budget is None or not settings.trials):
        raise BitPolicyError(
            f"--objective {settings.objective} is what a study's trials minimise, and only a search with --budget and "
            "at least one of --trials has a study; leave it out"
        )
    compute = measured_compute(settings.compute)
    if settings.scope == "peak" and settings.offload:
        raise BitPolicyError("--scope peak needs the whole model on its device; leave out --offload")
    if settings.scope == "peak" and compute is not Compute.EXACT:
        raise BitPolicyError(
            f"--scope peak counts the memory of exact compute, and {compute} keeps weights in layouts of its own; take "
            "--scope weights, or --compute exact"
        )
    if settings.scope != "peak" and (settings.height or settings.width or settings.batch_size != 1):
        raise BitPolicyError("--height, --width and --batch-size describe the call of a peak; add --scope peak")
    return asked


def memory_of(settings: Settings) -> int | None:
    """`--probe-memory` in bytes.

    Raises:
        BitPolicyError: it is not a size.
    """
    return None if settings.probe_memory is None else read_bytes(settings.probe_memory, "--probe-memory")


def _require_steps(trajectories: Trajectories, call: Mapping[str, Any]) -> None:
    """Raises:
    BitPolicyError: more sampling steps than the noise schedule has.
    """
    scheduler: Any = getattr(trajectories.pipe, "scheduler", None)
    if not hasattr(scheduler, "alphas_cumprod"):  # in continuous time, as with flow matching, any number will do
        return
    steps, trained = call.get("num_inference_steps"), scheduler.config.get("num_train_timesteps")
    if isinstance(steps, int) and isinstance(trained, int) and steps > trained:
        raise BitPolicyError(
            f"num_inference_steps is {steps:,}; the pipeline's {type(scheduler).__name__} has "
            f"{trained:,} timesteps, give at most as many"
        )


def _require_formats_of(compute: Compute, formats: Sequence[Format]) -> None:
    """Raises:
    BitPolicyError: no candidate would ever be multiplied so.
    """
    multiplied = ROUNDED.get(compute, ())
    if multiplied and set(multiplied).isdisjoint(formats):
        names = ", ".join(format.name for format in formats)
        raise BitPolicyError(
            f"--compute {compute} rounds the inputs of layers in {' and '.join(f.name for f in multiplied)}, and the "
            f"candidates are {names}; add {multiplied[0].name} to --formats, or take --compute exact"
        )


def _scope(
    settings: Settings,
    source: Source,
    account: ByteAccount,
    trajectories: Trajectories,
    sample: Sample,
    formats: Sequence[Format],
) -> Scope:
    """What the budget covers; a peak takes one observed call."""
    if settings.scope == "weights":
        return Scope.of_weights(account, source.target.in_words)
    if settings.scope == "pipeline":
        return Scope.of_pipeline(account, sum(source.parts.others(source.storage).values()), source.target.in_words)
    size = {name: value for name in ("height", "width") if (value := getattr(settings, name)) is not None}
    call = {**trajectories.call, **size}
    peak = observe(source.pipe, source.components, call, sample, formats, settings.batch_size)
    return Scope.of_peak(peak, formats, source.target.in_words)


def warn_of_idle_arguments(
    trajectories: Trajectories, sample: Sample, given: Mapping[str, Any], stages: Stages
) -> None:
    """Say on stderr which arguments, but for the usual ones, change nothing; without others it takes no run."""
    names = [name for name in given if name not in BUNDLED_CALL]
    for name in trajectories.without_effect(sample, names) if names else ():
        stages.warn(
            f"the call argument {name}={given[name]} changes nothing: the images are the same without it; some "
            "arguments count only together, such as height and width"
        )


def default_call(pipe: DiffusionPipeline, bundled: bool) -> dict[str, Any]:
    """Arguments of the pipeline call where none are given: 20 steps, or fewer where the pipeline takes fewer by itself,
    as consistency models do."""
    if bundled:
        return dict(BUNDLED_CALL)
    signature = Signature.of(pipe)
    own = signature.defaults.get(STEPS)
    steps = min(own, DEFAULT_STEPS) if isinstance(own, int) else DEFAULT_STEPS
    return {STEPS: steps} if STEPS in signature else {}


def short_call(pipe: DiffusionPipeline) -> dict[str, Any]:
    """Arguments of a call that only shows which layers are called, and how."""
    return {STEPS: 2} if STEPS in Signature.of(pipe) else {}
