"""A text encoder in files: its class on `meta`, and the source of its tensors.

Files of transformers may name a tensor with one prefix more or less than the model does (CLIP's with and without
`text_model.`), and store a weight that two layers share under only one name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats.format import TensorSpec
from bitpolicy.policies.loading.diffusers_files import bounded, config_to_blame
from bitpolicy.policies.storage.pipeline_files import read_json
from bitpolicy.policies.storage.source import TensorSource


def text_encoder_skeleton(class_name: str, folder: Path) -> Any:
    """A transformers model without values.

    Args:
        folder: contains its config.json.

    Raises:
        BitPolicyError: there is no such class, it is not a model, or the config does not belong to it.
    """
    kind: Any = getattr(transformers, class_name, None)
    if transformers.PreTrainedModel not in getattr(kind, "__mro__", ()):
        raise BitPolicyError(
            f"transformers {transformers.__version__} has no model {class_name}; load the pipeline and export it "
            "from memory: bitpolicy.export(pipe, policy, folder)"
        )
    which = f"the config in {folder}"
    with bounded({which: read_json(folder / "config.json")}):
        with config_to_blame(class_name, which):
            config = kind.config_class.from_pretrained(folder, local_files_only=True)
        # accelerate's way to build without values would separate weights that two layers share
        with torch.device("meta"), config_to_blame(class_name, which):
            model = kind(config)
    return model.eval()


def places(model: Any, stored: Iterable[str]) -> dict[str, str]:
    """State-dict name -> the name in the files, for every tensor of a model.

    Raises:
        BitPolicyError: a tensor is missing, or several names match it.
    """
    names, found = set(stored), {}
    for name in model.state_dict():
        wanted = name if name in names else model.all_tied_weights_keys.get(name, name)
        near = [n for n in names if n.endswith(f".{wanted}") or wanted.endswith(f".{n}")]
        here = [wanted] if wanted in names else near
        if len(here) != 1:
            raise BitPolicyError(
                f"the files of this {type(model).__name__} do not hold {name} under one name; download them again, or "
                "load the pipeline and export it from memory: bitpolicy.export(pipe, policy, folder)"
            )
        found[name] = here[0]
    return found


class TextEncoderSource:
    """The tensors of a transformers model, by their names in memory.

    Raises:
        BitPolicyError: a tensor is missing or has another shape.
    """

    def __init__(self, files: TensorSource, model: Any, where: Path) -> None:
        self._files, self._places = files, places(model, files.specs)
        for name, tensor in model.state_dict().items():
            found = self.specs[name].shape
            if found != tuple(tensor.shape):
                raise BitPolicyError(
                    f"{where}: {name} has shape {found}, but the config of {type(model).__name__} says "
                    f"{tuple(tensor.shape)}; download it again"
                )

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        specs = self._files.specs
        return {name: specs[place] for name, place in self._places.items()}

    def read(self, name: str) -> torch.Tensor:
        return self._files.read(self._places[name])
