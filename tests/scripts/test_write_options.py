"""The files generated from the options of a search are up to date."""

from __future__ import annotations

import pytest


@pytest.mark.usefixtures("scripts_importable")
def test_the_page_and_the_stubs_are_up_to_date() -> None:
    import write_options

    assert write_options.options_page() == write_options.OPTIONS.read_text(encoding="utf-8")
    assert write_options.stubs() == write_options.STUBS.read_text(encoding="utf-8")
