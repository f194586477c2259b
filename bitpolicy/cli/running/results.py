"""What the commands print: tables for people, or one JSON object."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from bitpolicy.cli.running.tables import print_table
from bitpolicy.kernels.names import DEFAULT_FORMATS
from bitpolicy.search.budget import readable

_COMPUTES = {
    "int8": "int8: inputs of packed layers are also rounded",
    "fp8": "fp8: inputs of layers in fp8 and fp8-tensor are also rounded",
    "mxfp8": "mxfp8: inputs of layers in mxfp8 and mxfp4 are also rounded",
    "nvfp4": "nvfp4: inputs of layers in nvfp4 are also rounded",
}
LOADING = 'import bitpolicy\npipe = bitpolicy.load_pipeline("{folder}")'
_TITLES = {"mel": "held-out mel distance"}
_PRIVATE = ("roles",)  # in result.json and the table, not in --json


def print_json(result: Mapping[str, Any]) -> None:
    """Print strict JSON: no NaN, no Infinity."""
    print(json.dumps({k: v for k, v in result.items() if k not in _PRIVATE}, allow_nan=False))


def print_result(result: Mapping[str, Any]) -> None:
    """Print the final tables of a search."""
    console = Console()
    folder = result["output_dir"]
    if result.get("frontier"):
        print_table(_curve(result["frontier"], result["reference_bytes"]))
        for line in _empty_columns(result["frontier"]):
            console.print(line, soft_wrap=True, highlight=False)
        console.print(f"{folder}/frontier has the policies, frontier.csv and frontier.png", soft_wrap=True)
    if "policy_bytes" not in result:
        return
    print_table(_bytes_and_quality(result))
    if result.get("roles"):
        print_table(_layers(result["roles"], list(result["layers"])))
    shown = "shows the images"
    if "mel" in result.get("quality", {}):
        shown = f"shows the sounds, {folder}/compare-sounds has some to listen to"
    console.print(
        f"{folder}/compare.png {shown}, {folder}/policy.yaml has every choice; load {folder}/checkpoint with",
        soft_wrap=True,
    )
    for line in LOADING.splitlines():
        console.print("  " + line.format(folder=f"{folder}/checkpoint"), soft_wrap=True, highlight=False)
    if "study" in result:
        console.print(f"the study: {result['study']}", soft_wrap=True, highlight=False)
    if set(result["layers"]) == set(DEFAULT_FORMATS) and result["psnr_db"]["mean"] is not None:
        console.print(
            "--formats all chooses among all widths from 2 to 8 bits: closer images in the same bytes, but it takes a "
            "few times as long",
            soft_wrap=True,
        )


def _curve(points: list[list[Any]], reference: int) -> Table:
    table = Table("bytes", "of FP16", "predicted error", "PSNR", title="frontier", title_justify="left")
    for nbytes, error, psnr in points:
        predicted = "" if error is None else f"{error:.3g}"
        table.add_row(f"{nbytes:,}", f"{nbytes / reference:.1%}", predicted, "" if psnr is None else f"{psnr:.2f} dB")
    return table


def _empty_columns(points: list[list[Any]]) -> list[str]:
    """Why a column of the curve is empty."""
    said = []
    if all(error is None for _, error, _ in points):
        said.append("no predicted error: this probe's scores are not image errors; --probe adjoint predicts them")
    if all(psnr is None for *_, psnr in points):
        said.append("no PSNR: --trials 0 draws no images; with more trials, it is measured on real images")
    return said


def _bytes_and_quality(result: Mapping[str, Any]) -> Table:
    table = Table(show_header=False, title="bitpolicy", title_justify="left")
    share = result["policy_bytes"] / result["reference_bytes"]
    same = "equal" if result["policy_bytes"] == result["checkpoint_bytes"] else "NOT EQUAL"
    psnr, sounds = result["psnr_db"], "mel" in result.get("quality", {})
    quality = f"mean {psnr['mean']:.2f} dB, worst {psnr['min']:.2f} dB" if psnr["mean"] is not None else "all identical"
    same_images = f", {psnr['identical']} identical" if psnr["identical"] else ""
    error = result["predicted_error"]
    rows = [
        ("asked", result.get("target") or f"{result['budget_bytes']:,} bytes ({readable(result['budget_bytes'])})"),
        ("predicted", f"{result['policy_bytes']:,} bytes, {share:.1%} of FP16's {result['reference_bytes']:,}"),
        ("on disk", f"{result['checkpoint_bytes']:,} bytes ({same})"),
        ("layers", ", ".join(f"{count} {name}" for name, count in result["layers"].items())),
        *([("chosen", result["chosen"])] if "chosen" in result else []),
        (
            f"predicted {result.get('error_of', 'latent')} error",
            "not predicted" if error is None else f"{error:.3g} (relative power)",
        ),
        *([("there", there)] if (there := _there(result.get("given_policy"))) else []),
        *([("compute", words)] if (words := _COMPUTES.get(result.get("compute", ""))) else []),
        *([] if sounds else [("held-out PSNR", f"{quality} over {psnr['n']} images{same_images}")]),
        *([(result["uniform"]["name"], _uniform(result["uniform"]))] if "uniform" in result else []),
        *((_TITLES.get(name, name), _one_line(found)) for name, found in result.get("quality", {}).items()),
        ("seconds", ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in result["seconds"].items())),
    ]
    for row in rows:
        table.add_row(*row)
    return table


def _uniform(found: Mapping[str, Any]) -> str:
    """The best uniform format, on the images of compare.png."""
    kind, things = ("mel_db", "sounds") if "mel_db" in found else ("psnr_db", "images")
    one, own = (_mean_db(found[key]) for key in (kind, f"policy_{kind}"))
    larger = " (larger: no single format fits)" if found["larger"] else ""
    count = found["psnr_db"]["n"]
    return f"{found['policy_bytes']:,} bytes{larger}: {one}; this policy has {own} on these {count} {things}"


def _there(given: Mapping[str, Any] | None) -> str:
    """The quality that a given policy has in the model that it was made for."""
    if given is None or given["psnr_db"] is None:
        return ""
    return f"the policy has {given['psnr_db']:.2f} dB in {given['model']}"


def _mean_db(psnr: Mapping[str, Any]) -> str:
    if psnr["mean"] is None:
        return "identical"
    return f"mean {psnr['mean']:.2f} dB" if "min" in psnr else f"mean {psnr['mean']:.3g} dB"


def _one_line(found: Mapping[str, Any]) -> str:
    """One measure of quality."""
    if "to_reference" in found:
        return f"{found['to_reference']:.4g} to the reference's images"
    if found["mean"] is None:
        return "all identical"
    if found.get("unit"):
        return f"mean {found['mean']:.3g} {found['unit']}, worst {found['worst']:.3g} {found['unit']}"
    return f"mean {found['mean']:.6g}, worst {found['worst']:.6g}"


def _layers(roles: Mapping[str, Mapping[str, int]], formats: list[str]) -> Table:
    table = Table("role", *formats, title="layers by role and format", title_justify="left")
    for role, counts in roles.items():
        table.add_row(role, *(str(counts.get(name, "")) for name in formats))
    return table
