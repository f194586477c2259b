"""Packed layers: `nn.Linear` and `nn.Conv1d/2d/3d` whose weight stays quantized in memory.

A packed layer holds the tensors of its format as buffers (`weight_packed`, `weight_scale`, ...). It multiplies with the
weight dequantized to the dtype of its input, and so gives the same bits as an ordinary layer with the dequantized
weight. `bitpolicy.kernels.dispatch` chooses the kernel. `set_compute` can allow a layer to round its inputs too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import nn

from bitpolicy.kernels.dispatch import effective
from bitpolicy.kernels.errors import FormatError
from bitpolicy.kernels.formats.format import Format
from bitpolicy.kernels.kernel import Compute, Geometry, PackedWeight
from bitpolicy.kernels.ops import product

_KEPT = "_kept_weight"  # attribute in which a layer caches the result of `_kept`
Quantizable = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


class _Dequantized(torch.Tensor):
    """A dequantized weight that knows its layer, so that an edit through `.data` (LoRA fusing) is quantized back."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    owner: PackedLayer

    @property
    def data(self) -> torch.Tensor:
        return self.detach().as_subclass(torch.Tensor)

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        self.owner.set_weight(value)


class PackedLayer(nn.Module):
    """The common base of packed layers.

    Attributes:
        format: the storage format of the weight.
        weight_shape: (out, in/groups, *kernel).
        compute_dtype: dtype of `weight`; follows `.to(dtype)`. The packed tensors never change dtype.
        compute: what its product may round in addition to the weight.
        low_memory: kernels may not keep layouts of the weight between calls.
    """

    format: Format
    weight_shape: tuple[int, ...]
    compute_dtype: torch.dtype
    compute: Compute = Compute.EXACT
    low_memory: bool = False
    bias: Any
    padding_mode: Any

    def __new__(cls, *sizes: Any, **settings: Any) -> Any:
        """`type(packed)(in, out, ...)` is an ordinary layer; a packed one is made by `pack_layer`.

        peft makes the small convolutions of a LoRA by calling the class of the layer that they go on, and there is no
        other place to step in: diffusers builds the LoRA's config itself, so that peft cannot be given classes of ours,
        and a class that is no subclass of `nn.Conv2d` gets no LoRA at all.
        """
        return _PLAIN[cls](*sizes, **settings) if sizes or settings else super().__new__(cls)

    def _hold(
        self, format: Format, shape: tuple[int, ...], dtype: torch.dtype, tensors: Mapping[str, torch.Tensor]
    ) -> None:
        self.format, self.weight_shape, self.compute_dtype = format, shape, dtype
        self._suffixes = tuple(tensors)
        for suffix, tensor in tensors.items():
            self.register_buffer(suffix, tensor)

    def packed_tensors(self) -> dict[str, torch.Tensor]:
        """The stored tensors by suffix."""
        return {suffix: self._buffers[suffix] for suffix in self._suffixes}  # type: ignore[misc]

    def held(self) -> PackedWeight:
        """The weight in the form that kernels take."""
        return self._kept()[0]

    def _kept(self) -> tuple[PackedWeight, tuple[int, ...], tuple[Any, ...]]:
        """The weight, the padding that `pad` must add to an input, and the settings both were made from. Cached.

        The tensors are not cached: they may move or be replaced at any time, so they are read from the layer's buffers.
        """
        if torch.compiler.is_compiling() or len(self._buffers) != len(self._suffixes):
            return self._made(self.packed_tensors(), ())
        settings = (self.format, self.weight_shape, self.low_memory, *self._slides())
        kept = self.__dict__.get(_KEPT)
        if kept is None or kept[2] != settings or kept[0].tensors is not self._buffers:  # a replica has its own buffers
            kept = self.__dict__[_KEPT] = self._made(self._buffers, settings)
        return kept

    def _made(self, tensors: Any, settings: tuple[Any, ...]) -> tuple[PackedWeight, tuple[int, ...], tuple[Any, ...]]:
        weight = PackedWeight(self.format, self.weight_shape, tensors, slides(self), self.low_memory)
        return weight, () if weight.geometry is None else _padding(self)[0], settings

    def _slides(self) -> tuple[Any, ...]:
        """The attributes that `slides` reads."""
        return ()

    def __getstate__(self) -> dict[str, Any]:
        """The state for copies and pickles, without the cache."""
        return {name: value for name, value in self.__dict__.items() if name != _KEPT}

    @property
    def effective_compute(self) -> Compute:
        """What this layer really rounds: where 8-bit inputs were requested, some layers stay exact."""
        return effective(self.compute, self.held())

    def call(self, input: torch.Tensor) -> tuple[torch.Tensor, PackedWeight, torch.Tensor | None, Compute]:
        """The arguments of `product` for an input, which is autocast, padded and batched as needed."""
        weight, around, _ = self._kept()
        if around:
            mode: Any = "constant" if self.padding_mode == "zeros" else self.padding_mode
            input = nn.functional.pad(input, around, mode=mode)
        own, compute = self._parameters, effective(self.compute, weight)
        bias = own["bias"] if "bias" in own else self.bias  # noqa: SIM401 - avoids `__getattr__`, the slowest step here
        ours = compute is not Compute.EXACT or torch.compiler.is_compiling()  # autocast covers only torch's operators
        if ours and torch.is_autocast_enabled(input.device.type):
            input = input.to(torch.get_autocast_dtype(input.device.type))
            bias = None if bias is None else bias.to(input.dtype)
        return input, weight, bias, compute

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight, shape `weight_shape`, contiguous."""
        return self.format.dequantize(self.packed_tensors(), self.weight_shape, dtype)

    def set_weight(self, weight: torch.Tensor) -> None:
        """Quantize `weight`, shape `weight_shape`, and store it in place of the current one.

        Raises:
            FormatError: it has another shape, or the format cannot store it.
        """
        if tuple(weight.shape) != self.weight_shape:
            raise FormatError(f"the layer's weight has shape {self.weight_shape}, got {tuple(weight.shape)}")
        for suffix, tensor in self.format.quantize(weight).items():
            self._buffers[suffix] = tensor.to(self._buffers[suffix].device)  # type: ignore[union-attr]

    @property
    def weight(self) -> torch.Tensor:
        view = self.dequantize(self.compute_dtype)
        if torch.compiler.is_compiling():  # traced code edits no weight, and uses its own tensor class
            return view
        view = view.as_subclass(_Dequantized)
        view.owner = self
        return view

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PackedLayer:
        """`.to()`, `.half()` and similar: packed tensors change device but keep their dtype."""
        before = self.packed_tensors()
        super()._apply(fn, recurse)
        for suffix, tensor in before.items():
            after = self._buffers[suffix]
            if after is not None and after.dtype != tensor.dtype:
                self._buffers[suffix] = tensor.to(after.device)
        probe = fn(torch.empty(0, dtype=self.compute_dtype))
        if probe.dtype.is_floating_point and probe.dtype.itemsize >= 2:
            self.compute_dtype = probe.dtype
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, format={self.format.name}"


class PackedLinear(PackedLayer, nn.Linear):  # type: ignore[override] # its weight is computed
    """A linear layer with a packed weight."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return product(*self.call(input))


