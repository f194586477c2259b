"""Register the quantization method "bitpolicy" with diffusers and transformers without importing them.

Each library has two dicts keyed by method name, one of quantizers and one of their configs. As soon as the module with
these dicts has been imported, our entries are added. They are stand-ins that import the real classes on first use. So
importing bitpolicy costs nothing, whichever is imported first.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import MutableMapping, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from bitpolicy.kernels.errors import BitPolicyWarning

METHOD = "bitpolicy"
_CONFIG = ("bitpolicy.policies.loading.packed_config", "BitPolicyConfig")
_QUANTIZERS = {
    "diffusers.quantizers.auto": ("bitpolicy.policies.loading.diffusers_quantizer", "BitPolicyQuantizer"),
    "transformers.quantizers.auto": (
        "bitpolicy.policies.loading.transformers_quantizer",
        "BitPolicyTransformersQuantizer",
    ),
}


def register() -> None:
    """Register the method with each library, now or as soon as the library is imported."""
    for name in _QUANTIZERS:
        if name in sys.modules:
            _add_entries(sys.modules[name])
    if not any(isinstance(finder, _ImportWatcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _ImportWatcher())


def _add_entries(module: ModuleType) -> None:
    """Add both entries; warn if this version of the library keeps its quantizers elsewhere."""
    entries = {"AUTO_QUANTIZER_MAPPING": _QUANTIZERS[module.__name__], "AUTO_QUANTIZATION_CONFIG_MAPPING": _CONFIG}
    if missing := [name for name in entries if not isinstance(getattr(module, name, None), MutableMapping)]:
        library = module.__name__.partition(".")[0]
        warnings.warn(
            f"{library} {version(library)} has no {' and no '.join(missing)} in {module.__name__}, where bitpolicy "
            f"registers its checkpoints, so it cannot load them; install an older {library}, or a newer bitpolicy",
            BitPolicyWarning,
            stacklevel=2,
        )
        return
    for name, place in entries.items():
        getattr(module, name)[METHOD] = _StandIn(*place)


class _StandIn:
    """Stands in for a class, which is imported when the stand-in is called or one of its attributes is read."""

    def __init__(self, module: str, name: str) -> None:
        self._place = (module, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _real(self)(*args, **kwargs)

    def __getattribute__(self, name: str) -> Any:
        return object.__getattribute__(self, name) if name == "_place" else getattr(_real(self), name)

    def __instancecheck__(self, instance: object) -> bool:
        return self._place[0] in sys.modules and isinstance(instance, _real(self))  # otherwise no instance exists


def _real(stand_in: _StandIn) -> Any:
    module, name = stand_in._place
    return getattr(import_module(module), name)


class _ImportWatcher(MetaPathFinder):
    """Finds the two modules as usual, and has the entries added once they are loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _QUANTIZERS or self not in sys.meta_path:
            return None
        place = sys.meta_path.index(self)
        sys.meta_path.remove(self)
        try:
            spec = find_spec(fullname)
        finally:
            sys.meta_path.insert(place, self)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


class _RegisteringLoader(Loader):
    """Loads a module with another loader, and adds the entries to it."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _add_entries(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
