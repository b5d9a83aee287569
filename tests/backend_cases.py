"""What every backend of attention is tested on: the calls, and for each backend what it serves and how it runs here.

To put a backend into the suite of `test_backends.py`, add a `UnderTest` to `UNDER_TEST`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from helpers import random_qkv
from plans import int32, random_plan

from pallas_kernels.backends import Backend, find_backend
from pallas_kernels.hopper.attention import hopper_attention
from pallas_kernels.hopper.config import KernelConfig
from pallas_kernels.mma import config as mma_config
from pallas_kernels.mma.attention import mma_attention


@dataclasses.dataclass(frozen=True)
class Case:
    """A call: q `[b, t, n, h]`, k and v `[b, s, k, h]`, a random plan with all parts, and where the queries stand."""

    b: int
    t: int
    s: int
    n: int
    k: int
    h: int
    dtype: str = "float32"
    lengths: tuple[int, ...] | None = None
    q_offset: int = 0
    scale: float | None = None
    widths: tuple[int, int, int] = (20, 4, 3)  # columns, bands, blocks

    @property
    def shape(self) -> tuple[Any, ...]:
        """What is static: cases of one shape share a compiled program."""
        return (self.b, self.t, self.s, self.n, self.k, self.h, self.dtype, self.scale, self.widths)

    def arguments(self, seed: int = 0) -> tuple[Any, ...]:
        """q, k, v, plan, lengths, q_offset."""
        rng = np.random.default_rng(seed)
        q, k, v = random_qkv(rng, self.b, self.t, self.s, self.n, self.k, self.h, self.dtype)
        columns, bands, blocks = self.widths
        plan = random_plan(rng, self.b, self.n, self.t, self.s, columns=columns, bands=bands, blocks=blocks)
        lengths = int32([self.s] * self.b if self.lengths is None else self.lengths)
        return q, k, v, plan, lengths, jnp.int32(self.q_offset)


ODD = Case(2, 300, 300, 4, 2, 64, lengths=(300, 77))
CACHE = Case(3, 257, 520, 4, 1, 96, q_offset=256, lengths=(513, 0, 300))  # fewer queries than keys
CASES: dict[str, Case] = {
    "odd-length-gqa2-unequal": ODD,
    "all-rows-padded": dataclasses.replace(ODD, lengths=(0, 0)),
    "lengths-on-tile-edges": dataclasses.replace(ODD, lengths=(256, 64)),
    "shorter-than-a-tile-gqa1": Case(1, 40, 40, 2, 2, 64),
    "one-token": Case(1, 1, 1, 2, 1, 64),
    "one-row-past-a-tile-of-a-cache-gqa4-h96": CACHE,
    "the-same-program-at-offset-0": dataclasses.replace(CACHE, q_offset=0, lengths=None),
    "gqa8-h128-peaked": Case(1, 130, 130, 8, 1, 128, scale=1.0),
    "h256": Case(1, 200, 200, 2, 1, 256),
    "bfloat16": dataclasses.replace(ODD, dtype="bfloat16", lengths=(300, 130)),
    "float16": dataclasses.replace(ODD, dtype="float16", lengths=(300, 130)),
}


@dataclasses.dataclass(frozen=True)
class Interpreted:
    """A kernel that a CPU runs in Pallas's interpreter, slowly: its function, its configuration, and a few cases.

    `cases`: name → (case, fields of the configuration).
    """

    attend: Callable[..., Any]
    config: Callable[..., Any]
    cases: Mapping[str, tuple[Case, dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class UnderTest:
    """A backend in the suite: what it serves, and if it is a GPU's kernel, how it is interpreted."""

    name: str
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    head_dims: tuple[int, ...] | None = None  # None: any
    interpreted: Interpreted | None = None

    @property
    def backend(self) -> Backend:
        return find_backend(self.name)

    def kernel_cases(self) -> list[str]:
        """Names of the cases that run in the interpreter."""
        return [] if self.interpreted is None else list(self.interpreted.cases)

    def serves(self, case: Case) -> bool:
        return case.dtype in self.dtypes and (self.head_dims is None or case.h in self.head_dims)


HOPPER_CASES = {
    "every-part-two-sequences-offset-D64": (
        Case(2, 140, 300, 2, 1, 64, "bfloat16", lengths=(260, 100), q_offset=128, widths=(40, 3, 3)),
        {"lanes": 2, "chain": 2},
    ),
    # Running maxima grow. One thread block for all query tiles, those of no step and of one step among them: what runs
    # ahead must not wait for what comes behind it.
    "one-chain-T261-D96-fp16": (
        Case(2, 261, 261, 1, 1, 96, "float16", lengths=(261, 130), scale=1.0, widths=(70, 2, 1)),
        {"lanes": 1, "chain": None, "polynomial_tiles": 4},
    ),
    # Lists of blocks alone, which come in an order of their own.
    "chains-of-four-without-bands": (
        Case(1, 520, 520, 2, 1, 64, "bfloat16", lengths=(500,), widths=(0, 0, 3)),
        {"lanes": 2, "chain": 4},
    ),
    "no-overlap": (
        Case(1, 130, 260, 1, 1, 64, "bfloat16", lengths=(250,), q_offset=128, widths=(70, 2, 1)),
        {"overlap": False, "lanes": 1},
    ),
}

MMA_CASES = {
    "every-part-two-sequences-offset-D64": (HOPPER_CASES["every-part-two-sequences-offset-D64"][0], {"tma": True}),
    "32-keys-three-stages-T261-D96-fp16": (
        HOPPER_CASES["one-chain-T261-D96-fp16"][0],
        {"step_keys": 32, "stages": 3, "tma": True},
    ),
    "64-rows-32-keys-D256": (
        Case(1, 200, 330, 2, 1, 256, "bfloat16", lengths=(320,), q_offset=128, widths=(70, 2, 1)),
        {"rows": 64, "step_keys": 32, "tma": True},
    ),
}

HALF = ("bfloat16", "float16")
UNDER_TEST = (
    UnderTest("xla"),
    UnderTest("hopper", HALF, (64, 96, 128), Interpreted(hopper_attention, KernelConfig, HOPPER_CASES)),
    UnderTest("mma", HALF, mma_config.HEAD_DIMS, Interpreted(mma_attention, mma_config.KernelConfig, MMA_CASES)),
)
