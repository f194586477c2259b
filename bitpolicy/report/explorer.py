"""The report's first section: the best policy at every size, to play with.

The points are exact solutions from the sensitivity table, and the folder's own policy. Additive errors E are converted
to decibels, and to a PSNR if one was measured for a policy of error E_0:

    psnr = psnr_0 - 10 log10(E / E_0)

explorer.js draws the data that this module writes into the page.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats.format import Format
from bitpolicy.kernels.formats.named import FP16
from bitpolicy.output_folder import read_result
from bitpolicy.pipelines.loading import BUNDLED
from bitpolicy.policies.choice import Choice
from bitpolicy.policies.policy import Policy
from bitpolicy.report.groups import running_order
from bitpolicy.report.inputs import Probed
from bitpolicy.report.page import Section, paragraph, table
from bitpolicy.report.policy_map import COLORS, bits_of
from bitpolicy.search.budget import readable
from bitpolicy.search.problem import Problem
from bitpolicy.sensitivity.table import NO_IMAGE_ERROR
from bitpolicy.workflow.compare import pairs_in
from bitpolicy.workflow.curve import Point, quick_points

POINTS = 40
_STEADY_DB = 40.0  # of several measured policies, the one nearest to this is extrapolated from
_LIGHT = ("#E69F00", "#56B4E9", "#CC79A7", "#009E73", "#C4C4C4")  # colours that need dark letters


@dataclass(frozen=True)
class Measured:
    """The measurement from which the PSNR of other policies is estimated.

    Attributes:
        psnr_db: of a policy's images, mean.
        error: the policy's additive error, > 0.
        what: the policy, and the samples, in words.
    """

    psnr_db: float
    error: float
    what: str

    def estimate(self, error: float | None) -> float | None:
        """PSNR in dB of a policy with this additive error; None if it is zero or unknown."""
        return self.psnr_db - 10 * math.log10(error / self.error) if error else None


def explorer(probed: Probed, folder: Path) -> Section:
    """The section "Explore sizes".

    Raises:
        BitPolicyError: the folder's policy is for other layers than the table, or a file is damaged.
    """
    own = _own(probed)
    curve = _curve(probed, own)
    measured = _measured(probed, own, folder)
    data = json.dumps(_data(probed, curve, own, measured, folder), separators=(",", ":"), allow_nan=False)
    ranked = probed.table.probe in NO_IMAGE_ERROR
    how = (
        "Scores rank the layers; they are no errors of the image."
        if ranked
        else "Its predicted error is the sum of its layers'."
    )
    lead = f"The best policy at each size, solved exactly from the sensitivity table. {how}"
    body = [
        paragraph(lead),
        '<div class="explorer"></div>',
        f"<noscript>{paragraph('The slider and the map need JavaScript. The same points as numbers:')}",
        f"{_numbers(probed, curve, measured)}</noscript>",
        '<script type="application/json">' + data.replace("<", "\\u003c") + "</script>",
    ]
    return Section("explore", "Explore sizes", "\n".join(body))


def asset(name: str) -> str:
    """The text of a file of this package, "explorer.js" or "explorer.css"."""
    return files(__package__).joinpath(name).read_text("utf-8").strip()


def _own(probed: Probed) -> Point | None:
    """The folder's policy as a point of the curve. Its error is unknown if the table lacks one of its formats."""
    if probed.policy is None:
        return None
    choices = probed.policy.resolve(layer.name for layer in probed.layers)
    formats = [choice.format for choice in choices.values()]
    known = all(format in (*probed.table.formats, FP16) for format in formats)
    error = probed.table.additive_error(formats) if known else None
    return Point(choices, probed.account.total(dict(zip(choices, formats, strict=True))), error)


def _curve(probed: Probed, own: Point | None) -> list[Point]:
    """The solved points and the folder's policy, smallest first."""
    formats = (*probed.table.formats, FP16)
    account = probed.account
    problem = Problem(probed.layers, formats, account, table=probed.table, budget=account.reference)
    solved = [p for p in quick_points(problem, account, POINTS) if own is None or p.choices != own.choices]
    return sorted([*solved, *([] if own is None else [own])], key=lambda point: point.nbytes)


def _measured(probed: Probed, own: Point | None, folder: Path) -> Measured | None:
    """The folder's policy if its PSNR is known, otherwise a policy of its frontier; None for sounds, whose closeness is
    no PSNR."""
    if "mel" in ((read_result(folder) or {}).get("quality") or {}):
        return None
    about = None if probed.policy is None else probed.policy.result
    if about is not None and about.psnr_db is not None and own is not None and own.error:
        what = f"the policy of this folder, {readable(own.nbytes)}, on held-out samples"
        return Measured(about.psnr_db, own.error, what)
    path = folder / "frontier" / "frontier.csv"
    rows = list(_frontier(path)) if path.is_file() else []
    return min(rows, key=lambda row: abs(row.psnr_db - _STEADY_DB), default=None)


def _frontier(path: Path) -> Iterable[Measured]:
    try:
        for row in csv.DictReader(io.StringIO(path.read_text("utf-8"))):
            if row["psnr_db"] and float(row["predicted_error"] or 0) > 0:
                what = f"frontier/{row['policy']}, {readable(int(row['bytes']))}, on the search samples"
                yield Measured(float(row["psnr_db"]), float(row["predicted_error"]), what)
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise BitPolicyError(f"cannot read {path}: {error}; run the same search again") from error


