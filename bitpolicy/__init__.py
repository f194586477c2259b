"""bitpolicy: mixed-precision quantization of diffusion models, chosen by what it does to the finished image.

Importing it teaches diffusers and transformers to load packed checkpoints.
"""

from pathlib import Path as _Path

_root = _Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").exists() and (_root / "kernels").is_dir():
    __path__.append(str(_root))  # in a source tree the subpackages lie beside this folder, not in it

from bitpolicy.command import quiet_if_a_command as _quiet_if_a_command

with _quiet_if_a_command():
    from bitpolicy.api import export, export_for, load_pipeline, probe, search
    from bitpolicy.kernels.compute.setting import resident_bytes, set_compute
    from bitpolicy.kernels.dispatch import use_kernels
    from bitpolicy.kernels.errors import BitPolicyError
    from bitpolicy.policies.loading import diffusers_quantizer as _diffusers
    from bitpolicy.policies.loading import transformers_quantizer as _transformers
    from bitpolicy.policies.loading.packed_config import BitPolicyConfig
    from bitpolicy.policies.policy import Policy

_diffusers.register()
_transformers.register()

__version__ = "0.1.0"
__all__ = [
    "BitPolicyConfig",
    "BitPolicyError",
    "Policy",
    "export",
    "export_for",
    "load_pipeline",
    "probe",
    "resident_bytes",
    "search",
    "set_compute",
    "use_kernels",
]
