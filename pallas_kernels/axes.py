"""Names of the kernels' axes: of their grids, and of the warpgroups of a thread block.

Inside `jax.shard_map`, Pallas takes a name that the mesh has too for the mesh's axis, without a word: every thread
block of a device would then do the work of the same one. No mesh has these names.
"""

HEAD, ROWS, CHUNK, BLOCK, WARPGROUP = (
    f"pallas_kernels.{name}" for name in ("head", "rows", "chunk", "block", "warpgroup")
)
