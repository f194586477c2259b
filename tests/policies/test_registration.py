"""diffusers and transformers know packed checkpoints once bitpolicy is imported, in any order of imports."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import pytest
from diffusers.quantizers import auto as diffusers_auto
from transformers.quantizers import auto as transformers_auto

import bitpolicy
from bitpolicy.kernels.errors import BitPolicyWarning
from bitpolicy.policies.loading import registration
from bitpolicy.policies.loading.diffusers_quantizer import BitPolicyQuantizer
from bitpolicy.policies.loading.registration import register
from bitpolicy.policies.loading.transformers_quantizer import BitPolicyTransformersQuantizer

ASKED = """
from {library}.quantizers import auto
config = auto.AUTO_QUANTIZATION_CONFIG_MAPPING["bitpolicy"].from_dict({{"quant_method": "bitpolicy", "layers": {{}}}})
quantizer = auto.AUTO_QUANTIZER_MAPPING["bitpolicy"](config, pre_quantized=True)
print(type(config).__name__, type(quantizer).__name__)
"""


@pytest.mark.parametrize("library", ["diffusers", "transformers"])
@pytest.mark.parametrize("first", ["bitpolicy", "the library"])
def test_either_may_be_imported_first(library: str, first: str) -> None:
    lines = ["import bitpolicy", f"import {library}.quantizers.auto"]
    code = "\n".join(lines if first == "bitpolicy" else reversed(lines)) + ASKED.format(library=library)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    own = BitPolicyQuantizer if library == "diffusers" else BitPolicyTransformersQuantizer
    assert done.stdout == f"BitPolicyConfig {own.__name__}\n"


def test_diffusers_accepts_the_stand_ins_as_classes() -> None:
    """It checks instances against every known config, and reads the arguments of the one that is named."""
    code = """import sys, bitpolicy
from diffusers import PipelineQuantizationConfig, QuantoConfig
PipelineQuantizationConfig(quant_mapping={"transformer": QuantoConfig("int8")})
print("bitpolicy.policies.loading.packed_config" in sys.modules)
PipelineQuantizationConfig(quant_mapping={"transformer": bitpolicy.BitPolicyConfig()})
PipelineQuantizationConfig(quant_backend="bitpolicy", quant_kwargs={"compute": "int8"})
try:
    PipelineQuantizationConfig(quant_backend="bitpolicy", quant_kwargs={"bits": 8})
except (TypeError, ValueError) as error:
    print("refused")
try:
    PipelineQuantizationConfig(quant_mapping={"transformer": 3})
except ValueError as error:
    print("refused")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["False", *["refused"] * (done.stdout.count("refused"))], done.stderr
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("refused")


def test_registering_twice_changes_nothing() -> None:
    watching = list(sys.meta_path)
    register()
    assert sys.meta_path == watching
    assert list(diffusers_auto.AUTO_QUANTIZER_MAPPING).count("bitpolicy") == 1
    assert transformers_auto.AUTO_QUANTIZER_MAPPING["bitpolicy"].is_trainable is not None  # a class's own attribute


@pytest.mark.parametrize("library", ["diffusers", "transformers"])
def test_a_version_that_keeps_its_quantizers_elsewhere_is_named(library: str) -> None:
    module = ModuleType(f"{library}.quantizers.auto")
    module.AUTO_QUANTIZER_MAPPING = {}  # type: ignore[attr-defined]
    with pytest.warns(BitPolicyWarning, match=rf"^{library} \d.* has no AUTO_QUANTIZATION_CONFIG_MAPPING in"):
        registration._add_entries(module)
    assert module.AUTO_QUANTIZER_MAPPING == {}


def test_search_is_the_function_in_any_order_of_imports() -> None:
    code = "import bitpolicy; from bitpolicy.search import budget; print(callable(bitpolicy.search), budget.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True bitpolicy.search.budget\n"


def test_every_public_name_exists() -> None:
    assert {name for name in bitpolicy.__all__ if getattr(bitpolicy, name) is None} == set()
    assert set(bitpolicy.__all__) <= set(dir(bitpolicy))
    with pytest.raises(AttributeError, match="no attribute 'serach'"):
        bitpolicy.serach  # noqa: B018
