"""diffusers' test mixins, applied to our models. Run by scripts/diffusers_suite.py.

A mixin gets a model and its inputs from a class. For transformers, both come from diffusers' own tests of that class:
tiny, with random weights. A quantization mixin also needs a quantized model: we save the tiny one and load it with a
policy, as a user would. The other mixins build an ordinary model from its config; their `model_class` is a class whose
call returns that model packed.
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import tests.testing_utils as testing
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from bitpolicy import BitPolicyConfig
from bitpolicy.kernels.formats.named import FP16, format_named
from bitpolicy.kernels.layers import PackedLayer, quantizable_layers
from bitpolicy.policies.apply import to_storage
from bitpolicy.policies.choice import Choice
from bitpolicy.policies.identity import weights_hash
from bitpolicy.policies.policy import Policy
from bitpolicy.policies.policy_records import ModelReference

ON_CPU = testing.torch_device == "cpu"
if ON_CPU:  # the mixins require an accelerator because most quantization packages need one

    def _runs_anywhere(case: Any) -> Any:
        return case

    testing.require_accelerator = _runs_anywhere

from tests.models.testing_utils import (  # noqa: E402 # its decorators read what is set above
    BaseModelTesterConfig,
    LayerwiseCastingTesterMixin,
    LoraTesterMixin,
    MemoryTesterMixin,
    QuantizationCompileTesterMixin,
    QuantizationTesterMixin,
    TorchCompileTesterMixin,
)
from tests.models.testing_utils.common import cast_inputs_to_dtype  # noqa: E402
from tests.models.transformers.test_models_transformer_flux import FluxTransformerTesterConfig  # noqa: E402
from tests.models.transformers.test_models_transformer_sd3 import SD3TransformerTesterConfig  # noqa: E402
from tests.models.transformers.test_models_transformer_wan import WanTransformer3DTesterConfig  # noqa: E402

FORMATS = ("int8", "mixed")
MIXED = tuple(map(format_named, ("int4", "int4-g32", "int5-sym", "int3-channel", "nf4", "fp8", "int8")))


class UNetConfig(BaseModelTesterConfig):
    """A U-Net of two levels. The one in diffusers' tests needs packages that these cases do not use."""

    model_class = UNet2DConditionModel
    main_input_name = "sample"
    output_shape = (4, 16, 16)

    def get_init_dict(self) -> dict[str, Any]:
        return {
            "sample_size": 16,
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 24,
            "attention_head_dim": 8,
            "norm_num_groups": 8,
        }

    def get_dummy_inputs(self) -> dict[str, torch.Tensor]:
        draw = torch.Generator().manual_seed(0)
        return {
            "sample": torch.randn(2, 4, 16, 16, generator=draw).to(testing.torch_device),
            "timestep": torch.tensor([10], device=testing.torch_device),
            "encoder_hidden_states": torch.randn(2, 7, 24, generator=draw).to(testing.torch_device),
        }


MODELS = {
    "UNet2DConditionModel": UNetConfig,
    "FluxTransformer2DModel": FluxTransformerTesterConfig,
    "SD3Transformer2DModel": SD3TransformerTesterConfig,
    "WanTransformer3DModel": WanTransformer3DTesterConfig,
}


def policy(model: nn.Module, formats: str, kept: tuple[str, ...] = ()) -> Policy:
    """A policy with one format, or "mixed" formats in turn. Layers whose name contains a part in `kept` stay FP16."""
    turns = cycle(MIXED if formats == "mixed" else [format_named(formats)])
    choices = {}
    for (name, layer), format in zip(quantizable_layers(model), turns, strict=False):
        packed = format.fits(layer.weight.shape) and not any(part in name for part in kept)
        choices[name] = Choice(format if packed else FP16)
    reference = ModelReference(
        id="tiny", component="transformer", class_name=type(model).__name__, sha256=weights_hash(model, torch.float16)
    )
    return Policy.of(choices, model=reference)


class Packed(type):
    """A metaclass: calling the class returns what its base returns, packed. Loading stays that of the base."""

    formats: str

    def __call__(cls, **config: Any) -> Any:
        plain = cls.__base__(**config)
        given = BitPolicyConfig(policy=policy(plain, cls.formats))
        with tempfile.TemporaryDirectory() as folder:
            plain.save_pretrained(folder)
            return cls.__base__.from_pretrained(folder, quantization_config=given, torch_dtype=torch.float32)


