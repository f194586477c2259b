"""A model of diffusers in files: its class on `meta`, which has shapes and no values, and where to read its tensors."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from torch.nn.modules.module import register_module_module_registration_hook

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats.format import TensorSpec
from bitpolicy.policies.storage.pipeline_files import read_json
from bitpolicy.policies.storage.source import TensorSource
from bitpolicy.policies.storage.source_converted import Converter, converted

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


@contextmanager
def config_to_blame(class_name: str, config: str) -> Iterator[None]:
    """Around the one call in which a library builds something of a config, and nothing else.

    A constructor that gets values it was not made for may raise anything: a TypeError as well as a ZeroDivisionError.
    So not the type of an error tells whose fault it is, but the place where it was raised: in the library it is the
    config's, in our own code it is a bug, which passes as it is.

    Args:
        config: which it is, for the error: "the config in FOLDER".

    Raises:
        BitPolicyError: the library raised something.
    """
    try:
        yield
    except BitPolicyError:
        raise
    except Exception as error:
        *_, (raising, _) = traceback.walk_tb(error.__traceback__)
        if str(raising.f_globals.get("__name__")).startswith("bitpolicy."):
            raise
        raise BitPolicyError(
            f"{config} makes no {class_name}: {' '.join(str(error).split())[:300]}; download it again"
        ) from error


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
    which = f"the config in {config}" if isinstance(config, Path) else "the config"
    said = read_json(config / kind.config_name) if isinstance(config, Path) else dict(config)
    _require_numbers(kind, said, which)
    with bounded(), init_empty_weights(), config_to_blame(class_name, which):
        model = kind.from_config(said)
    return model.eval()


def _require_numbers(kind: type[Any], said: Mapping[str, Any], config: str) -> None:
    """Raises:
    BitPolicyError: the config has text or a mapping where the class has a number by default and takes no text.
    """
    for name, parameter in inspect.signature(kind.__init__).parameters.items():
        number = type(parameter.default) in (int, float) and "str" not in str(parameter.annotation)
        if number and isinstance(said.get(name), str | dict):
            raise BitPolicyError(
                f"{config} has {name}: {said[name]!r}, and {kind.__name__} needs a number there, such as "
                f"{parameter.default}; download it again"
            )


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
