"""What an autoencoder makes of the final latent, caught while a pipeline runs.

The layers of an autoencoder have no say in the final latent. Where one is studied, all errors are therefore errors of
the image: of what `decode` gives, taken from [-1, 1] to [0, 1] and clamped, as pipelines of diffusers do next. The
clamp belongs to it: a pixel that is white already shows no error that makes it whiter, and the mean squared error
of such images is the one that PSNR and the study's trials see. What pipelines do after that (watermarks, safety
checkers, PIL) is not differentiable, and the loop is left before it.
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
    """Catches what the autoencoder decodes from the final latent.

    Args:
        autoencoder: whose `decode` is watched.
        steps: tells how many scheduler steps were taken.
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
        """Args:
        leave_after: raise `Decoded` after so many calls; 0 never does.
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
        """What was decoded after the last step, in [0, 1], in the compute dtype; chunks of a batch are put together.

        The graph, if there is one, is given away with it.

        Raises:
            BitPolicyError: the pipeline decoded nothing.
        """
        made, self._made = self._made, []
        if not made:
            raise BitPolicyError(
                f"the pipeline makes its images without decode of {type(self._autoencoder).__name__}; "
                "leave the autoencoder out of --component"
            )
        last = max(step for step, _ in made)
        return (torch.cat([image for step, image in made if step == last]) / 2 + 0.5).clamp(0, 1)