def packed_class(plain: type[Any], formats: str = "mixed") -> type[Any]:
    return Packed(plain.__name__, (plain,), {"from_pretrained": plain.from_pretrained, "formats": formats})


class OurQuantization:
    """What the quantization mixins require. Models are stored and loaded in float16."""

    torch_dtype = torch.float16
    pretrained_model_kwargs: Mapping[str, Any] = {}
    pretrained_model_name_or_path: str
    sharded_serialization_config: Mapping[str, Any] = {"formats": "mixed"}

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _saved(cls, tmp_path_factory: pytest.TempPathFactory) -> None:
        folder = tmp_path_factory.mktemp("tiny")
        torch.manual_seed(0)
        model = cls.plain_class()
        to_storage(model, torch.float16)
        model.save_pretrained(folder)
        cls.pretrained_model_name_or_path = str(folder)

    @classmethod
    def plain_class(cls) -> Any:
        config = cls()  # type: ignore[call-arg]
        return config.model_class(**config.get_init_dict())

    def get_dummy_inputs(self, **options: Any) -> Any:
        return cast_inputs_to_dtype(super().get_dummy_inputs(**options), torch.float32, torch.float16)

    def _create_quantized_model(self, config_kwargs: Mapping[str, Any], **options: Any) -> Any:
        plain = self.model_class.from_pretrained(self.pretrained_model_name_or_path)
        given = policy(plain, config_kwargs["formats"], tuple(config_kwargs.get("modules_to_not_convert", ())))
        config = BitPolicyConfig(policy=given)
        return self.model_class.from_pretrained(
            self.pretrained_model_name_or_path, quantization_config=config, **options
        )

    def _verify_if_layer_quantized(self, name: str, module: nn.Module, config_kwargs: Mapping[str, Any]) -> None:
        assert isinstance(module, PackedLayer), name


def cases_of(mixin: type[Any]) -> list[str]:
    """The names of the mixin's cases; each is called with a config."""
    return [name.removeprefix("_test_") for name in dir(mixin) if name.startswith("_test_")]


def each_case(mixin: type[Any]) -> Any:
    """A test that runs every case of a mixin with every format."""

    @pytest.mark.parametrize("formats", FORMATS)
    @pytest.mark.parametrize("case", cases_of(mixin))
    def test_case(self: Any, case: str, formats: str, tmp_path: Path) -> None:
        run = getattr(self, f"_test_{case}")
        given = {
            "config_kwargs": {"formats": formats},
            "tmp_path": tmp_path,
            "modules_to_not_convert": ["attn"],
        }
        run(**{name: given[name] for name in inspect.signature(run).parameters if name in given})

    return test_case


class Quantization(OurQuantization):
    test_case = each_case(QuantizationTesterMixin)


class QuantizationCompile(OurQuantization):
    test_case = each_case(QuantizationCompileTesterMixin)


class PackedModels:
    """For the mixins that build models from their config."""

    @property
    def model_class(self) -> type[Any]:
        return packed_class(super().model_class)


class CompiledModels:
    """For the mixin that compiles. All layers have one format, because equal blocks whose layers differ in format are
    compiled once each, and the mixin counts."""

    @property
    def model_class(self) -> type[Any]:
        return packed_class(super().model_class, "int8")

    def test_torch_compile_repeated_blocks(self) -> None:
        unet = self.model_class.__name__ == "UNet2DConditionModel"  # two kinds of blocks: diffusers' own test allows 2
        super().test_torch_compile_repeated_blocks(recompile_limit=2 if unet else 1)

    @pytest.mark.skipif(ON_CPU, reason="streams need a GPU")
    def test_compile_with_group_offloading(self) -> None:
        super().test_compile_with_group_offloading()


for _model, _config in MODELS.items():
    for _kind, _bases in {
        "Quantization": (Quantization, _config, QuantizationTesterMixin),
        "QuantizationCompile": (QuantizationCompile, _config, QuantizationCompileTesterMixin),
        "Lora": (PackedModels, _config, LoraTesterMixin),
        "LayerwiseCasting": (PackedModels, _config, LayerwiseCastingTesterMixin),
        "Memory": (PackedModels, _config, MemoryTesterMixin),
        "Compile": (CompiledModels, _config, TorchCompileTesterMixin),
    }.items():
        _marks = [pytest.mark.skip("splits a model between a GPU and the CPU")] if _kind == "Memory" and ON_CPU else []
        globals()[f"Test{_model}_{_kind}"] = type(f"Test{_model}_{_kind}", _bases, {"pytestmark": _marks})
