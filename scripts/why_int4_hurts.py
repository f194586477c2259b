"""Why INT4 costs a language model little and a diffusion U-Net much: one experiment over small trained models.

    python scripts/why_int4_hurts.py                                   every part on every model
    python scripts/why_int4_hurts.py uniform --images 64               one part
    python scripts/why_int4_hurts.py rules --models scripts/trained/mmdit
    python scripts/why_int4_hurts.py uniform --formats nvfp4 mxfp4 int4-g32 --compute nvfp4 --roundings nearest

    uniform     all layers in one format: errors of one call, of the latents and of the image, and their bias
    injected    what blocks and normalizations do to an error that is put in
    operators   convolutions against linear layers, at weight errors of the same relative size
    forgetting  whether the sampler amplifies or forgets an error
    iteration   other numbers of steps, other guidance
    rules       rules of thumb against the exact solution at the same bytes
    lists       layers that are never INT4, and layers that are free at INT4, by role
    prior       how well the layers' roles, stages and shapes alone choose, learned from the other models
    language    the same formats in a small GPT
    bundled     layer by layer, in the bundled pipeline only

Each part writes a Markdown table and JSON to --work. If it is interrupted, the same command continues it.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peers.entry import ROOT
from why.bundled import bundled
from why.injected import denoiser_blocks, operators
from why.language import language, language_blocks, language_operators
from why.lists import lists, prior, whole_prior
from why.rules import rules
from why.sampler import forgetting, iteration
from why.subjects import EVERY, FORMATS, Rows, Subject
from why.uniform import ROUNDINGS, Wanted, uniform

from bitpolicy.kernels.kernel import Compute
from bitpolicy.policies.measured_compute import MEASURED

LANGUAGE = ROOT / "scripts" / "trained" / "gpt"
Part = Callable[[argparse.Namespace, Rows], None]


def each_model(measure: Callable[[Subject, argparse.Namespace], Iterator[dict[str, Any]]]) -> Part:
    """A part that measures all rows of one model after another and keeps those of finished models."""

    def part(args: argparse.Namespace, kept: Rows) -> None:
        for folder in args.models:
            subject = Subject(folder.resolve(), args.work / folder.name)
            if not kept.has(model=subject.name):
                for row in [*measure(subject, args)]:
                    kept.add({"model": subject.name, **row})

    return part


def of_uniform(args: argparse.Namespace, kept: Rows) -> None:
    wanted = Wanted(tuple(args.roundings), Compute(args.compute), args.images)
    for folder in args.models:
        subject = Subject(folder.resolve(), args.work / folder.name, tuple(args.formats))
        done = {(row["format"], row["rounding"]) for row in kept.rows if row["model"] == subject.name}
        if not done.issuperset(itertools.product(subject.formats, wanted.roundings)):
            for row in uniform(subject, wanted, lambda *key, done=done: key in done):
                kept.add({"model": subject.name, **row})


def of_language(args: argparse.Namespace, kept: Rows) -> None:
    if not kept.rows:
        for row in language(LANGUAGE, FORMATS):
            kept.add({"model": LANGUAGE.name, **row})


def of_blocks(args: argparse.Namespace, kept: Rows) -> None:
    each_model(lambda subject, _: iter([denoiser_blocks(subject)]))(args, kept)
    if LANGUAGE.is_dir() and not kept.has(model=LANGUAGE.name):
        kept.add({"model": LANGUAGE.name, **language_blocks(LANGUAGE)})


def of_prior(args: argparse.Namespace, kept: Rows) -> None:
    subjects = [Subject(folder.resolve(), args.work / folder.name) for folder in args.models]
    kept.rows.clear()
    for row in prior(subjects):
        kept.add(row)
    print(json.dumps(whole_prior(subjects).coefficients, indent=4))  # sensitivity/probes/prior.py has them


def of_operators(args: argparse.Namespace, kept: Rows) -> None:
    each_model(lambda subject, _: iter(operators(subject)))(args, kept)
    if LANGUAGE.is_dir() and not kept.has(model=LANGUAGE.name):
        kept.add({"model": LANGUAGE.name, **language_operators(LANGUAGE)})


PARTS: dict[str, Part] = {
    "uniform": of_uniform,
    "injected": of_blocks,
    "operators": of_operators,
    "forgetting": each_model(lambda subject, _: iter([forgetting(subject)])),
    "iteration": each_model(lambda subject, _: iteration(subject)),
    "rules": each_model(lambda subject, args: rules(subject, args.images)),
    "lists": each_model(lambda subject, args: lists(subject, args.work / "lists")),
    "prior": of_prior,
    "language": of_language,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", default=[*PARTS, "bundled"], help="default: all")
    parser.add_argument("--models", type=Path, nargs="+", default=EVERY, help="pipeline folders")
    parser.add_argument("--images", type=int, default=32, help="uniform, rules: number of held-out images")
    parser.add_argument("--formats", nargs="+", default=FORMATS, help="uniform: names of formats")
    parser.add_argument("--roundings", nargs="+", choices=ROUNDINGS, default=ROUNDINGS, help="uniform")
    parser.add_argument(
        "--compute", choices=[c.value for c in MEASURED], default="exact", help="uniform: activation quantization"
    )
    parser.add_argument("--work", type=Path, default=Path("build/why-int4-hurts"), help="folder for probes and results")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if unknown := {*args.parts} - {*PARTS, "bundled"}:
        parser.error(f"no part is named {', '.join(sorted(unknown))}; choose from {', '.join([*PARTS, 'bundled'])}")
    torch.set_num_threads(args.threads)
    for name in args.parts:
        if name == "bundled":
            bundled(args.work / "bundled")
            continue
        images = f"-{args.images}" if name in ("uniform", "rules") else ""
        images += f"-{args.compute}" if name == "uniform" and args.compute != "exact" else ""
        kept = Rows(args.work / f"{name}{images}.json")
        PARTS[name](args, kept)
        kept.path.with_suffix(".md").write_text(kept.table() + "\n")


if __name__ == "__main__":
    main()
