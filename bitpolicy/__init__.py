"""bitpolicy: mixed-precision quantization of diffusion models, chosen by its effect on the finished image.

Importing it registers packed checkpoints with diffusers and transformers, whether those are already imported or come
later. `__init__.pyi` lists the public names. They are imported on first use, because torch and diffusers take seconds
to import.
"""

import sys as _sys
from importlib import import_module as _import_module
from pathlib import Path as _Path
from types import ModuleType as _ModuleType
from typing import Any as _Any

_root = _Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").exists() and (_root / "kernels").is_dir():
    __path__.append(str(_root))  # in a source tree the subpackages are next to this folder, not in it

from bitpolicy.policies.loading.registration import register as _register

_register()

__version__ = "0.1.0"
_PLACES = {
    "BitPolicyConfig": "bitpolicy.policies.loading.packed_config",
    "BitPolicyError": "bitpolicy.kernels.errors",
    "Policy": "bitpolicy.policies.policy",
    "export": "bitpolicy.api",
    "export_for": "bitpolicy.api",
    "load_pipeline": "bitpolicy.api",
    "probe": "bitpolicy.api",
    "resident_bytes": "bitpolicy.kernels.compute.setting",
    "search": "bitpolicy.api",
    "set_compute": "bitpolicy.kernels.compute.setting",
    "use_kernels": "bitpolicy.kernels.dispatch",
}
__all__ = list(_PLACES)


def __getattr__(name: str) -> _Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'bitpolicy' has no attribute {name!r}")
    found = getattr(_import_module(_PLACES[name]), name)
    globals()[name] = found
    return found


class _Package(_ModuleType):
    """Keeps `bitpolicy.search` the function, although importing a module of search/ sets the same name."""

    def __setattr__(self, name: str, value: _Any) -> None:
        if name != "search" or not isinstance(value, _ModuleType):
            super().__setattr__(name, value)


_sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
