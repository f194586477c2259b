"""Most of the report's sections: what was measured, and how to read it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bitpolicy.check import TRUSTED_DB, Agreement, Check
from bitpolicy.kernels.kernel import Compute
from bitpolicy.report import charts
from bitpolicy.report.groups import Group, by_path, by_role, by_stage, inputs_share
from bitpolicy.report.heat_map import heat_map
from bitpolicy.report.inputs import Probed
from bitpolicy.report.page import Section, figure, folded, heading, missing, paragraph, table
from bitpolicy.report.shares import (
    AS_IT_WAS,
    CORRECTED,
    claims,
    correction_sentence,
    layer_medians,
    roles_sentence,
    shares_by_role,
)
from bitpolicy.report.steps import amplification, coherence, entering
from bitpolicy.search.budget import readable
from bitpolicy.sensitivity.probes.error_split import ErrorSplit
from bitpolicy.workflow.decision import in_words

BIASES = ((AS_IT_WAS, "uncorrected"), (CORRECTED, "corrected"))


def overview(probed: Probed, folder: Path) -> Section:
    """What was probed, how, and at what cost."""
    found, account = probed.table, probed.account
    sizes = [("all FP16", account.reference)]
    sizes += [(f"all {f.name.upper()}", probed.nbytes(f)) for f in reversed(probed.formats)]
    how = [found.probe]
    if found.sketches is not None:
        how.append(f"{len(found.sketches)} sketches")
    if probed.split is not None:
        how.append(f"{len(probed.split.error[0]) - 1 - probed.lead} sampling steps")
    if found.measured is not None:
        how.append(f"{int(found.measured.sum())} of {found.error.numel()} scores re-measured by ablation")
    chosen = probed.policy.provenance.get("search") if probed.policy else None
    largest = ", ".join(
        f"{group.name} {group.share[probed.column(probed.formats[0])]:.0%}" for group in by_role(probed)[:3]
    )
    rows = [
        ("model", probed.denoiser),
        ("layers", f"{len(probed.layers)}, {account.parameters:,} parameters in all"),
        ("bytes", "; ".join(f"{name} {nbytes:,} ({readable(nbytes)})" for name, nbytes in sizes)),
        ("probe", ", ".join(how)),
        *_compute_row(probed),
        ("cost", str(found.cost) if found.cost is not None else "not recorded; `bitpolicy probe` records it"),
        (f"most error, {probed.formats[0].name}", largest),
        *([("policy", in_words(chosen))] if chosen else []),
        ("folder", str(folder)),
    ]
    return Section("what", "What was probed", table(["", ""], rows))


def _compute_row(probed: Probed) -> list[tuple[str, str]]:
    """What packed layers round in addition to their weights, and the effect of that."""
    if probed.table.compute is Compute.EXACT:
        return []
    shares = inputs_share(probed, range(len(probed.layers)))
    if shares is None:
        return [("compute", f"{probed.table.compute}: inputs of packed layers are also rounded")]
    parts = ", ".join(f"{shares[probed.column(f)]:.0%} of the summed {f.name} error" for f in probed.formats)
    return [("compute", f"{probed.table.compute}: rounding the inputs of packed layers causes {parts}")]


def trust(probed: Probed, folder: Path) -> Section:
    """Predicted compared with measured error."""
    title = "Can the numbers be trusted?"
    if probed.check is None:
        command = probed.command("--check", folder)
        return Section("trust", title, missing("This folder has no comparison with real trajectories.", command))
    rows = [_agreement_row(a) for a in probed.check.agreements()]
    columns = ["predicted against measured", "pairs", "Spearman", "median predicted / measured", "within a factor of 2"]
    drawn = charts.agreement(probed, probed.check)
    caption = (
        f"Error of the {probed.measure}, E|dx₀|² / E|x₀|²: predicted by the probe (vertical), and measured by "
        "quantizing and running the real trajectory on the same samples and seeds (horizontal). Solid line: equal; "
        "dashed: a factor of 2. A policy's prediction adds the layers' errors as powers, or their sketches as vectors. "
        f"Other images are those with a PSNR of {TRUSTED_DB:g} dB or less: they no longer show the same picture, and a "
        "first-order prediction means nothing there."
    )
    body = [table(columns, rows), paragraph(_null(probed.check)), figure(drawn, caption)]
    return Section("trust", title, "\n".join(body), (drawn,))


def _agreement_row(a: Agreement) -> tuple[str, str, str, str, str]:
    rank = "undefined" if a.spearman is None else f"{a.spearman:.3f}"
    return (a.what, str(a.n), rank, f"{a.median_ratio:.2f}", f"{a.within_2x:.0%}")


def _null(check: Check) -> str:
    null = check.policies[0]
    exact = null.predicted == null.measured == 0
    return (
        f"The policy that quantizes nothing is predicted at {null.predicted:g} and measured at {null.measured:g}"
        f"{', as it must be' if exact else '; both should be 0'}. Measuring took {check.forwards:,} denoiser forwards."
    )


def heat(probed: Probed, folder: Path) -> Section:
    """Error by layer and step."""
    title = "Every layer at every step"
    split = probed.split
    if split is None:
        command = probed.command("--split", folder)
        return Section("heat", title, missing("This folder has no errors by step.", command))
    drawn = heat_map(probed, split)
    caption = (
        "Each row is a layer, in the model's order with the middle block between encoder and decoder; the grey marks "
        f"show its role. Each column is a sampling step. Colour: the error of the {probed.measure} that enters at that "
        "step alone, with only this layer quantized and the better of its two biases, on a logarithmic scale; white: "
        "no error. Steps may add up or cancel, so a row's sum is not the layer's error."
        + (
            " Column 0 is the effect of models outside the loop, before its first step or after its last."
            if probed.lead
            else ""
        )
    )
    return Section("heat", title, figure(drawn, caption), (drawn,))


def roles(probed: Probed) -> Section:
    """Sums and medians of the groups."""
    drawn = charts.by_group(probed)
    caption = (
        f"Error of the {probed.measure} with one layer quantized at a time. Left: summed over the layers of a role or "
        "stage; right: for the median layer. In brackets: the number of layers. Sums are additive predictions. The "
        "axis is logarithmic, so only the end of a bar counts."
    )
    body = [figure(drawn, caption)]
    for what, groups in (("role", by_role(probed)), ("stage", by_stage(probed))):
        columns = [what, "layers", *_group_columns(probed)]
        body.append(folded(f"The numbers by {what}", table(columns, [_group_row(probed, g) for g in groups])))
    return Section("roles", "Which roles and stages", "\n".join(body), (drawn,))


def _group_columns(probed: Probed) -> list[str]:
    words = ("sum", "median", "share of all", *(["from inputs"] if probed.table.inputs is not None else []))
    return ["bytes at FP16", *(f"{f.name} {word}" for f in probed.formats for word in words)]


def _group_row(probed: Probed, group: Group) -> list[str]:
    row = [group.name, str(len(group.members)), f"{group.nbytes:,}"]
    for format in probed.formats:
        column = probed.column(format)
        row += [f"{group.total[column]:.2e}", f"{group.median[column]:.2e}", f"{group.share[column]:.1%}"]
        row += [] if group.inputs is None else [f"{group.inputs[column]:.1%}"]
    return row


def composition(probed: Probed, folder: Path) -> Section:
    """Bias, scale and noise."""
    title = "Bias or noise"
    split = probed.split
    if split is None:
        command = probed.command("--split", folder)
        return Section("bias", title, missing("This folder does not say what the errors consist of.", command))
    drawn = charts.composition(probed, split)
    caption = (
        "What a role's summed error consists of, largest role first. Scale: the part along the picture itself. Bias: "
        "the part of the rest that is the same for every picture. Noise: what is left. Measured to first order by "
        "backward passes along directions that all samples share, and along each sample's own latent. Only pairs of "
        "different samples count, so that the mean of a few samples is not mistaken for a bias."
    )
    body = [paragraph(str(claim), "verdict") for claim in claims(probed, split)]
    body += [paragraph(roles_sentence(probed, split)), paragraph(correction_sentence(probed, split))]
    body += [figure(drawn, caption), *_measured_bias(probed, split)]
    rows = [
        [f"{f.name}, {label}", name, *(f"{part:.0%}" for part in found.parts)]
        for f in probed.formats
        for corrected, label in BIASES
        for name, found in {
            **shares_by_role(probed, split, corrected, probed.column(f)),
            "median layer": layer_medians(split, corrected, probed.column(f)),
        }.items()
    ]
    numbers = table(["format, bias", "layers", "bias", "scale", "noise"], rows)
    return Section("bias", title, "\n".join([*body, folded("The numbers by role", numbers)]), (drawn,))


def _measured_bias(probed: Probed, split: ErrorSplit) -> list[str]:
    """The mean over samples of measured errors, compared with what the split says about it."""
    check = probed.check
    if check is None:
        return []
    rows = []
    for format in probed.formats:
        column = probed.column(format)
        measured = np.asarray(check.measured)[:, column]
        seen = float((measured * np.asarray(check.bias)[:, column]).sum() / max(measured.sum(), np.finfo(float).tiny))
        mean, error = (probed.better_bias(part)[0, :, column].double().sum() for part in (split.mean, split.error))
        rows.append((f"{format.name}, layers one by one", f"{seen:.0%}", f"{float(mean / error):.0%}"))
    trusted = [p.bias for p in check.policies[1:] if p.psnr_db is not None and p.psnr_db > TRUSTED_DB]
    if trusted:
        rows.append((f"median of {len(trusted)} random policies", f"{np.median(trusted):.0%}", ""))
    what = (
        "The same from real trajectories: the mean error over samples as a share of the error (including the scale's "
        "part of that mean), with the better of each layer's two biases."
    )
    return [heading("Measured"), paragraph(what), table(["", "measured", "from the split"], rows)]


def sampler(probed: Probed, folder: Path) -> Section:
    """Amplification, entry and coherence."""
    title = "What the sampler does to the errors"
    split = probed.split
    if split is None:
        command = probed.command("--split", folder)
        return Section("sampler", title, missing("This folder has no errors by step.", command))
    if not probed.in_loop:
        return Section("sampler", title, paragraph("The sampling loop calls none of the studied layers."))
    drawn = charts.through_the_sampler(probed, split)
    caption = (
        "Amplification is the size of the final latent's error divided by the size of the error of the denoiser's "
        "output that caused it, |dx₀| / |deₜ|. Above 1, the rest of the sampling enlarges the error; below 1, it "
        "shrinks it. Error entering: as in the heat map, summed over the layers of a stage."
    )
    body = [paragraph(_amplification_sentence(probed, split), "verdict"), paragraph(_entry_sentence(probed, split))]
    body += [figure(drawn, caption), *_coherence(probed, split)]
    return Section("sampler", title, "\n".join(body), (drawn,))


def _amplification_sentence(probed: Probed, split: ErrorSplit) -> str:
    values = amplification(probed, split, probed.column(probed.formats[0]))
    early, peak = float(values[0]), int(values.argmax())
    grown = [f"{'grows' if values[i] > 1 else 'shrinks'}" for i in (0, peak)]
    return (
        f"An error of the denoiser's output at the first step {grown[0]} to {early:.2g} times its size in the final "
        f"latent (median layer, {probed.formats[0].name}); the largest factor, {values[peak]:.2g}, is at step "
        f"{peak + 1} of {len(values)}."
    )


def _entry_sentence(probed: Probed, split: ErrorSplit) -> str:
    said = []
    for format in probed.formats:
        values = entering(probed, split, probed.column(format))
        last = max(1, round(len(values) / 10))
        share = values[-last:].sum() / max(values.sum(), np.finfo(float).tiny)
        said.append(f"{share:.0%} of {format.name.upper()}'s error enters in the last {last} of {len(values)} steps")
    return f"Summed over steps and layers, {', '.join(said)}."


def _coherence(probed: Probed, split: ErrorSplit) -> list[str]:
    rows = []
    for format in probed.formats:
        for corrected, label in BIASES:
            row = [f"{format.name}, bias {label}"]
            for part in (split.error, split.bias, split.noise):
                found = coherence(part[corrected, ..., probed.column(format)])
                row.append("" if found is None else f"{found.found:.2f} of {found.limit:.2f} ({found.agreement:.0%})")
            rows.append(row)
    what = (
        "Power of the whole error divided by the sum of the powers that enter at each step. It is 1 if the steps are "
        "independent, and the second number if all steps, at their given sizes, push in the same direction. In "
        "brackets: how far the value is from the one towards the other. A bias that the sampler accumulates step by "
        "step would be near 100%."
    )
    return [
        heading("Do the steps add up?"),
        paragraph(what),
        table(["", "whole error", "its bias", "its noise"], rows),
    ]


def paths(probed: Probed, folder: Path) -> Section:
    """Encoder, skips and decoder."""
    title = "Encoder, skips and decoder"
    if not probed.unet:
        why = "This denoiser has no encoder and decoder: there is nothing to compare."
        return Section("skips", title, paragraph(why))
    if probed.split is None:
        command = probed.command("--split", folder)
        return Section("skips", title, missing("This folder has no errors by step.", command))
    drawn = charts.skips(probed, probed.split)
    caption = (
        "Layers that write into a skip are the first convolution and, in the encoder, the last layer of each resnet, "
        "shortcuts, output projections of attention, and downsamplers: their output is copied to the decoder. Left: "
        "the error of each layer alone. Then: the error that enters at each step for the mean layer, and the error of "
        "the denoiser's own output at that step for the median layer, before the sampler acts on it."
    )
    body = [paragraph(_paths_sentence(probed)), figure(drawn, caption)]
    columns = ["layers", "number", *_group_columns(probed)]
    body.append(folded("The numbers", table(columns, [_group_row(probed, g) for g in by_path(probed)])))
    return Section("skips", title, "\n".join(body), (drawn,))


def _paths_sentence(probed: Probed) -> str:
    """The median layer of each place, relative to the decoder's."""
    said = []
    for format in probed.formats:
        column = probed.column(format)
        groups = {group.name: float(group.median[column]) for group in by_path(probed)}
        decoder = groups.pop("decoder")
        groups.pop("ends", None)
        ratios = ", ".join(f"{value / decoder:.2g} ({name})" for name, value in groups.items() if decoder > 0)
        said.append(f"in {format.name.upper()} {ratios}")
    return f"Error of the median layer, relative to the median decoder layer: {'; '.join(said)}."
