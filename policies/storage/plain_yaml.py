"""Read YAML that anyone may have written: plain values only, of a size that a person's file has.

A file that was cut short may still be YAML, with other choices. So a document that begins with `---`, as those that we
write do, has to end with `...`.

Beyond what `yaml.safe_load` refuses (tags that name Python objects), nothing is repeated by reference, so a few lines
cannot stand for gigabytes; nesting and size are bounded before anything is built; and a key stands once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.policies.storage.file_source import require_plain_file

MAX_BYTES = 2**19  # 800 layers take some 60 kB
MAX_DEPTH = 20
MAX_LENGTH = 2**13  # of one value: a number in base 60 takes the square of it to read


class YamlError(BitPolicyError):
    """A file that is not YAML of plain values."""


class _PlainLoader(yaml.SafeLoader):
    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError(f"line {line} repeats &{event.anchor}; write the values out")
        if isinstance(event, yaml.ScalarEvent) and len(event.value) > MAX_LENGTH:
            raise yaml.YAMLError(f"line {line} has a value of {len(event.value):,} characters")
        if self._depth == MAX_DEPTH:
            raise yaml.YAMLError(f"line {line} is nested {MAX_DEPTH} deep; write it flatter")
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        found = super().construct_mapping(node, deep=deep)
        if len(found) != len(node.value):
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: a key stands twice in this mapping; keep one")
        return found


def read_yaml(path: Path) -> Any:
    """The values of a YAML file.

    Raises:
        OSError: the file cannot be read.
        YamlError: it is too large, cut short, not YAML, or more than plain values.
    """
    require_plain_file(path)
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise YamlError(f"{path} is larger than {MAX_BYTES:,} bytes, which no policy is; give the policy.yaml itself")
    try:
        text = data.decode("utf-8")
        _require_whole(text, path)
        return _PlainLoader(text).get_single_data()
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # a number or a date that is none is a ValueError
        raise YamlError(f"{path} is not YAML: {' '.join(str(error).split())}") from error


def _require_whole(text: str, path: Path) -> None:
    """Raises:
    YamlError: the document has YAML's mark of a beginning and not that of an end, which is the last line.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if "..." in lines[:-1]:
        raise YamlError(f"{path} has lines after its end, a line of ...; move them above it")
    if lines and lines[0] == "---" and lines[-1] != "...":
        raise YamlError(
            f"{path} is cut short: it begins with --- and does not end with a line of ...; take the whole file, or "
            "leave the --- out of one that you wrote yourself"
        )
