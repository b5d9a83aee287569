"""JAX against PyTorch on the same weights and tokens. PyTorch runs in a process of its own, in any interpreter."""

from minference_jax.compare.torch_process import TorchError as TorchError
from minference_jax.compare.torch_process import TorchNotFoundError as TorchNotFoundError
from minference_jax.compare.torch_process import find_torch_python as find_torch_python