def _numbers(probed: Probed, curve: Sequence[Point], measured: Measured | None) -> str:
    """The points as a table, for readers without JavaScript."""
    account, rows = probed.account, []
    for point in curve:
        estimate = None if measured is None else measured.estimate(point.error)
        rows.append(
            (
                f"{point.nbytes:,}",
                f"{point.nbytes / account.reference:.1%}",
                f"{8 * point.nbytes / account.parameters:.2f}",
                "" if point.error is None else f"{point.error:.3g}",
                "" if estimate is None else f"{estimate:.1f}",
            )
        )
    return table(["bytes", "of FP16", "bits a parameter", "predicted error", "estimated PSNR, dB"], rows)


def _data(
    probed: Probed, curve: Sequence[Point], own: Point | None, measured: Measured | None, folder: Path
) -> dict[str, Any]:
    """What explorer.js draws, as JSON."""
    used = [choice.format for point in curve for choice in point.choices.values() if choice.format.packed]
    formats = list(dict.fromkeys([*probed.formats, *used, FP16]))
    choices = list(dict.fromkeys(choice for point in curve for choice in point.choices.values()))
    places, order = {choice: i for i, choice in enumerate(choices)}, running_order(probed.layers)
    start = curve.index(own) if own is not None else len(curve) // 2
    return {
        "measure": probed.measure,
        "reference": probed.account.reference,
        "parameters": probed.account.parameters,
        "formats": _format_records(formats),
        "choices": [_choice_record(choice, formats) for choice in choices],
        "layers": [_layer_record(probed, place, formats) for place in order],
        "points": [
            {
                "bytes": point.nbytes,
                "error": point.error,
                "psnr": None if measured is None else measured.estimate(point.error),
                "choices": [places[point.choices[probed.layers[place].name]] for place in order],
            }
            for point in curve
        ],
        "start": start,
        "own": None if own is None else start,
        "measured": None if measured is None else measured.what,
        "header": _header(probed),
        "command": _command(probed),
        "pairs": _pairs(folder / "compare.png"),
    }


def _format_records(formats: Sequence[Format]) -> list[dict[str, Any]]:
    """A colour for each width. Formats of the same width differ by a letter and by stripes."""
    records: list[dict[str, Any]] = []
    seen: dict[int, int] = {}
    for format in formats:
        bits = bits_of(format)
        place = seen[bits] = seen.get(bits, -1) + 1
        records.append(
            {
                "name": format.name,
                "letter": f"{bits}{chr(ord('a') + place) if place else ''}",
                "color": COLORS[bits],
                "ink": "#111" if COLORS[bits] in _LIGHT else "#fff",
                "striped": place,
                "packed": format.packed,
                "parameters": format.parameters(),
            }
        )
    return records


def _choice_record(choice: Choice, formats: Sequence[Format]) -> dict[str, Any]:
    bias = choice.bias_correction
    return {"format": formats.index(choice.format), "quantizer": choice.quantizer, "bias": bias}


def _layer_record(probed: Probed, place: int, formats: Sequence[Format]) -> dict[str, Any]:
    """One layer, with its bytes and error in every format; None where a format does not fit or was not probed."""
    layer = probed.layers[place]
    fitting = [format.fits(layer.shape) for format in formats]
    known = [fits and f in (*probed.table.formats, FP16) for f, fits in zip(formats, fitting, strict=True)]
    return {
        "name": layer.name,
        "role": layer.role,
        "stage": layer.stage,
        "shape": "×".join(map(str, layer.shape)),
        "parameters": math.prod(layer.shape),
        "bytes": [probed.layer_bytes(place, f) if fits else None for f, fits in zip(formats, fitting, strict=True)],
        "error": [probed.table.score(place, f) if there else None for f, there in zip(formats, known, strict=True)],
    }


def _header(probed: Probed) -> str | None:
    """The entries of a policy file that are the same for every point; None in a probe's folder, which does not say
    which model it is about."""
    policy = probed.policy
    if policy is None:
        return None
    fields: dict[str, Any] = {
        "bitpolicy": policy.bitpolicy,
        "model": policy.model.model_dump(mode="json", by_alias=True, exclude_none=True),
        "storage_dtype": policy.storage_dtype,
        "compute": probed.table.compute.value,
    }
    return yaml.safe_dump(fields, sort_keys=False, width=120)


def _command(probed: Probed) -> str:
    """The command that turns a downloaded policy into a checkpoint."""
    policy = probed.policy
    of = "" if policy is None or policy.model.id == BUNDLED else f" --model {shlex.quote(policy.model.id)}"
    compute = probed.table.compute.value
    under = "" if compute == Policy.model_fields["compute"].default else f" --compute {compute}"
    return f"search-policy{of} --policy policy.yaml{under} --output-dir out"


def _pairs(path: Path) -> list[tuple[str, str]]:
    """The reference's image and the policy's, for each column of compare.png."""
    return [(_inline(first), _inline(second)) for first, second in pairs_in(path)] if path.is_file() else []


def _inline(picture: Image.Image) -> str:
    out = io.BytesIO()
    picture.save(out, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode('ascii')}"
