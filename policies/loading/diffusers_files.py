"""A diffusers model in files: its class on `meta`, with shapes but no values, and the source of its tensors."""

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
from bitpolicy.policies.loading.named_classes import found_class
from bitpolicy.policies.storage.pipeline_files import read_json
from bitpolicy.policies.storage.source import TensorSource
from bitpolicy.policies.storage.source_converted import Converter, converted

_COUNTS = ("layers", "depth", "blocks")  # the names of entries that are numbers of layers contain one of these
MOST_MODULES = 200_000  # of a model or a pipeline; a large one has about ten thousand


@contextmanager
def bounded(configs: Mapping[str, Mapping[str, Any]]) -> Iterator[None]:
    """Limit how many modules can be built while the block runs.

    A config can ask for billions, and building them would fill the memory long before anything is compared with the
    weights. A constructor may even allocate a list of that length first, so the numbers of layers are checked before.

    Args:
        configs: the name of each config, for the message -> the content of its config.json.

    Raises:
        BitPolicyError: a config asks for more than `MOST_MODULES` layers, or the block builds more modules.
    """
    for which, config in configs.items():
        _require_bounded(config, which)
    built = 0

    def count(*_: Any) -> None:
        nonlocal built
        built += 1
        if built > MOST_MODULES:
            raise _too_large("a config")

    counting = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        counting.remove()


def _require_bounded(config: Mapping[str, Any], which: str) -> None:
    """Refuse numbers of layers that no model has."""
    for name, value in config.items():
        if isinstance(value, dict):
            _require_bounded(value, which)
        elif any(word in name for word in _COUNTS) and any(_counts_too_many(number) for number in _flat(value)):
            raise _too_large(which)


def _flat(value: Any) -> Iterator[Any]:
    """The entries of nested lists."""
    if isinstance(value, list):
        for item in value:
            yield from _flat(item)
    else:
        yield value


def _counts_too_many(value: Any) -> bool:
    return isinstance(value, int | float) and value > MOST_MODULES


def _too_large(which: str) -> BitPolicyError:
    return BitPolicyError(
        f"{which} asks for a model of more than {MOST_MODULES:,} modules, so it is damaged or not a model's; download "
        "it again"
    )


@contextmanager
def config_to_blame(class_name: str, config: str) -> Iterator[None]:
    """Report an error of the library that builds something from a config as an error in the config.

    Put it around that one call and nothing else. A constructor that gets values it was not made for may raise anything,
    from a TypeError to a ZeroDivisionError. So the type of an error does not tell whose fault it is, but the place
    where it was raised does: in the library it is the config's fault, in our own code it is a bug and passes unchanged.

    Args:
        config: name of the config for the message: "the config in FOLDER".

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
            f"{config} does not describe a valid {class_name}: {' '.join(str(error).split())[:300]}; download it again"
        ) from error


def skeleton(class_name: str, config: Path | Mapping[str, Any], library: str = "diffusers") -> Any:
    """A diffusers model without values.

    Args:
        library: "diffusers", or the module of `diffusers.pipelines` that has the class.
        config: the folder with its config.json, or the content of that file.

    Raises:
        BitPolicyError: there is no such class, it is not a model, or the config does not belong to it.
    """
    kind: Any = found_class(library, str(class_name)) or getattr(diffusers, str(class_name), None)
    if diffusers.ModelMixin not in getattr(kind, "__mro__", ()):
        raise BitPolicyError(
            f"diffusers {diffusers.__version__} has no model {class_name}; load the pipeline and export it "
            "from memory: bitpolicy.export(pipe, policy, folder)"
        )
    which = f"the config in {config}" if isinstance(config, Path) else "the config"
    said = read_json(config / kind.config_name) if isinstance(config, Path) else dict(config)
    _require_numbers(kind, said, which)
    with bounded({which: said}), init_empty_weights(), config_to_blame(class_name, which):
        model = kind.from_config(said)
    return model.eval()


def _require_numbers(kind: type[Any], said: Mapping[str, Any], config: str) -> None:
    """Refuse a config that has text or a mapping where a number belongs.

    Raises:
        BitPolicyError: the class has a number by default there, and takes no text.
    """
    for name, parameter in inspect.signature(kind.__init__).parameters.items():
        number = type(parameter.default) in (int, float) and "str" not in str(parameter.annotation)
        if number and isinstance(said.get(name), str | dict):
            raise BitPolicyError(
                f"{config} has {name}: {said[name]!r}, but {kind.__name__} needs a number there, such as "
                f"{parameter.default}; download it again"
            )


class _Fitted:
    """The tensors of another source that a model has."""

    def __init__(self, source: TensorSource, names: list[str]) -> None:
        self._source, self._names = source, names

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        specs = self._source.specs
        return {name: specs[name] for name in self._names}

    def read(self, name: str) -> torch.Tensor:
        return self._source.read(name)


def fitted(base: TensorSource, model: Any, where: Path, convert: Converter | None = None) -> TensorSource:
    """The tensors of `model` in a source that may also have others, or old names for some.

    Args:
        where: the place of the files, for error messages.
        convert: converts a checkpoint in another layout; None renames old names as diffusers does.

    Raises:
        BitPolicyError: a tensor is missing or has another shape.
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
                f"{where}: {name} has shape {specs[name].shape}, but the config of {type(model).__name__} says "
                f"{shape}; give the config that belongs to it"
            )
    return _Fitted(source, sorted(wanted))
