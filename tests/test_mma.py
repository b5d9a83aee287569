"""The warp-level kernel: lowered for CUDA in both forms without a GPU, its configurations, and what chooses it."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.mosaic import gpu as mgpu
from test_hopper import SHAPES, avals, lowered

from pallas_kernels import SparsePlan, choose_implementation
from pallas_kernels.device import Device
from pallas_kernels.mma.attention import mma_attention
from pallas_kernels.mma.config import BLOCK_SHARED_MEMORY, HEAD_DIMS, KernelConfig, default_config

CASES = SHAPES | {"every-part-D256": avals(1, 4096, 4096, 8, 2, 256, columns=128, bands=9, blocks=5)}


def pretend(monkeypatch, capability):
    """Mosaic asks the default device for its compute capability, and assumes 9.0 without one."""
    for module in (mgpu.utils, mgpu.core.utils):
        monkeypatch.setattr(module, "_infer_arch", lambda: capability)


@pytest.mark.parametrize("capability", [(8, 0), (12, 0)], ids=["cp.async", "TMA"])
@pytest.mark.parametrize("shapes", CASES.values(), ids=CASES.keys())
def test_lowers_for_cuda_in_both_forms(monkeypatch, capability, shapes):
    pretend(monkeypatch, capability)

    def attend(q, k, v, plan, lengths, q_offset):
        return mma_attention(q, k, v, plan, lengths=lengths, q_offset=q_offset, return_lse=True)

    assert "mosaic_gpu" in lowered(attend, *shapes)


@pytest.mark.parametrize("capability", BLOCK_SHARED_MEMORY)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_default_configurations_fit(capability, head_dim):
    assert default_config(head_dim, capability).fits(head_dim, capability)


def test_configurations_that_cannot_run_are_refused(monkeypatch):
    for bad in ({"rows": 32}, {"step_keys": 128}, {"stages": 1}):
        with pytest.raises(ValueError):
            KernelConfig(**bad)
    pretend(monkeypatch, (8, 6))
    q, k, v, *_ = avals(1, 128, 128, 1, 1, 128)
    with pytest.raises(ValueError, match=r"shared memory.*8\.6"):
        lowered(lambda q, k, v: mma_attention(q, k, v, SparsePlan(), config=KernelConfig(stages=3)), q, k, v)


@pytest.mark.parametrize("capability", ["8.0", "8.6", "8.9", "10.0", "12.0"])
def test_serves_every_gpu_that_the_hopper_kernel_does_not(capability):
    q, k, v, *_ = avals(1, 128, 128, 2, 1, 128)
    choice = choose_implementation(q, k, v, SparsePlan(), device=Device("gpu", capability))
    assert choice.name == "mma" and capability in choice.reason


def test_serves_wide_heads_on_hopper_gpus():
    q, k, v, *_ = avals(1, 128, 128, 2, 1, 256)
    choice = choose_implementation(q, k, v, SparsePlan(), device=Device("gpu", "9.0"))
    assert choice.name == "mma" and "head_dim" in choice.reason
    assert choose_implementation(q, k, v, SparsePlan(), device=Device("cpu")).name == "xla"


def test_cannot_serve_single_precision():
    q, k, v, *_ = avals(1, 128, 128, 2, 1, 128, dtype="float32")
    with pytest.raises(ValueError, match="float32"):
        jax.eval_shape(lambda q, k, v: mma_attention(q, k, v, SparsePlan()), q, k, v)
    assert jnp.float32 == q.dtype
