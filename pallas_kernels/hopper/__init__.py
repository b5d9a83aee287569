"""The kernel for Hopper GPUs (compute capability 9.0): warpgroup products (wgmma), TMA copies, one warp that loads.

`attention` is the entry, `kernel` what a thread block does, `load` and `compute` (or `serial`) its two sides, `buffers`
the table of what they wait for, `registers` and `product` what they do within registers. `config` is the tuning.
"""
