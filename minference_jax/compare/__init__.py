"""JAX against PyTorch on the same weights and tokens. PyTorch runs in a process of its own, in any interpreter."""

from minference_jax.compare.api import compare as compare
from minference_jax.compare.api import run_compare as run_compare
from minference_jax.compare.comparison import Comparison as Comparison
from minference_jax.compare.comparison import LayerDifference as LayerDifference
from minference_jax.compare.comparison import Tolerance as Tolerance
from minference_jax.compare.outputs import Outputs as Outputs
from minference_jax.compare.report import comparison_table as comparison_table
from minference_jax.compare.task import TaskComparison as TaskComparison
from minference_jax.compare.task import compare_task as compare_task
from minference_jax.compare.torch_process import TorchError as TorchError
from minference_jax.compare.torch_process import TorchNotFoundError as TorchNotFoundError
from minference_jax.compare.torch_process import find_torch_python as find_torch_python
