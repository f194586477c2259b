"""What a user does with the files that bitpolicy wrote, and the resulting values."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ordeals.artefacts import Artefacts, without_times
from ordeals.commands import files_in
from ordeals.judge import KnownDifference, Mistake, Values
from ordeals.values import digest, loaded, tensors_digest


def command_values(arguments: Sequence[str]) -> str:
    """Run a command line in this process and return its stdout.

    Raises:
        Mistake: it ended with exit code 2 and one line.
        RuntimeError: it failed in another way.
    """
    from bitpolicy.cli import main

    out, err = io.StringIO(), io.StringIO()
    sys.argv = ["bitpolicy", *arguments]
    code: Any = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main.main()
        except SystemExit as ended:
            code = ended.code
    lines = [line for line in err.getvalue().splitlines() if not line.startswith("warning: ")]
    if code == 2 and len(lines) == 1 and lines[0].startswith("bitpolicy: ") and not out.getvalue():
        raise Mistake(lines[0])
    if code:
        raise RuntimeError(f"exit code {code}, stdout {out.getvalue()[:200]!r}, stderr {err.getvalue()[-1000:]!r}")
    return out.getvalue()


def evaluated(made: Artefacts, folder: Path) -> Values:
    return {"psnr": command_values(made.evaluate(folder))}


def inspected(folder: Path) -> Values:
    return {"layers": json.dumps(json.loads(command_values(["inspect", str(folder), "--json"]))["layers"])}


def policy_values(path: Path, names: Sequence[str], whole: Path) -> Values:
    """The choice of a policy file for each layer.

    Raises:
        KnownDifference: the policy differs from that of `whole`, and an independent reader reads it the same way.
    """
    from bitpolicy import Policy

    found, before = _choices(Policy.load(path), names), _choices(Policy.load(whole), names)
    if found != before and found == _read_independently(path, names):
        raise KnownDifference("another valid policy, read exactly as written")
    return found


def _choices(policy: Any, names: Sequence[str]) -> dict[str, str]:
    choices = policy.resolve(names)
    found = {name: f"{c.format.name} {c.quantizer} {c.bias_correction}" for name, c in choices.items()}
    return {**found, "storage": policy.storage_dtype, "compute": policy.compute, "model": str(policy.model)}


def _read_independently(path: Path, names: Sequence[str]) -> dict[str, str]:
    """The same values, read with PyYAML alone, for a policy without rules."""
    import yaml

    from bitpolicy.policies.policy_records import ModelReference

    data = yaml.safe_load(path.read_text())
    found = {"storage": data.get("storage_dtype") or "float16", "compute": data.get("compute") or "exact"}
    found["model"] = str(ModelReference.model_validate(data["model"]))
    for name in names:
        usual = {"format": "fp16", "quantizer": "rtn", "bias_correction": False}
        for entry in (data.get("defaults") or {}, (data.get("layers") or {}).get(name) or {}):
            usual |= {key: value for key, value in entry.items() if value is not None}
        packed = usual["format"] != "fp16"
        found[name] = (
            f"{usual['format']} {usual['quantizer'] if packed else 'rtn'} {packed and usual['bias_correction']}"
        )
    return found


def calibration_values(path: Path, names: Sequence[str]) -> Values:
    """The calibration that an export would read next to the policy."""
    from bitpolicy import Policy
    from bitpolicy.policies.storage.calibration_file import calibration_of

    policy = Policy.load(path)
    calibration = calibration_of(policy, None, policy.resolve(names).values())
    return {"calibration": tensors_digest(dict(calibration.tensors()))}


def exported(made: Artefacts, folder: Path, out: Path) -> Values:
    """The checkpoint exported with the policy and the calibration in `folder`."""
    command_values(
        ["export", "--policy", str(folder / "policy.yaml"), "--model", str(made.toy), "--output-dir", str(out)]
    )
    return {name: digest(data) for name, data in files_in(out).items() if name.endswith(".safetensors")}


def source_exported(made: Artefacts, folder: Path, out: Path) -> Values:
    """The checkpoint that the policy makes from a damaged pipeline.

    Raises:
        KnownDifference: the policy's denoiser is intact; the pipeline's other files are the user's own.
    """
    command_values(
        ["export", "--policy", str(made.run / "policy.yaml"), "--model", str(folder), "--output-dir", str(out)]
    )
    found, whole = files_in(out), files_in(made.run / "checkpoint")
    same = [found.get(name) == data for name, data in whole.items() if name.startswith("unet/")]
    if all(same) and any(found.get(name) != data for name, data in whole.items() if name.endswith(".safetensors")):
        raise KnownDifference("another pipeline around the same denoiser")
    return {name: digest(data) for name, data in found.items() if name.endswith(".safetensors")}


def probed(folder: Path) -> Values:
    """Everything that a report would read."""
    from bitpolicy.report.inputs import Probed

    held = Probed.load(folder)
    if held.split is None or held.check is None:
        raise KnownDifference("a probe without --split or --check, because their files are missing")
    found = {
        "model": str(held.model),
        "check": str(held.check),
        "policy": "" if held.policy is None else held.policy.to_yaml(),
    }
    for name, part in (("table", held.table), ("split", held.split)):
        for field, value in sorted(vars(part).items()) if part is not None else ():
            found[f"{name} {field}"] = tensors_digest({field: value}) if hasattr(value, "numpy") else str(value)
    return found


def reported(folder: Path) -> Values:
    said = json.loads(command_values(["report", str(folder), "--json"]))
    probed(folder)
    del said["report"]
    page = (folder / "report.html").read_bytes().replace(str(folder).encode(), b"")  # contains its folder
    return {"report": json.dumps(said), "page": digest(page)}


def resumed(made: Artefacts, folder: Path, reset: bool) -> Values:
    """The result of running the same search again. With `reset` its results are removed first, so that it resumes."""
    if reset:
        for name in ("result.json", "policy.yaml"):
            if not (folder / name).is_dir():
                (folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder / "checkpoint", ignore_errors=True)
    said = command_values(made.search(folder))
    found = {"result": json.dumps(without_times(said), sort_keys=True)}
    if reset:
        held = files_in(folder)
        names = [n for n in held if n.startswith("checkpoint/") or n in ("policy.yaml", "calibration.safetensors")]
        found |= {name: digest(held[name]) for name in names}
    return found


def piece_values(path: Path, whole: Path) -> Values:
    """Whether a piece of a probe is read as it was written, or counts as missing and is made again."""
    from bitpolicy.sensitivity.records import Records
    from bitpolicy.sensitivity.rounding.kept_rounding import is_whole

    original = Records(whole.parent).get(whole.stem)
    if original is None:
        from safetensors import safe_open

        with safe_open(whole, "pt") as file:
            keys = set(file.keys()) - {"checksum"}
            if not is_whole(path, keys):
                return {"piece": "is made again, or is as it was"}
            with safe_open(path, "pt") as other:
                same = all(other.get_tensor(key).equal(file.get_tensor(key)) for key in keys)
        return {"piece": "is made again, or is as it was" if same else "other tensors"}
    found = Records(path.parent).get(path.stem)
    same = found is None or tensors_digest(found) == tensors_digest(original)
    return {"piece": "is made again, or is as it was" if same else "other tensors"}


def computed(cache: Path, checkpoint: Path) -> Values:
    """The picture drawn with the kernels of a cache, and whether the choice between two kernels is a known one."""
    import torch

    from bitpolicy.kernels import micro_probe
    from bitpolicy.kernels.cpu import extension as cpu_extension
    from bitpolicy.kernels.kernel import Compute

    os.environ["BITPOLICY_CACHE"] = str(cache)
    cpu_extension.library()
    tried = dict.fromkeys(("one", "other"), lambda: torch.ones(2, 2) @ torch.ones(2, 2))
    taken = [micro_probe.fastest(call, tried, Compute.EXACT, tried["one"]) for call in ("a", "b")]
    known = all(name in tried for name in taken)
    return {**loaded(checkpoint), "kernels": "known" if known else str(taken)}
