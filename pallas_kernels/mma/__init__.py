"""The kernel of every NVIDIA GPU since Ampere: warp-level products (ldmatrix, mma.sync), copies by cp.async or TMA."""
