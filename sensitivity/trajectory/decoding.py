"""Captures what an autoencoder decodes from the final latent while a pipeline runs.

The layers of an autoencoder do not affect the final latent. If an autoencoder is studied, all errors are therefore
errors of the image: the output of `decode`, mapped from [-1, 1] to [0, 1] and clamped, as diffusers' pipelines do next.
The clamp is included because a pixel that is already white does not show an error that makes it whiter, and because
PSNR and the study's trials use the mean squared error of clamped images. What pipelines do afterwards (watermarks,
safety checkers, PIL) is not differentiable, so the pipeline is left before that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from bitpolicy.kernels.errors import BitPolicyError


class Decoded(BaseException):
    """Leaves a pipeline once the image is decoded."""


@contextmanager
def replaced_method(module: Any, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """While the block runs, the method `name` of `module` is `wrap(method)`."""
    original, own = getattr(module, name), vars(module).get(name)
    setattr(module, name, wrap(original))
    try:
        yield
    finally:
        if own is None:
            delattr(module, name)
        else:
            setattr(module, name, own)


class Decoding:
    """Captures what the autoencoder decodes from the final latent.

    Args:
        autoencoder: the model whose `decode` is watched.
        steps: returns the number of scheduler steps taken so far.
    """

    def __init__(self, autoencoder: nn.Module, steps: Callable[[], int]) -> None:
        self._autoencoder, self._steps = autoencoder, steps
        self._made: list[tuple[int, torch.Tensor]] = []

    @property
    def calls(self) -> int:
        """How often `decode` was called in the last run."""
        return len(self._made)

    @contextmanager
    def watched(self, leave_after: int = 0) -> Iterator[None]:
        """Watch `decode` while the block runs.

        Args:
            leave_after: raise `Decoded` after this many calls; 0 means never.
        """
        self._made = []

        def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
            def decode(*args: Any, **kwargs: Any) -> Any:
                result = original(*args, **kwargs)
                self._made.append((self._steps(), result[0]))
                if len(self._made) == leave_after:
                    raise Decoded
                return result

            return decode

        with replaced_method(self._autoencoder, "decode", wrap):
            yield

    def images(self) -> torch.Tensor:
        """The images decoded after the last step, in [0, 1], in the compute dtype. Chunks of a batch are concatenated.

        The result holds the graph, if there is one; nothing else keeps it.

        Raises:
            BitPolicyError: the pipeline decoded nothing.
        """
        made, self._made = self._made, []
        if not made:
            raise BitPolicyError(
                f"the pipeline makes its images without calling decode of {type(self._autoencoder).__name__}; "
                "leave the autoencoder out of --component"
            )
        last = max(step for step, _ in made)
        return (torch.cat([image for step, image in made if step == last]) / 2 + 0.5).clamp(0, 1)
