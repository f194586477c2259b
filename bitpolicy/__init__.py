"""bitpolicy: mixed-precision quantization of diffusion models, chosen by what it does to the finished image."""

from pathlib import Path as _Path

_root = _Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").exists() and (_root / "kernels").is_dir():
    __path__.append(str(_root))  # in a source tree the subpackages lie beside this folder, not in it
