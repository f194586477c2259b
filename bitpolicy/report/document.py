"""The report of one folder: all sections in order, and the files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.policies.storage.atomic import write_text, written_aside
from bitpolicy.report import decisions, sections
from bitpolicy.report.chosen import chosen
from bitpolicy.report.drawing import Picture
from bitpolicy.report.explorer import asset, explorer
from bitpolicy.report.inputs import Probed
from bitpolicy.report.lists import Lists, make_lists
from bitpolicy.report.page import Section, page
from bitpolicy.report.shares import Claim, claims
from bitpolicy.sensitivity.table import NO_IMAGE_ERROR


@dataclass(frozen=True)
class Report:
    """One report.

    Attributes:
        html: the page, including its pictures.
        pictures: the same pictures as files.
        claims: the verdicts on "INT4 is a bias, INT8 a noise"; empty without a split.
        lists: which layers may be INT4 at the budget; None if the probe's scores are not image errors.
    """

    html: str
    pictures: tuple[Picture, ...]
    claims: tuple[Claim, ...]
    lists: Lists | None

    def save(self, page: Path, pictures: Path | None = None) -> None:
        """Write the page and, if a folder for pictures is given, the pictures, with layers.csv for the lists.

        Raises:
            BitPolicyError: as for `require_free`.
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
    """Check that a report can be written here, before it is drawn.

    Raises:
        BitPolicyError: the page would replace a folder, or the folder of pictures is a file.
    """
    if page.is_dir():
        raise BitPolicyError(f"--output {page} is a folder; name a file, e.g. {page / 'report.html'}")
    if pictures is not None and pictures.exists() and not pictures.is_dir():
        raise BitPolicyError(f"--pictures {pictures} is a file; give a folder")


def make_report(folder: Path, budget: str | None = None) -> Report:
    """Make a report of what `bitpolicy probe` or a search left in `folder`.

    Args:
        budget: the budget for the lists in section "Never INT4"; default: that of the folder's policy, or 45% of FP16.

    Raises:
        BitPolicyError: there is no sensitivity table, a file is damaged, or the budget cannot be met.
    """
    probed = Probed.load(folder)
    lists = None if probed.table.probe in NO_IMAGE_ERROR else make_lists(probed, budget)
    found: list[Section] = [
        explorer(probed, folder),
        sections.overview(probed, folder),
        *([] if probed.policy is None else [chosen(probed, probed.policy, folder)]),
        sections.trust(probed, folder),
        sections.heat(probed, folder),
        sections.roles(probed),
        sections.composition(probed, folder),
        sections.sampler(probed, folder),
        sections.paths(probed, folder),
        decisions.decisions(probed, lists, folder),
        decisions.worst(probed),
    ]
    title = f"Where quantization hurts: {probed.denoiser}"
    lead = (
        f"{len(probed.layers)} layers, each quantized alone to {' and '.join(f.name.upper() for f in probed.formats)}: "
        f"the effect on the {probed.measure}, the sampling steps at which the error enters, what the errors consist "
        "of, and which layers to spare at a given budget."
    )
    split = probed.split
    return Report(
        page(title, lead, found, asset("explorer.css"), asset("explorer.js")),
        tuple(picture for section in found for picture in section.pictures),
        () if split is None else tuple(claims(probed, split)),
        lists,
    )
