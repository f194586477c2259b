"""The classes that a file may name: diffusers' and transformers' own, looked up in those libraries by name.

A model_index.json names a library and a class for every component, and diffusers imports whatever library it finds
there. So a folder could run any module on the path. Therefore every name is checked before a pipeline is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import transformers
from diffusers import DiffusionPipeline
from diffusers.utils import deprecation_utils

from bitpolicy.kernels.errors import BitPolicyError

_LIBRARIES: dict[str, ModuleType] = {"diffusers": diffusers, "transformers": transformers}


def class_named(library: str, name: str, where: Path) -> type[Any]:
    """The class that a file names.

    Args:
        library: "diffusers", "transformers", or a module of `diffusers.pipelines`, such as "stable_diffusion".
        where: the file, for the error message.

    Raises:
        BitPolicyError: it is another library, or the library has no such class of its own.
    """
    if _module(library) is None:
        raise BitPolicyError(
            f"{where} names {library}.{name}: only classes of diffusers and transformers are loaded; a pipeline with "
            "classes of its own can be passed to bitpolicy.search from Python"
        )
    found = found_class(library, name)
    if found is None:
        raise BitPolicyError(
            f"{where} names {library}.{name}: the installed {library} has no such class; install a release that has it"
        )
    return found


def found_class(library: str, name: str) -> type[Any] | None:
    """The class of that name, as in `class_named`; None if there is none."""
    module = _module(library)
    found = getattr(module, name, None) or getattr(module, _renamed(name), None)
    return found if isinstance(found, type) and found.__module__.partition(".")[0] in _LIBRARIES else None


def require_known_classes(index: Mapping[str, Any], where: Path) -> None:
    """Check every class that a model_index.json names, including that of the pipeline.

    Raises:
        BitPolicyError: as for `class_named`.
    """
    pipeline = index.get("_class_name")
    kind = class_named("diffusers", pipeline, where) if isinstance(pipeline, str) else None
    if kind is None or not issubclass(kind, DiffusionPipeline):
        raise BitPolicyError(f"{where} names {pipeline!r} as its pipeline, needed a pipeline class of diffusers")
    for value in index.values():
        if isinstance(value, list) and len(value) == 2 and value[0] is not None:
            class_named(str(value[0]), str(value[1]), where)


def _renamed(name: str) -> str:
    """The current name of a transformers class that older folders name, according to diffusers."""
    known = getattr(deprecation_utils, "_maybe_remap_transformers_class", None)
    return str((known and known(name)) or name)


def _module(name: str) -> ModuleType | None:
    if name in _LIBRARIES:
        return _LIBRARIES[name]
    found = getattr(diffusers.pipelines, name, None) if name.isidentifier() else None
    return found if isinstance(found, ModuleType) and found.__name__.startswith("diffusers.pipelines.") else None
