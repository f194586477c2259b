"""How a product is divided into tiles: a short list of configurations, and the choice of one for a shape.

A program of the grid computes BN output channels of BM rows of the input (pixels of a convolution), in steps of BK
terms of the sum. A few tiles leave most of a GPU idle. In that case the sum itself is divided into `splits`, and a
second pass adds the parts in a fixed order, so results do not change from run to run. The choice depends only on the
shape, unless `tune` was called.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

_ENOUGH = 132  # programs that fill an H100; an A100 has 108 multiprocessors
_MOST_SPLITS = 16
_LEAST_STEPS = 4  # per split, so that the pipeline fills
_SHORTEST = 32  # smallest step of the sum
_FEW_ROWS = 64  # up to this many, reading the weight dominates, and twice as many programs read it faster


@dataclass(frozen=True)
class Config:
    """One way to divide a product.

    Attributes:
        bn: output channels of a tile.
        bm: rows or pixels of a tile.
        bk: terms of the sum that are loaded at a time.
        stages: loads in flight.
        splits: number of parts of the sum.
    """

    bn: int
    bm: int
    bk: int
    warps: int
    stages: int
    splits: int = 1


@dataclass(frozen=True)
class Product:
    """The properties of a product that the choice depends on.

    Attributes:
        rows: M, rows of the input, or pixels of a convolution's output.
        out: N.
        length: K.
        channels: of the input; a step of the sum that stays within one tap is fastest.
        bits: per weight as it is read, 4 or 8.
        integer: inputs are 8-bit integers.
        float8: inputs are 8-bit floats. If neither is set, inputs have 16 bits. With float8 each step has a separate
            sum, which doubles the registers for sums.
        run: the group size; 0 if scales are applied to the sum.
        warpgroups: whether the GPU multiplies with groups of four warps (Hopper), which frees registers for wide tiles.
    """

    rows: int
    out: int
    length: int
    channels: int
    bits: int
    integer: bool
    run: int = 0
    warpgroups: bool = True
    float8: bool = False


def configs(product: Product) -> list[Config]:
    """Configurations worth trying, the most promising first."""
    tiles = _tiles(product)
    narrowest = min(tile.bn for tile in tiles)
    cut = [replace(c, bk=_step(c.bk, product)) for c in tiles if c.bn < 2 * product.out or c.bn == narrowest]
    chosen = [c for c in (replace(c, splits=_splits(c, product)) for c in cut) if _fits(c, product)]
    return list(dict.fromkeys(sorted(chosen, key=lambda c: _waves(c, product))))


def _tiles(product: Product) -> list[Config]:
    """Tiles whose sums and operands fit the registers, which tests check for every GPU and product."""
    # If no step stays within a tap, each value of the input needs its own address and mask.
    if product.rows > 16 and product.channels % _SHORTEST:
        return [Config(64, 128, 32, 8, 3), Config(64, 64, 32, 8, 3)]
    wide = 128 if product.integer or product.float8 else 64
    square = Config(64, 64, wide, 8 if product.float8 else 4, 4)
    if product.rows <= 16:
        return [Config(64, 16, 128, 4, 4), Config(128, 16, 128, 8, 4), Config(32, 16, 128, 4, 4)]
    if product.rows <= 32:
        return [Config(64, 32, 128, 4, 4), Config(32, 32, 128, 4, 4)]
    if product.rows <= 64:
        return [square, Config(32, 64, wide, 4, 4)]
    if not product.warpgroups:
        return [Config(128, 128, 64, 8, 4), Config(64, 128, wide, 4, 3), square]
    widest = [] if product.float8 else [Config(128, 256, wide, 8, 3)]
    return [
        *widest,
        Config(128, 128, wide, 8, 4),
        Config(128, 64, wide, 8 if product.bits == 4 else 4, 4),
        square,
    ]


def _fits(config: Config, product: Product) -> bool:
    """Whether the addresses of the results leave enough registers. Those of split sums are longer."""
    return product.warpgroups or config.splits == 1 or config.bn * config.bm < 128 * 128


def _step(bk: int, product: Product) -> int:
    """The largest step up to `bk` that stays within one tap, unless it would be too short."""
    step = bk
    while step > _SHORTEST and product.channels % step:
        step //= 2
    return step if product.channels % step == 0 else min(bk, 64)


def _tile_count(config: Config, product: Product) -> int:
    return -(-product.rows // config.bm) * -(-product.out // config.bn)


def _splits(config: Config, product: Product) -> int:
    """As many splits as it takes to keep the GPU busy, if the parts stay long enough."""
    tiles, steps = _tile_count(config, product), -(-product.length // config.bk)
    enough = 2 * _ENOUGH if product.rows <= _FEW_ROWS else _ENOUGH
    splits = 1
    while splits < _MOST_SPLITS and tiles * splits * 2 <= enough and steps >= 2 * splits * _LEAST_STEPS:
        splits *= 2
    return splits


def _waves(config: Config, product: Product) -> float:
    """A rough time, in multiply-adds per multiprocessor: rounds of programs times the work of one."""
    programs = _tile_count(config, product) * config.splits
    rounds = -(-programs // _ENOUGH)
    reuse = 1 + 16 / config.bm + 16 / config.bn  # loads that a small tile repeats
    return rounds * config.bn * config.bm * (product.length / config.splits) * reuse


_tuning = False
_tuned: dict[object, Config] = {}


def tune(on: bool = True) -> None:
    """From now on, time the configurations once for each new shape and keep the fastest. Never during CUDA graph
    capture.

    INT8 products do not change by a bit; float products may sum in another order.
    """
    global _tuning
    _tuning = on


def choose(product: Product, key: object, time: Callable[[Config], float] | None) -> Config:
    """The configuration for a shape: the fastest if it was timed, else the most promising.

    Args:
        key: anything else that the choice depends on.
        time: seconds of the product under a configuration; None if timing is impossible.
    """
    known = _tuned.get((product, key))
    if known is not None:
        return known
    ways = configs(product)
    if not _tuning or time is None or len(ways) == 1:
        return ways[0]
    return _tuned.setdefault((product, key), min(ways, key=time))
