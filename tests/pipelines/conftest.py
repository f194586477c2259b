"""Fixtures: toy pipelines as subjects of experiments."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import diffusers
import pytest
import torch
import toy_subject
from toy_pipelines import TOYS
from toy_subject import Subject


@pytest.fixture(scope="module", autouse=True)
def quiet_diffusers() -> Iterator[None]:
    """Silence diffusers: toys are cast and called in ways that it advises against."""
    before = diffusers.logging.get_verbosity()
    diffusers.logging.set_verbosity_error()
    yield
    diffusers.logging.set_verbosity(before)


@pytest.fixture(scope="session")
def new_subject() -> Callable[..., Subject]:
    """`new_subject("FluxPipeline", dtype, scheduler, components, **call)`: a new toy with float16 values as weights."""
    return lambda name, *args, **options: toy_subject.subject_of(TOYS[name], *args, **options)


@pytest.fixture(scope="session")
def made_up_means() -> Callable[[Subject], dict[str, torch.Tensor]]:
    return toy_subject.made_up_means
