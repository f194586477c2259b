"""Gradients reach weights behind methods under `no_grad` and behind objects that hold tensors."""

from __future__ import annotations

from types import SimpleNamespace

import diffusers
import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.policies.target import Target
from bitpolicy.sensitivity.trajectory.graphless_methods import gradients_pass
from bitpolicy.sensitivity.trajectory.opened_objects import opened


class Experts(nn.Module):
    """Each token goes to the first expert, then to the second: twice added to in place, as HiDream does."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(3, 3, bias=False) for _ in range(2)])

    @torch.no_grad()
    def chosen(self, x: torch.Tensor) -> torch.Tensor:
        total, place = torch.zeros_like(x), torch.zeros(x.shape, dtype=torch.long)
        for expert in self.experts:
            total.scatter_reduce_(0, place, expert(x), reduce="sum")
        return total

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.chosen(x)


def test_gradients_pass_through_methods_decorated_with_no_grad_and_only_inside_the_block() -> None:
    model, x = Experts(), torch.randn(2, 3)
    with gradients_pass(model):
        found = model(x)
        found.sum().backward()
    assert torch.equal(found, model(x))
    for expert in model.experts:
        assert torch.allclose(expert.weight.grad, x.sum(0).expand(3, 3))
    assert not model(x).requires_grad


def test_an_object_with_tensors_opens_and_closes_as_itself_with_the_tensors_it_is_given() -> None:
    inner = SimpleNamespace(key=torch.ones(2), length=3)
    cache = SimpleNamespace(layers=[inner], none=None)
    leaves, spec = pytree.tree_flatten(opened((cache, "text")))
    assert [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)] == [inner.key]
    doubled = [2 * leaf if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    found, text = pytree.tree_unflatten(doubled, spec)
    assert found is cache
    assert cache.layers[0] is inner
    assert torch.equal(inner.key, torch.full((2,), 2.0))
    assert (inner.length, cache.none, text) == (3, None, "text")


def test_a_modular_pipeline_is_refused_in_one_line() -> None:
    with pytest.raises(BitPolicyError, match="FluxModularPipeline is a modular pipeline") as caught:
        Target.chosen(diffusers.FluxModularPipeline())
    assert "\n" not in str(caught.value)
