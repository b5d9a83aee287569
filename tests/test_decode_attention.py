"""Decode attention: the kernel (interpreted) and the jnp path against hand-made and float64 softmax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode.attention import decode_attention, unsupported_reason

DECODE = jax.jit(decode_attention, static_argnames=("implementation", "interpret"))


def test_it_is_softmax_over_the_valid_keys():
    # Two query heads share a KV head. Keys 0 and 1 score ln 3 apart for head 0, the same for head 1; key 2 is padding.
    q = jnp.asarray([[[1.0, 0.0], [0.0, 1.0]]]) * 2**0.5 * jnp.log(3.0)
    k = jnp.asarray([[[[1.0, 0.0]], [[0.0, 0.0]], [[9.0, 9.0]]]])[None]
    v = jnp.asarray([[[[1.0, 0.0]], [[0.0, 1.0]], [[7.0, 8.0]]]])[None]
    got = DECODE(q, k, v, 0, jnp.asarray([2]))
    np.testing.assert_allclose(got, [[[0.75, 0.25], [0.5, 0.5]]], rtol=1e-6)
    np.testing.assert_array_equal(DECODE(q, k, v, 0, jnp.asarray([0])), np.zeros((1, 2, 2)))


@pytest.mark.parametrize("implementation", ["xla", "triton"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "int8"])
def test_both_implementations_read_any_cache(rng, implementation, dtype):
    layers, b, s, k, group, h = 2, 3, 300, 2, 3, 16
    q = jnp.asarray(rng.standard_normal((b, k * group, h)), jnp.bfloat16)
    size = 40 if dtype == "int8" else 1
    keys, values = (jnp.asarray(size * rng.standard_normal((layers, b, s, k, h)), dtype) for _ in range(2))
    scales = None, None
    if dtype != "bfloat16":
        scales = tuple(jnp.asarray(rng.uniform(0.5, 2, (layers, b, s, k)) / size, jnp.bfloat16) for _ in range(2))
    # A full cache (its last tile overlaps the one before), one that ends inside a tile, and an empty one.
    lengths = np.array([300, 130, 0])
    got = DECODE(
        *(q, keys, values, 1, jnp.asarray(lengths)),
        k_scale=scales[0],
        v_scale=scales[1],
        implementation=implementation,
        interpret=True,
    )
    full = [np.asarray(x[1].astype(jnp.float32), np.float64) for x in (keys, values)]
    if scales[0] is not None:
        full = [
            x * np.asarray(s[1].astype(jnp.float32), np.float64)[..., None] for x, s in zip(full, scales, strict=True)
        ]
    for row, length in enumerate(lengths):
        for head in range(k * group):
            query = np.asarray(q[row, head].astype(jnp.float32), np.float64)
            scores = full[0][row, :length, head // group] @ query / h**0.5
            weights = np.exp(scores - scores.max(initial=0))
            expected = weights @ full[1][row, :length, head // group] / max(weights.sum(), 1e-30)
            np.testing.assert_allclose(np.asarray(got[row, head].astype(jnp.float32)), expected, atol=0.02)


def test_rows_of_zeros_in_a_quantized_cache_give_zeros():
    q, zeros = jnp.ones((1, 2, 16), jnp.bfloat16), jnp.zeros((1, 1, 256, 1, 16), jnp.float8_e4m3fn)
    scale = jnp.zeros((1, 1, 256, 1), jnp.bfloat16)
    for implementation in ("triton", "xla"):
        options = {"k_scale": scale, "v_scale": scale, "implementation": implementation, "interpret": True}
        got = DECODE(q, zeros, zeros, 0, jnp.asarray([200]), **options)
        np.testing.assert_array_equal(got.astype(jnp.float32), np.zeros((1, 2, 16)))


@pytest.mark.parametrize(("keys", "sliced"), [(65_536, False), (65_664, True), (131_072, True), (131_200, False)])
def test_caches_that_the_lowering_cannot_address_are_read_a_layer_at_a_time(keys, sliced):
    # 32 layers of 8 heads of 128: 2**31 numbers at 65,536 keys.
    shapes = ((1, 32, 128), jnp.bfloat16), ((32, 1, keys, 8, 128), jnp.int8), ((32, 1, keys, 8), jnp.bfloat16)
    q, cache, scale = (jax.ShapeDtypeStruct(*shape) for shape in shapes)

    def attend(q, k, v, k_scale, v_scale):
        options = {"k_scale": k_scale, "v_scale": v_scale, "implementation": "triton", "interpret": True}
        return decode_attention(q, k, v, 3, jnp.asarray([keys]), **options)

    assert unsupported_reason(q, cache) is None
    text = str(jax.make_jaxpr(attend)(q, cache, cache, scale, scale))
    assert (f"i8[1,1,{keys},8,128] = dynamic_slice" in text) == sliced
    whole = jax.ShapeDtypeStruct((1, 1, 32 * keys, 8, 128), jnp.int8)
    assert (unsupported_reason(q, whole) is not None) == sliced


@pytest.mark.usefixtures("unchecked")
def test_what_does_not_fit_is_refused():
    q, cache = jnp.zeros((1, 4, 16)), jnp.zeros((1, 1, 256, 2, 16))
    with pytest.raises(ValueError, match="does not fit"):
        decode_attention(jnp.zeros((1, 3, 16)), cache, cache, 0, jnp.asarray([1]))
    with pytest.raises(ValueError, match="k is bfloat16"):
        narrow = cache.astype(jnp.bfloat16)
        decode_attention(q, narrow, narrow, 0, jnp.asarray([1]))
    with pytest.raises(ValueError, match="k_scale"):
        decode_attention(q, cache, cache, 0, jnp.asarray([1]), k_scale=jnp.zeros((1, 1, 256, 2)))
    with pytest.raises(ValueError, match="q is float32"):
        decode_attention(q, cache, cache, 0, jnp.asarray([1]), implementation="triton")
    with pytest.raises(ValueError, match='"triton" or "xla"'):
        decode_attention(q, cache, cache, 0, jnp.asarray([1]), implementation="cudnn")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="lengths"):
        decode_attention(q, cache, cache, 0, jnp.asarray([1, 2]))
    with pytest.raises(TypeError, match="lengths must be integers"):
        decode_attention(q, cache, cache, 0, jnp.asarray([1.5]))
    with pytest.raises(ValueError, match="layer must be less than"):
        decode_attention(q, cache, cache, 1, jnp.asarray([1]))
    with pytest.raises(ValueError, match="scale must be a positive"):
        decode_attention(q, cache, cache, 0, jnp.asarray([1]), scale=float("nan"))
