"""Shared memory and barriers of one thread block: who fills which buffer, who reads it, and who waits for whom.

M is the warp that loads; C are the two compute warpgroups. Every step has a slot of K, V and bias buffers, its number
modulo `stages`; query tiles alternate between two buffers, which take their results as well.

| barrier | who arrives, and when | who waits, and before what | arrivals that complete it |
|---|---|---|---|
| `q_full` | M's copies of the queries, when they end | C: the first scores of a query tile | 2: one for each of C |
| `q_free` | C: the results have left the buffer | M: copying the queries of two tiles later | 2: both of C |
| `k_full` | M's copies of keys, when they end | C: the scores of the step | 2 key tiles x parts of a row |
| `k_free` | C: the scores are there, the bias is read | M: copying keys `stages` steps later | 2: both of C |
| `v_full` | M's copies of values, when they end | C: the product with the values | 2 key tiles x parts of a row |
| `v_free` | C: that product is there | M: copying values `stages` steps later | 2: both of C |
| `bias_full` | M's copy of the bias, when it ends | C: adding the bias; only in steps with a bias | 1 |

The bias has no `free`: M copies it after the keys of its step, and so after `k_free`. There are two of each `q_*`, and
one of each other barrier for every slot.

Nothing deadlocks as long as M loads in the order in which C wait: the queries of a tile, then for each step keys,
values and bias. What C begin ahead of time (`compute`) must not wait for something that M loads only after a buffer
that C free later: hence the special case of a lone step there. At its end M waits for every `free` still to come, so
that no arrival is left behind when the thread block ends.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.config import COMPUTE_WARPGROUPS, ROWS, STEP_KEYS
from pallas_kernels.hopper.launch import Launch
from pallas_kernels.launches import tile_transforms

QUERY_BUFFERS = 2
"""Query tiles whose rows, or results on their way out, are in shared memory at a time."""


@dataclasses.dataclass(frozen=True)
class Buffers:
    """References to the shared memory and the barriers of one thread block, as one kind of warpgroup sees them.

    - `q_smem` `[4, 64, h]`: queries, and later results, of two tiles of two warpgroups.
    - `k_smem`, `v_smem` `[stages, parts, 128, h / parts]`: keys and values of a step.
    - `bias_smem` `[stages, 128]`: what is added to a step's scores, a number a key.
    - `lse_smem` `[2, 64]`: the log-sum-exp on its way out; None if nobody asked for it.
    - the rest: barriers, as in the table above.
    """

    q_smem: Any
    k_smem: Any
    v_smem: Any
    bias_smem: Any
    q_full: Any
    q_free: Any
    k_full: Any
    k_free: Any
    v_full: Any
    v_free: Any
    bias_full: Any
    lse_smem: Any = None

    @staticmethod
    def written(launch: Launch, scratch: dict[str, Any]) -> Buffers:
        """For the warp that loads: K and V in the view that copies write."""
        return _viewed(launch, scratch, 0)

    @staticmethod
    def read(launch: Launch, scratch: dict[str, Any]) -> Buffers:
        """For the compute warpgroups: K and V in the view that wgmma reads."""
        return _viewed(launch, scratch, 1)


def _viewed(launch: Launch, scratch: dict[str, Any], view: int) -> Buffers:
    if not launch.two_views:
        return Buffers(**scratch)
    return Buffers(**scratch | {name: tuple(scratch[name])[view] for name in ("k_smem", "v_smem")})


def scratch_types(launch: Launch, with_lse: bool) -> dict[str, Any]:
    """What `Buffers` are made of, by field."""
    stages, dtype = launch.config.stages, launch.dtype
    parts, width = launch.parts, launch.part_width
    tiling, swizzle = tile_transforms(launch.head_dim)

    def rows_of(*shape: int):
        return plgpu.SMEM(shape, dtype, transforms=(tiling, swizzle))

    def loaded(*shape: int):
        # The same bytes twice. wgmma wants tiles of 8 rows, which leave rows of one swizzle width where they are; a
        # copy into the untiled view may start at any row of the source, one into the tiled view only at every eighth.
        if not launch.two_views:
            return rows_of(*shape)
        return plgpu.RefUnion(plgpu.SMEM(shape, dtype, transforms=(swizzle,)), rows_of(*shape))

    types = {
        "q_smem": rows_of(QUERY_BUFFERS * COMPUTE_WARPGROUPS, ROWS, launch.head_dim),
        "k_smem": loaded(stages, parts, STEP_KEYS, width),
        "v_smem": loaded(stages, parts, STEP_KEYS, width),
        "q_full": plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=QUERY_BUFFERS),
        "q_free": plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=QUERY_BUFFERS),
        "k_full": plgpu.Barrier(num_arrivals=2 * parts, num_barriers=stages),
        "v_full": plgpu.Barrier(num_arrivals=2 * parts, num_barriers=stages),
        "k_free": plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=stages),
        "v_free": plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=stages),
        "bias_smem": plgpu.SMEM((stages, STEP_KEYS), jnp.bfloat16),
        "bias_full": plgpu.Barrier(num_arrivals=1, num_barriers=stages),
    }
    if with_lse:
        types["lse_smem"] = plgpu.SMEM((COMPUTE_WARPGROUPS, ROWS), jnp.float32)
    return types