class _PackedConv(PackedLayer):
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        y = product(*self.call(input))
        return y[0] if self._is_single(input) else y

    def call(self, input: torch.Tensor) -> tuple[torch.Tensor, PackedWeight, torch.Tensor | None, Compute]:
        return super().call(input[None] if self._is_single(input) else input)

    def _slides(self) -> tuple[Any, ...]:
        conv: Any = self
        around = tuple(conv._reversed_padding_repeated_twice)
        return self.stride, self.dilation, self.groups, conv.padding_mode, around

    def _is_single(self, input: torch.Tensor) -> bool:
        return input.ndim == 1 + len(self.stride)


class PackedConv1d(_PackedConv, nn.Conv1d):  # type: ignore[override]
    """A convolution over one dimension with a packed weight."""


class PackedConv2d(_PackedConv, nn.Conv2d):  # type: ignore[override]
    """A convolution over two dimensions with a packed weight."""


class PackedConv3d(_PackedConv, nn.Conv3d):  # type: ignore[override]
    """A convolution over three dimensions with a packed weight."""


def slides(layer: nn.Module) -> Geometry | None:
    """How a convolution, packed or not, slides over its padded input; None for a linear layer."""
    if isinstance(layer, nn.Linear):
        return None
    conv: Any = layer
    return Geometry(tuple(conv.stride), _padding(conv)[1], tuple(conv.dilation), conv.groups)


