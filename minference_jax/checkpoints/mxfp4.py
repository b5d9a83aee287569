"""MXFP4, the format of gpt-oss's experts: 32 numbers of 4 bits (e2m1) share a power of two (e8m0).

A Hugging Face checkpoint has two tensors of bytes for each weight `[e, in, out]`, summed axis last: `<name>_blocks`
`[e, out, in / 32, 16]`, two numbers a byte, the low half first, and `<name>_scales` `[e, out, in / 32]`.
Format: OCP Microscaling Formats (MX) Specification 1.0; layout: `integrations/mxfp4.py` of transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import ml_dtypes
import numpy as np
from jaxtyping import UInt8

BLOCKS, SCALES = "_blocks", "_scales"
_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_NUMBERS = np.array([*_POSITIVE, *(-x for x in _POSITIVE)], np.float32)
_PAIRS = np.stack([_NUMBERS[np.arange(256) % 16], _NUMBERS[np.arange(256) // 16]], axis=-1)


def weights_in(names: Iterable[str]) -> list[str]:
    """The weights of which both tensors are there."""
    names = set(names)
    whole = [name.removesuffix(BLOCKS) for name in names if name.endswith(BLOCKS)]
    return sorted(name for name in whole if f"{name}{SCALES}" in names)


def shape(blocks: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, ...]:
    """The shape `[e, in, out]` of a weight, from those of its tensors. Raises `ValueError` where they do not fit."""
    if len(blocks) != 4 or blocks[3] != 16 or blocks[:3] != scales:
        raise ValueError(f"blocks {blocks} and scales {scales} are no MXFP4 weight [experts, out, in / 32, 16]")
    return blocks[0], 32 * blocks[2], blocks[1]


def decode(
    read: Callable[[str], UInt8[np.ndarray, "e out ..."]], name: str
) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    """The weight `[e, in, out]` in bfloat16, which holds every product of number and scale exactly.

    One expert after another: a layer of gpt-oss-120b would be 17 GB in float32.
    """
    blocks, scales = read(f"{name}{BLOCKS}"), read(f"{name}{SCALES}")
    out = np.empty(shape(blocks.shape, scales.shape), ml_dtypes.bfloat16)
    for expert, (numbers, powers) in enumerate(zip(blocks, scales, strict=True)):
        values = _PAIRS[numbers].reshape(*powers.shape, 32)
        scaled = np.ldexp(values, powers.astype(np.int32)[..., None] - 127)
        out[expert] = scaled.reshape(len(scaled), -1).T
    return out
