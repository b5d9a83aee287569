"""The warp-level kernel: lowered for CUDA in both forms without a GPU, its configurations, and what chooses it."""

import jax
import jax.numpy as jnp
import pytest
from test_hopper import SHAPES, avals, lowered

from pallas_kernels import SparsePlan, choose_implementation
from pallas_kernels.device import Device, lowering_for
from pallas_kernels.mma.attention import mma_attention
from pallas_kernels.mma.config import BLOCK_SHARED_MEMORY, HEAD_DIMS, KernelConfig, default_config

CASES = SHAPES | {"every-part-D256": avals(1, 4096, 4096, 8, 2, 256, columns=128, bands=9, blocks=5)}


@pytest.mark.parametrize("capability", ["8.0", "9.0", "12.0"], ids=["cp.async", "TMA", "cp.async-small-memory"])
@pytest.mark.parametrize("shapes", CASES.values(), ids=CASES.keys())
@pytest.mark.filterwarnings("ignore:.*Triton:DeprecationWarning")
def test_lowers_for_cuda_in_both_forms(capability, shapes):
    def attend(q, k, v, plan, lengths, q_offset):
        return mma_attention(q, k, v, plan, lengths=lengths, q_offset=q_offset, return_lse=True)

    with lowering_for(capability):
        assert "sparse_attention_mma" in lowered(attend, *shapes)


@pytest.mark.parametrize("capability", BLOCK_SHARED_MEMORY)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_default_configurations_fit(capability, head_dim):
    assert default_config(head_dim, capability).fits(head_dim, capability)


def test_configurations_that_cannot_run_are_refused():
    for bad in ({"rows": 32}, {"step_keys": 128}, {"stages": 1}):
        with pytest.raises(ValueError):
            KernelConfig(**bad)
    q, k, v, *_ = avals(1, 128, 128, 1, 1, 128)
    for config, reason in ((KernelConfig(stages=3), r"shared memory.*8\.6"), (KernelConfig(tma=True), r"TMA.*8\.6")):
        with lowering_for("8.6"), pytest.raises(ValueError, match=reason):
            lowered(lambda q, k, v, config=config: mma_attention(q, k, v, SparsePlan(), config=config), q, k, v)


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