def _padding(layer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The padding that `pad` must add first, and the zeros that the convolution itself adds on each side.

    Read at each call, because people change `padding_mode` of a loaded model to draw seamless tiles.
    """
    around = tuple(layer._reversed_padding_repeated_twice)
    low, high = around[-2::-2], around[-1::-2]  # one pair per dimension, the last dimension first
    if layer.padding_mode == "zeros" and low == high:
        return (), low
    return around, (0,) * len(low)


_PACKED: dict[type[nn.Module], type[PackedLayer]] = {
    nn.Linear: PackedLinear,
    nn.Conv1d: PackedConv1d,
    nn.Conv2d: PackedConv2d,
    nn.Conv3d: PackedConv3d,
}
_PLAIN: dict[type[nn.Module], type[nn.Module]] = {packed: plain for plain, packed in _PACKED.items()}


class HasModules(Protocol):
    """What names its modules: a model, or several models together."""

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """(module path, module), each module once."""


def quantizable_layers(model: HasModules) -> Iterator[tuple[str, Quantizable]]:
    """(module path, layer) of every layer a format can be given to, in the model's own order.

    Subclasses of the torch layers are skipped, because their forward may do more than multiply. So are layers that
    share their weight with another module, as an output head does with an embedding: packing would store it twice.
    """
    named = list(model.named_modules())
    owned = (weight for _, module in named for weight in module._parameters.values() if weight is not None)
    uses = Counter(map(id, owned))
    for name, module in named:
        if not isinstance(module, Quantizable) or type(module) not in _PACKED:
            continue
        if uses[id(module._parameters.get("weight"))] == 1:
            yield name, module


def unsupported_layers(model: HasModules) -> Iterator[tuple[str, nn.Module]]:
    """(module path, layer) of what multiplies with a weight of two or more dimensions and no format can be given to.

    These are transposed convolutions, subclasses of the torch layers, and layers that share their weight. Embeddings
    are not included: they look up and do not multiply.
    """
    known = {name for name, _ in quantizable_layers(model)}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.ndim > 1 and name not in known and not isinstance(module, nn.Embedding):
            yield name, module


def packed_layers(model: HasModules) -> Iterator[tuple[str, PackedLayer]]:
    """(module path, layer) of every packed layer."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, PackedLayer))


def replace_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put `layer` at the module path `name`."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)


def pack_layer(layer: Quantizable, format: Format, tensors: Mapping[str, torch.Tensor]) -> PackedLayer:
    """A packed copy of `layer` that holds `tensors` (real or on `meta`) and shares its bias.

    Raises:
        FormatError: this type of layer cannot be packed.
    """
    kind = _PACKED.get(type(layer))
    if kind is None:
        raise FormatError(
            f"{type(layer).__name__} cannot be packed; supported are {', '.join(t.__name__ for t in _PACKED)}"
        )
    packed = _like(layer, kind)
    packed._hold(format, tuple(layer.weight.shape), layer.weight.dtype, tensors)
    return packed


def unpack_layer(packed: PackedLayer) -> nn.Module:
    """The ordinary layer with the dequantized weight. It shares the bias."""
    plain = _like(packed, _PLAIN[type(packed)])
    plain.weight = nn.Parameter(packed.dequantize(packed.compute_dtype), requires_grad=False)
    return plain


def _like(layer: nn.Module, kind: type[Any]) -> Any:
    """A bare module of class `kind` with the geometry, bias and mode of `layer`, but no weight.

    Nothing else is copied: a `forward` that a library set on this one instance (accelerate, diffusers' hooks,
    `Module.compile`) refers to the old layer.
    """
    other = object.__new__(kind)
    nn.Module.__init__(other)
    for attribute in _GEOMETRY[kind]:
        setattr(other, attribute, getattr(layer, attribute))
    other.training = layer.training
    other.register_parameter("bias", layer.bias)
    return other


def _geometry(plain: Callable[..., nn.Module], *sizes: int) -> set[str]:
    """The attributes that torch keeps on such a layer, apart from its tensors."""
    return set(vars(plain(*sizes, device="meta"))) - set(vars(nn.Module()))


_OF_CONVOLUTIONS = _geometry(nn.Conv1d, 1, 1, 1)
_GEOMETRY: dict[type[nn.Module], set[str]] = {
    kind: _geometry(nn.Linear, 1, 1) if plain is nn.Linear else _OF_CONVOLUTIONS
    for packed, plain in _PLAIN.items()
    for kind in (packed, plain)
}
