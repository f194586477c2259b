"""What scripts/diffusers_suite.py reports about a run. The cases themselves need a checkout of diffusers."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest

pytestmark = pytest.mark.usefixtures("scripts_importable")

CASES = """
import pytest

class TestToy_Quantization:
    @pytest.mark.parametrize("formats", ["int4", "int8"])
    @pytest.mark.parametrize("case", ["inference", "quantization_dtype_assignment"])
    def test_case(self, case, formats):
        if case == "quantization_dtype_assignment":
            with pytest.raises(ValueError):
                pass
        assert formats == "int4", "only int4 works"

class TestOther_Lora:
    def test_fuse(self):
        pytest.skip("no GPU")
"""


def test_the_table_counts_each_case_of_each_model_and_gives_the_reasons(tmp_path: Path) -> None:
    from diffusers_suite import KNOWN, Outcomes, own_configuration

    path, outcomes = tmp_path / "cases.py", Outcomes()
    path.write_text(CASES)
    with own_configuration() as options:
        options += ["--rootdir", str(tmp_path), "-q"]
        assert pytest.main([*options, str(path)], plugins=[outcomes]) == 1
    assert list(outcomes.table()) == [
        "| case | Toy | Other |",
        "| --- | --- | --- |",
        "| Quantization: inference | 1 passed, 1 failed |  |",
        "| Quantization: quantization_dtype_assignment | 2 known |  |",
        "| Lora: fuse |  | 1 skipped |",
        "",
        "* failed: AssertionError: only int4 works: Quantization: inference (Toy, int8)",
        f"* known: {KNOWN['quantization_dtype_assignment'][0]}: "
        "Quantization: quantization_dtype_assignment (Toy, int4), "
        "Quantization: quantization_dtype_assignment (Toy, int8)",
        "* skipped: no GPU: Lora: fuse (Other)",
    ]


def test_a_checkout_of_another_version_is_refused(tmp_path: Path) -> None:
    from diffusers_suite import require_same_version

    with pytest.raises(SystemExit, match="give the folder of a diffusers checkout"):
        require_same_version(tmp_path)
    source = tmp_path / "src" / "diffusers" / "__init__.py"
    source.parent.mkdir(parents=True)
    source.write_text('__version__ = "0.1.0"\n')
    with pytest.raises(SystemExit, match=r"diffusers 0\.1\.0, the installed version is .*; check out v"):
        require_same_version(tmp_path)
    source.write_text(f'__version__ = "{diffusers.__version__}"\n')
    require_same_version(tmp_path)
