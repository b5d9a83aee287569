"""The Mosaic GPU kernel body: two compute warpgroups and one memory warpgroup over one list of query tiles.

A pipeline step is 128 keys: two key tiles that need not be neighbours, copied by TMA into the two halves of one
buffer. The steps of a query tile are, in order,

1. the diagonal, under the causal mask;
2. band and block tiles, without any mask;
3. steps with a bias row of 0 and -inf: gathered columns, at most one whole tile paired with the first of them, and
   a missing second half.

A thread block computes a chain of query tiles. Its memory warpgroup runs ahead into the next one, whose first step the
compute warpgroups begin beside the last step of the one before (`compute`; `serial` does not).
"""

from __future__ import annotations

from typing import Any

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import axes
from pallas_kernels.hopper import compute, serial
from pallas_kernels.hopper.buffers import Buffers
from pallas_kernels.hopper.config import COMPUTE_WARPGROUPS
from pallas_kernels.hopper.launch import Launch
from pallas_kernels.hopper.load import load
from pallas_kernels.hopper.warpgroup import Warpgroup
from pallas_kernels.launches import Refs

_MEMORY = COMPUTE_WARPGROUPS  # index of the memory warpgroup


def kernel_body(launch: Launch, refs: Refs, scratch: dict[str, Any]) -> None:
    """What one thread block does."""
    warpgroup = lax.axis_index(axes.WARPGROUP)

    @pl.when(warpgroup == _MEMORY)
    def _():
        if launch.config.overlap:
            plgpu.set_max_registers(launch.config.memory_registers, action="decrease")

        # One warp: the other three would only repeat its instructions.
        @plgpu.warp_map
        def _(warp):
            @pl.when(warp == 0)
            def _():
                load(launch, refs, Buffers.written(launch, scratch))

    @pl.when(warpgroup < _MEMORY)
    def _():
        group = Warpgroup(launch, refs, Buffers.read(launch, scratch), warpgroup)
        if launch.config.overlap:
            plgpu.set_max_registers(launch.config.compute_registers, action="increase")
            compute.compute(group)
        else:
            serial.compute(group)
