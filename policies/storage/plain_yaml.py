"""Read YAML from an untrusted source: plain values only, in a file no larger than a person would write.

A truncated file may still be valid YAML, with other choices. So a document that begins with `---`, as ours do, must
end with `...`.

`yaml.safe_load` refuses tags that name Python objects. In addition, aliases are refused, so that a few lines cannot
expand to gigabytes; nesting and size are limited before anything is built; and a mapping may have each key only once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.policies.storage.file_source import require_plain_file

MAX_BYTES = 2**19  # 800 layers take about 60 kB
MAX_DEPTH = 20
MAX_LENGTH = 2**13  # characters in one value; reading a number in base 60 takes quadratic time


class YamlError(BitPolicyError):
    """A file that is not YAML with plain values only."""


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
            raise yaml.YAMLError(f"line {line} is nested more than {MAX_DEPTH} deep; make it flatter")
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        found = super().construct_mapping(node, deep=deep)
        if len(found) != len(node.value):
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: a key appears twice in this mapping; keep one")
        return found


def read_yaml(path: Path) -> Any:
    """The values of a YAML file.

    Raises:
        OSError: the file cannot be read.
        YamlError: it is too large, cut short, not YAML, or has other values than plain ones.
    """
    require_plain_file(path)
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise YamlError(f"{path} is larger than {MAX_BYTES:,} bytes, too large for a policy; give a policy.yaml")
    try:
        text = data.decode("utf-8")
        _require_whole(text, path)
        return _PlainLoader(text).get_single_data()
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # an invalid number or date raises ValueError
        raise YamlError(f"{path} is not YAML: {' '.join(str(error).split())}") from error


def _require_whole(text: str, path: Path) -> None:
    """Refuse a document that was cut short, or has lines after its end.

    Raises:
        YamlError: it begins with YAML's start marker, and its last line is not the end marker.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if "..." in lines[:-1]:
        raise YamlError(f"{path} has lines after its end, a line of ...; move them above it")
    if lines and lines[0] == "---" and lines[-1] != "...":
        raise YamlError(
            f"{path} is cut short: it begins with --- but does not end with a line of ...; use the whole file, or "
            "remove the --- if you wrote the file yourself"
        )
