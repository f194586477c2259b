"""Write the files generated from the options of a search: docs/options.md, and the keywords in bitpolicy/__init__.pyi.

python scripts/write_options.py            # after changing bitpolicy/settings.py
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

import bitpolicy
from bitpolicy.declared import Declared, declared_options
from bitpolicy.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = ROOT / "docs" / "options.md"
STUBS = ROOT / "bitpolicy" / "__init__.pyi"
_MODULES = re.compile(r"\b(?:typing|collections\.abc|pathlib|diffusers(?:\.\w+)+|bitpolicy(?:\.\w+)+)\.(?=[A-Z])")

_OPENING = """# Options of a search

Every option of `search-policy`, with its name in Python, where `bitpolicy.search(pipe, budget, ...)` takes it as a
keyword. Options that say how to load a model are for a pipeline that is given by its path or hub id. This page is
written by `scripts/write_options.py`.
"""
_STUBS = '''"""What bitpolicy offers. Written by scripts/write_options.py."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from diffusers import DiffusionPipeline

from bitpolicy.api import export as export
from bitpolicy.api import export_for as export_for
from bitpolicy.api import load_pipeline as load_pipeline
from bitpolicy.kernels.compute.setting import resident_bytes as resident_bytes
from bitpolicy.kernels.compute.setting import set_compute as set_compute
from bitpolicy.kernels.dispatch import use_kernels as use_kernels
from bitpolicy.kernels.errors import BitPolicyError as BitPolicyError
from bitpolicy.policies.loading.packed_config import BitPolicyConfig as BitPolicyConfig
from bitpolicy.policies.policy import Policy as Policy
from bitpolicy.sensitivity.table import SensitivityTable

__version__: str

'''


def options_page() -> str:
    """The text of docs/options.md."""
    declared = [one for one in declared_options(Settings) if one.name != "shared"]
    sections = [_OPENING]
    for group in dict.fromkeys(one.group for one in declared):
        rows = [_row(one) for one in declared if one.group == group]
        sections.append(
            "\n".join([f"## {group}\n", "| option | in Python | default | |", "|---|---|---|---|", *rows, ""])
        )
    return "\n".join(sections)


def _row(declared: Declared) -> str:
    option = f"`--{declared.keyword.replace('_', '-')}`"
    if declared.option.only_python:
        option = "`--prompts FILE`" if declared.name == "prompts" else "`--call NAME=VALUE`"
    keyword = "the first argument" if declared.name == "model" else f"`{declared.keyword}`"
    default = "" if declared.default in (None, ()) else f"`{_written(declared.default)}`"
    return f"| {option} | {keyword} | {default} | {declared.option.help} |"


def _written(value: Any) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)


def stubs() -> str:
    """The text of bitpolicy/__init__.pyi."""
    return _STUBS + "".join(map(_stub, ("probe", "search")))


def _stub(name: str) -> str:
    function = getattr(bitpolicy, name)
    signature = inspect.signature(function, eval_str=True)
    lines = [f"def {name}("]
    starred = False
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            lines.append("    *,")
            starred = True
        default = "" if parameter.default is parameter.empty else " = ..."
        lines.append(f"    {parameter.name}: {_type(parameter.annotation)}{default},")
    return "\n".join([*lines, f") -> {_type(signature.return_annotation)}: ...", ""])


def _type(annotation: Any) -> str:
    """The annotation as source code."""
    plain = _unannotated(annotation)
    text = plain.__name__ if isinstance(plain, type) and not get_args(plain) else str(plain)
    return _MODULES.sub("", text).replace("typing.", "").replace("'", '"')


def _unannotated(annotation: Any) -> Any:
    """The annotation without the metadata of `Annotated`, also inside unions."""
    if hasattr(annotation, "__metadata__"):
        return get_args(annotation)[0]
    parts = get_args(annotation)
    return _union(map(_unannotated, parts)) if any(hasattr(part, "__metadata__") for part in parts) else annotation


def _union(parts: Iterable[Any]) -> Any:
    found: Any = None
    for part in parts:
        found = part if found is None else found | part
    return found


def main() -> None:
    OPTIONS.write_text(options_page(), encoding="utf-8")
    STUBS.write_text(stubs(), encoding="utf-8")


if __name__ == "__main__":
    main()
