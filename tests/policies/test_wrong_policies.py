"""A file that is not a policy soon gives an error that names it, and runs no code."""

from __future__ import annotations

import time
import tracemalloc
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import nn

from bitpolicy import BitPolicyError, Policy
from bitpolicy.kernels.formats.named import FP16
from bitpolicy.policies.apply import choices_for
from bitpolicy.policies.policy import Choice
from bitpolicy.policies.policy_records import LayerSettings
from bitpolicy.policies.storage.plain_yaml import MAX_BYTES, read_yaml

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
)
WRONG: dict[str, tuple[str | bytes, str]] = {
    "bomb of aliases": (BOMB, r"line 2 repeats &a; write the values out"),
    "deep lists": ("[" * 100_000, r"line 1 is nested .*20 deep"),
    "deep mappings": ("{a: " * 5_000, r"line 1 is nested .*20 deep"),
    "too large": ("# " + "x" * MAX_BYTES, r"is larger than 524,288 bytes"),
    "long number": ("a: " + "9" * 100_000, r"line 1 has a value of 100,000 characters"),
    "number too long to read": ("a: " + "9" * 5_000, r"Exceeds the limit"),
    "number in base 60": ("a: " + ":".join(["59"] * 50_000), r"line 1 has a value of 149,999 characters"),
    "date": ("a: 2021-99-99", r"month must be in 1\.\.12"),
    "not UTF-8": (b"\xff\xfe\x00", r"can't decode byte 0xff"),
    "nothing": ("", r"found NoneType, needed a mapping"),
    "a list": ("[1, 2]", r"found list, needed a mapping"),
    "key twice": ("bitpolicy: 1\nbitpolicy: 1\n", r"a key .*twice in this mapping; keep one"),
    "unhashable key": ("? [a]\n: b", r"unhashable key"),
    "half of it": ("bitpolicy: 1\nlayers: {conv_in: {format: int4", r"is not YAML"),
}
TAGS = ["!!python/object/apply:os.system", "!!python/object/new:subprocess.Popen", "!!python/name:os.system", "!own"]


@pytest.mark.parametrize(("text", "complaint"), WRONG.values(), ids=WRONG)
def test_a_file_that_is_not_a_policy_is_refused_with_little_time_and_memory(
    text: str | bytes, complaint: str, tmp_path: Path
) -> None:
    path = tmp_path / "policy.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    tracemalloc.start()
    began = time.process_time()
    with pytest.raises(BitPolicyError, match=complaint) as caught:
        Policy.load(path)
    spent, (_, most) = time.process_time() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert str(path) in str(caught.value)
    assert spent < 5
    assert most < 30_000_000


@pytest.mark.parametrize("tag", TAGS)
def test_tags_run_no_code(tag: str, tmp_path: Path) -> None:
    ran, path = tmp_path / "ran", tmp_path / "policy.yaml"
    path.write_text(f"bitpolicy: 1\nmodel: {tag} ['touch {ran}']\n")
    with pytest.raises(BitPolicyError, match="could not determine a constructor for the tag"):
        Policy.load(path)
    assert not ran.exists()


def test_values_are_read_as_safe_load_reads_them(exported: Any, tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    twice = {"shared": [1.5, None, True]}
    about = exported.policy.model_copy(update={"provenance": {"probe": twice, "search": twice}})
    about.save(path)
    assert "&" not in path.read_text(), "what we write we read: nothing by reference"
    assert read_yaml(path) == yaml.safe_load(path.read_text())
    assert Policy.load(path) == about


LAYERS = ["../../etc/passwd", "/etc/passwd", "conv_in/../conv_out", "conv_in.", "..", "conv_in\n"]


@pytest.mark.parametrize("name", LAYERS)
def test_a_path_is_not_a_layer_name(exported: Any, name: str) -> None:
    layers = exported.policy.layers | {name: exported.policy.layers["conv_out"]}
    with pytest.raises(BitPolicyError, match=r"the policy names layer .* which this model does not have"):
        exported.policy.model_copy(update={"layers": layers}).resolve(exported.choices)


def test_a_gigabyte_of_yaml_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    with path.open("wb") as file:
        file.write(b"bitpolicy: 1\nmodel: {id: '")
        file.truncate(10**9)  # takes no room on the disk
    tracemalloc.start()
    began = time.process_time()
    with pytest.raises(BitPolicyError, match=r"is larger than 524,288 bytes.*; give a policy\.yaml"):
        Policy.load(path)
    spent, (_, most) = time.process_time() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (spent < 1, most < 2_000_000) == (True, True)


def test_the_error_for_a_layer_that_cannot_be_packed_names_its_class(policy_of: Any) -> None:
    model = nn.Sequential(OrderedDict(a=nn.Linear(4, 4), up=nn.ConvTranspose2d(4, 4, 2)))
    policy = policy_of(model, {"a": Choice(FP16)})
    assert choices_for(model, policy) == {"a": Choice(FP16)}
    named = policy.model_copy(update={"layers": {"up": LayerSettings(format="int8")}})
    with pytest.raises(
        BitPolicyError, match=r"layer 'up', a ConvTranspose2d, which cannot be packed.*remove its entry"
    ):
        choices_for(model, named)
