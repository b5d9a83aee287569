"""What programs hold that are made for each generation of GPUs, on a machine that has none of them."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from numpy_llama import random_llama

from minference_jax.attention import sparse_attention
from minference_jax.models import LlamaConfig, fp8
from minference_jax.patterns import VerticalSlash
from pallas_kernels import choose_implementation, dense_attention
from pallas_kernels.decode.attention import decode_attention
from pallas_kernels.decode.matvec import stacked_matvec, unsupported_reason
from pallas_kernels.device import GPUS, Device, lowering_for
from pallas_kernels.plan import SparsePlan
from pallas_kernels.xla import attention as xla

CONFIG = LlamaConfig(61, 128, 64, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=64)
BEFORE_HOPPER = ("8.0", "8.6", "8.9")
KERNELS = {capability: "sparse_attention_mma" for capability in GPUS} | {"9.0": "sparse_attention"}
WITH_FP8 = [capability for capability in GPUS if capability not in ("8.0", "8.6")]


def shapes(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def lowered(capability, call, *arguments):
    with lowering_for(capability):
        return jax.jit(call).trace(*shapes(arguments)).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("capability", GPUS)
@pytest.mark.filterwarnings("ignore:.*Triton:DeprecationWarning")
def test_prefill_holds_the_generations_kernel_and_no_attention_in_jnp(monkeypatch, capability):
    def refused(*_, **__):
        raise AssertionError("attention in jnp")

    monkeypatch.setattr(xla, "xla_attention", refused)
    model = random_llama(CONFIG, VerticalSlash(columns=16, tiles=2), "bfloat16")
    text = lowered(capability, lambda model, tokens: model.prefill(tokens)[0], model, jnp.zeros((1, 512), jnp.int32))
    assert KERNELS[capability] in text
    assert ("sparse_attention_mma" in text) == (capability != "9.0")
    for name in ("row_totals", "weights_by_key", "weights_by_distance"):
        assert f'name = "{name}"' in text, name


def test_a_capability_without_kernels_is_refused():
    with pytest.raises(ValueError, match=r"8\.0, 8\.6.*got '7\.5'"), lowering_for("7.5"):
        pass


@pytest.mark.filterwarnings("ignore:.*Triton:DeprecationWarning")
def test_a_plan_and_attention_are_exported():
    q, k = (jax.ShapeDtypeStruct((1, 128, n, 64), jnp.bfloat16) for n in (2, 1))
    program = jax.jit(partial(sparse_attention, pattern=VerticalSlash(columns=8, tiles=1)))
    triton = jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")
    with lowering_for("8.0"):
        exported = jax.export.export(program, platforms=["cuda"], disabled_checks=[triton])(q, k, k)
    assert jax.export.deserialize(exported.serialize()).out_avals[0].shape == q.shape


def test_what_is_made_for_a_gpu_stays_apart_from_what_is_made_for_here():
    q, k = (jax.ShapeDtypeStruct((1, 128, n, 64), jnp.bfloat16) for n in (2, 1))
    here = choose_implementation(q, k, k, SparsePlan())
    with lowering_for("8.0"):
        assert Device.default() == Device("gpu", "8.0", here=False)
        assert choose_implementation(q, k, k, SparsePlan()).name == "mma"
        # cuDNN can't be asked for: the warp-level kernel visits every tile.
        dense = choose_implementation(q, k, k, None)
        assert dense.name == "mma" and "cuDNN" in dense.reason
    assert choose_implementation(q, k, k, SparsePlan()) == here
    assert "mma" in lowered("8.6", dense_attention, q, k, k)


@pytest.mark.parametrize("capability", GPUS)
@pytest.mark.filterwarnings("ignore:.*Triton:DeprecationWarning")
def test_eight_bit_floats_are_read_by_kernels_from_8_9_on(capability):
    q = jnp.zeros((1, 4, 64), jnp.bfloat16)
    cache, scale = jnp.zeros((2, 1, 256, 2, 64), fp8.DTYPE), jnp.ones((2, 1, 256, 2), jnp.bfloat16)

    def decode(q, cache, scale):
        return decode_attention(q, cache, cache, 0, jnp.asarray([200]), k_scale=scale, v_scale=scale)

    assert ("triton" in lowered(capability, decode, q, cache, scale)) == (capability in WITH_FP8)
    x, weight, factor = jnp.zeros((1, 64), jnp.bfloat16), jnp.zeros((2, 64, 64), fp8.DTYPE), jnp.ones((2, 64))
    with lowering_for(capability):
        reason = unsupported_reason(x, [weight], [factor])
    assert (reason is None) == (capability in WITH_FP8) and (reason is None or capability in reason)
    if reason is not None:
        with pytest.raises(ValueError, match=r"compute capability 8\.9"):
            lowered(capability, lambda x, w, f: stacked_matvec(x, [w], jnp.int32(0), [f]), x, weight, factor)

    def product(x, weight, factor):
        return fp8.product(fp8.rows_of(x), weight, factor)

    text = lowered(capability, product, x, weight[0], factor[0])
    (line,) = (line for line in text.splitlines() if "dot_general" in line)
    kind = "f8E4M3FN" if capability in WITH_FP8 else "bf16"
    assert f"(tensor<1x64x{kind}>, tensor<64x64x{kind}>)" in line
