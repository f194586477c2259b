from bitpolicy.api import export as export
from bitpolicy.api import export_for as export_for
from bitpolicy.api import load_pipeline as load_pipeline
from bitpolicy.api import probe as probe
from bitpolicy.api import search as search
from bitpolicy.kernels.compute.setting import resident_bytes as resident_bytes
from bitpolicy.kernels.compute.setting import set_compute as set_compute
from bitpolicy.kernels.dispatch import use_kernels as use_kernels
from bitpolicy.kernels.errors import BitPolicyError as BitPolicyError
from bitpolicy.policies.loading.packed_config import BitPolicyConfig as BitPolicyConfig
from bitpolicy.policies.policy import Policy as Policy

__version__: str
