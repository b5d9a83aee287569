"""The kernel of Hopper GPUs (compute capability 9.0): warpgroup products (wgmma), TMA copies, one memory warp."""
