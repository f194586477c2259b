"""Load models without giving any tensor a random value.

diffusers and transformers initialize tensors that a file lacks at random, and only warn. Here that is an error.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from diffusers import ModelMixin
from transformers import PreTrainedModel

from bitpolicy.kernels.errors import BitPolicyError


@contextmanager
def nothing_missing() -> Iterator[None]:
    """While the block runs, `from_pretrained` of both libraries' models refuses files that lack tensors of the model.

    Raises:
        BitPolicyError: in the block, when a file lacks tensors.
    """
    usual = {library: vars(library)["from_pretrained"] for library in (ModelMixin, PreTrainedModel)}
    try:
        for library, loads in usual.items():
            library.from_pretrained = classmethod(_whole(loads.__func__))
        yield
    finally:
        for library, loads in usual.items():
            library.from_pretrained = loads


def _whole(loads: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(loads)
    def from_pretrained(cls: type[Any], *args: Any, **kwargs: Any) -> Any:
        wanted = kwargs.pop("output_loading_info", False)
        model, info = loads(cls, *args, output_loading_info=True, **kwargs)
        missing, more = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
        if missing:
            place = _place(*args, **kwargs)
            also = f", and have {len(more)} that the model does not have, e.g. {more[0]}" if more else ""
            raise BitPolicyError(
                f"the files of {cls.__name__} in {place} lack {len(missing)} tensors, e.g. {missing[0]}{also}: weights "
                "and config.json do not belong together, or the file is damaged; download or export it again"
            )
        return (model, info) if wanted else model

    return from_pretrained


def _place(pretrained_model_name_or_path: Any = None, *args: Any, subfolder: str = "", **kwargs: Any) -> str:
    return "/".join(filter(None, (str(pretrained_model_name_or_path), subfolder)))
