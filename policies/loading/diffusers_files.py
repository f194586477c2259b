"""A model of diffusers in files: its class on `meta`, which has shapes and no values, and where to read its tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch.nn.modules.module import register_module_module_registration_hook

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats.format import TensorSpec
from bitpolicy.policies.storage.source import TensorSource
from bitpolicy.policies.storage.source_converted import Converter, converted

WRONG_CONFIG = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    StrictDataclassError,
)
"""What models raise whose configs say something that they were not made for."""

MOST_MODULES = 200_000  # of a model or a pipeline; a large one has some ten thousand


@contextmanager
def bounded() -> Iterator[None]:
    """While the block runs, models are built that have a sane number of modules: a config can ask for billions, and
    building them would fill the memory long before anything compared it with the weights.

    Raises:
        BitPolicyError: in the block, as said.
    """
    built = 0

    def count(*_: Any) -> None:
        nonlocal built
        built += 1
        if built > MOST_MODULES:
            raise BitPolicyError(
                f"a config asks for a model of more than {MOST_MODULES:,} modules; it is damaged or no model's, "
                "download it again"
            )

    counting = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        counting.remove()


def skeleton(class_name: str, config: Path | Mapping[str, Any]) -> Any:
    """A model of diffusers without values.

    Args:
        config: the folder with its config.json, or what that says.

    Raises:
        BitPolicyError: there is no such class, it is no model, or the config is no model's.
    """
    kind: Any = getattr(diffusers, str(class_name), None)
    if kind is None or diffusers.ModelMixin not in kind.__mro__:
        raise BitPolicyError(
            f"diffusers {diffusers.__version__} has no model {class_name}; load the pipeline and export it "
            "from memory: bitpolicy.export(pipe, policy, folder)"
        )
    try:
        given = kind.load_config(str(config), local_files_only=True) if isinstance(config, Path) else dict(config)
        with bounded(), init_empty_weights():
            return kind.from_config(given).eval()
    except BitPolicyError:
        raise
    except WRONG_CONFIG as error:
        where = f" in {config}" if isinstance(config, Path) else ""
        raise BitPolicyError(
            f"the config{where} makes no {class_name}: {' '.join(str(error).split())[:300]}; download it again"
        ) from error


class _Fitted:
    """Of another source, the tensors that a model has."""

    def __init__(self, source: TensorSource, names: list[str]) -> None:
        self._source, self._names = source, names

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        specs = self._source.specs
        return {name: specs[name] for name in self._names}

    def read(self, name: str) -> torch.Tensor:
        return self._source.read(name)


def fitted(base: TensorSource, model: Any, where: Path, convert: Converter | None = None) -> TensorSource:
    """The tensors of `model` in a source that may have others, too, or old names for some.

    Args:
        where: to name in errors.
        convert: of a checkpoint in another layout; None is what diffusers does with old names in its own.

    Raises:
        BitPolicyError: one is missing or has another shape.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    source = base
    if convert is not None or not wanted.keys() <= base.specs.keys():
        source = converted(base, convert or (lambda tensors: model._fix_state_dict_keys_on_load(tensors) or tensors))
    specs = source.specs
    missing = sorted(wanted.keys() - specs.keys())
    if missing:
        raise BitPolicyError(
            f"{where} lacks {len(missing)} of the {len(wanted)} tensors of {type(model).__name__}, e.g. {missing[0]}; "
            "download it again, or give the config that belongs to it"
        )
    for name, shape in wanted.items():
        if specs[name].shape != shape:
            raise BitPolicyError(
                f"{where}: {name} has shape {specs[name].shape}, the config of {type(model).__name__} says {shape}; "
                "give the config that belongs to it"
            )
    return _Fitted(source, sorted(wanted))
