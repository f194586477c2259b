"""Bias correction removes the mean output error on the input it was calibrated with."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from bitpolicy.kernels.formats.named import format_named
from bitpolicy.kernels.quantizers.bias_correction import bias_shift, corrected_bias, mean_patch

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(67, 5), (8, 67)),
    "linear without a batch": (lambda: nn.Linear(67, 5), (67,)),
    "linear on tokens": (lambda: nn.Linear(16, 5), (2, 7, 16)),
    "linear on a grid": (lambda: nn.Linear(16, 5), (2, 3, 4, 16)),
    "conv1d": (lambda: nn.Conv1d(6, 4, 3, padding=1), (2, 6, 9)),
    "conv2d": (lambda: nn.Conv2d(5, 4, 3), (2, 5, 8, 8)),
    "conv2d without a batch": (lambda: nn.Conv2d(5, 4, 3, padding=1), (5, 8, 8)),
    "zero padding": (lambda: nn.Conv2d(5, 4, 3, padding=1), (2, 5, 8, 8)),
    "uneven zero padding": (lambda: nn.Conv2d(5, 4, (2, 3), padding=(0, 2)), (2, 5, 7, 8)),
    "same size": (lambda: nn.Conv2d(5, 4, (3, 5), padding="same"), (2, 5, 7, 8)),
    "no padding by name": (lambda: nn.Conv2d(5, 4, 3, padding="valid"), (2, 5, 7, 8)),
    "stride": (lambda: nn.Conv2d(5, 4, 3, stride=2, padding=1), (2, 5, 8, 9)),
    "stride that skips the rim": (lambda: nn.Conv2d(5, 4, 2, stride=(3, 2)), (2, 5, 9, 9)),
    "dilation": (lambda: nn.Conv2d(5, 4, 3, dilation=(2, 1), padding=2), (2, 5, 9, 9)),
    "stride and dilation": (lambda: nn.Conv2d(5, 4, 3, stride=2, dilation=2, padding=1), (2, 5, 10, 9)),
    "groups": (lambda: nn.Conv2d(6, 4, 3, groups=2, padding=1), (2, 6, 8, 8)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6), (2, 6, 8, 8)),
    "reflected": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (2, 3, 6, 6)),
    "replicated": (lambda: nn.Conv2d(3, 4, 3, padding=(2, 1), padding_mode="replicate"), (2, 3, 6, 6)),
    "circular": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (2, 3, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(3, 4, (1, 3, 2), stride=(1, 2, 1), padding=(0, 1, 1)), (1, 3, 4, 6, 5)),
}
every_layer = pytest.mark.parametrize(("make", "size"), LAYERS.values(), ids=LAYERS)


def tilted(size: tuple[int, ...]) -> torch.Tensor:
    """Inputs whose mean differs between positions and between channels."""
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(size, generator=draw)
    for dim, length in enumerate(size):
        x = x + torch.linspace(-1, 2, length).reshape(-1, *[1] * (len(size) - dim - 1))
    return x


def mean_output(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The mean over everything but the channel, float64."""
    with torch.no_grad():
        y = layer.double()(x.double())
    channel = y.ndim - 1 if isinstance(layer, nn.Linear) else y.ndim - len(layer.kernel_size) - 1
    return y.movedim(channel, 0).reshape(y.shape[channel], -1).mean(1)


@every_layer
@pytest.mark.parametrize("format", ["int4", "int8"])
def test_the_mean_error_of_the_output_vanishes(
    make: Callable[[], nn.Module], size: tuple[int, ...], format: str
) -> None:
    torch.manual_seed(0)
    layer = make()
    x = tilted(size)
    weight = layer.weight.detach().clone()
    patch = mean_patch(layer, x)
    expected = mean_output(layer, x)

    layer.weight.data = (
        format_named(format).dequantize(format_named(format).quantize(weight), weight.shape, torch.float32).double()
    )
    before = (mean_output(layer, x) - expected).abs().max()
    layer.bias.data += bias_shift(layer, layer.weight.detach() - weight, patch)
    after = (mean_output(layer, x) - expected).abs().max()

    assert before > 1e-4
    assert after < 1e-3 * before


@every_layer
def test_a_mean_patch_has_one_value_per_channel_and_tap(make: Callable[[], nn.Module], size: tuple[int, ...]) -> None:
    layer = make()
    patch = mean_patch(layer, torch.ones(size, dtype=torch.float16))
    channels = size[-1] if isinstance(layer, nn.Linear) else layer.in_channels
    assert patch.shape == (channels, *getattr(layer, "kernel_size", ()))
    assert patch.dtype == torch.float32


def test_a_mean_patch_includes_the_padding_zeros() -> None:
    patch = mean_patch(nn.Conv1d(1, 1, 3, padding=1), torch.ones(1, 1, 4))
    torch.testing.assert_close(patch, torch.tensor([[0.75, 1.0, 0.75]]))  # one window in four hangs over at either end


def test_a_mean_patch_averages_over_samples() -> None:
    layer = nn.Conv2d(3, 4, 3, stride=2, padding=1)
    x = tilted((4, 3, 7, 7))
    torch.testing.assert_close(mean_patch(layer, x), torch.stack([mean_patch(layer, one) for one in x]).mean(0))


def test_a_mean_patch_has_no_gradient() -> None:
    assert not mean_patch(nn.Linear(4, 2), torch.ones(3, 4, requires_grad=True)).requires_grad


def test_a_shift_cancels_the_mean_error() -> None:
    shift = bias_shift(nn.Linear(2, 2), torch.tensor([[1.0, 0.0], [0.5, -1.0]]), torch.tensor([3.0, 4.0]))
    assert shift.tolist() == [-3.0, 2.5]


def test_an_unchanged_weight_gives_no_shift() -> None:
    assert not bias_shift(nn.Conv2d(4, 6, 3, groups=2), torch.zeros(6, 2, 3, 3), torch.ones(4, 3, 3)).any()


@pytest.mark.parametrize(
    ("shift", "storage", "fits"),
    [
        ([65000.0, 0.0], torch.float16, True),
        ([65504.0, 16.0], torch.float16, False),  # 65520 rounds to Inf
        ([-70000.0, 0.0], torch.float16, False),
        ([70000.0, 0.0], torch.bfloat16, True),
        ([float("inf"), 0.0], torch.bfloat16, False),
        ([float("nan"), 0.0], torch.float16, False),
    ],
)
def test_a_bias_is_corrected_completely_or_not_at_all(shift: list[float], storage: torch.dtype, fits: bool) -> None:
    bias = torch.tensor([16.0, 1.0])
    found = corrected_bias(bias, torch.tensor(shift), storage)
    assert (found is not None) == fits
    if found is not None:
        assert torch.equal(found, (bias + torch.tensor(shift)).to(storage))
