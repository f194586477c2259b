"""The report of one folder: every section in its order, and the files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.policies.storage.atomic import write_text, written_aside
from bitpolicy.report import decisions, sections
from bitpolicy.report.chosen import chosen
from bitpolicy.report.drawing import Picture
from bitpolicy.report.inputs import Probed
from bitpolicy.report.lists import Lists, make_lists
from bitpolicy.report.page import Section, page
from bitpolicy.report.shares import Claim, claims
from bitpolicy.sensitivity.table import NO_IMAGE_ERROR


@dataclass(frozen=True)
class Report:
    """One report.

    Attributes:
        html: the page, pictures included.
        pictures: the same as files.
        claims: what was found of "INT4 is a bias, INT8 a noise"; empty without a split.
        lists: which layers may be INT4 at the budget; None where the probe's scores are no image error.
    """

    html: str
    pictures: tuple[Picture, ...]
    claims: tuple[Claim, ...]
    lists: Lists | None

    def save(self, page: Path, pictures: Path | None = None) -> None:
        """Write the page, and its pictures into a folder of their own if one is given, with layers.csv for the lists.

        Raises:
            BitPolicyError: as `require_free`.
        """
        require_free(page, pictures)
        if pictures is not None:
            for picture in self.pictures:
                with written_aside(pictures / f"{picture.name}.png") as aside:
                    aside.write_bytes(picture.png)
            if self.lists is not None:
                write_text(pictures / "layers.csv", self.lists.csv())
        write_text(page, self.html)


def require_free(page: Path, pictures: Path | None) -> None:
    """Check where a report should go, before it is drawn.

    Raises:
        BitPolicyError: a folder is where the page should go, or a file where the folder of pictures should.
    """
    if page.is_dir():
        raise BitPolicyError(f"--output {page} is a folder; name a file, e.g. {page / 'report.html'}")
    if pictures is not None and pictures.exists() and not pictures.is_dir():
        raise BitPolicyError(f"--pictures {pictures} is a file; give a folder")


def make_report(folder: Path, budget: str | None = None) -> Report:
    """Draw what `bitpolicy probe` or a search left in `folder`.

    Args:
        budget: what the lists of section "Never INT4" are for; default: that of the folder's policy, or 45% of FP16.

    Raises:
        BitPolicyError: there is no sensitivity table, a file is damaged, or the budget is not to be met.
    """
    probed = Probed.load(folder)
    lists = None if probed.table.probe in NO_IMAGE_ERROR else make_lists(probed, budget)
    found: list[Section] = [
        sections.overview(probed, folder),
        *([] if probed.policy is None else [chosen(probed, probed.policy, folder)]),
        sections.trust(probed, folder),
        sections.heat(probed, folder),
        sections.roles(probed),
        sections.composition(probed, folder),
        sections.sampler(probed, folder),
        sections.paths(probed),
        decisions.decisions(probed, lists, folder),
        decisions.worst(probed),
    ]
    title = f"Where quantization hurts: {probed.denoiser}"
    lead = (
        f"{len(probed.layers)} layers, each alone in {' and '.join(f.name.upper() for f in probed.formats)}: what that "
        f"does to the {probed.measure}, where in the sampling it enters, what the errors are made of, and which layers "
        "a budget should spare."
    )
    split = probed.split
    return Report(
        page(title, lead, found),
        tuple(picture for section in found for picture in section.pictures),
        () if split is None else tuple(claims(probed, split)),
        lists,
    )
