"""The Hopper kernel's wrapper: what it refuses, and that every shipped configuration lowers for CUDA without a GPU."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import SparsePlan
from pallas_kernels.hopper import assembler, attention
from pallas_kernels.hopper.attention import default_config, hopper_attention, unsupported_reason
from pallas_kernels.hopper.config import SHARED_MEMORY_LIMIT, KernelConfig


def avals(b, t, s, n, k, h, *, columns=0, bands=0, blocks=0, dtype="bfloat16", band_multiple=1):
    """Shapes of a call: (q, k, v, plan, lengths, q_offset), nothing allocated."""
    tiles = -(-t // 128)

    def int32(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    plan = SparsePlan(
        *((int32(b, n, columns), int32(b, n)) if columns else (None, None)),
        *((int32(b, n, bands), int32(b, n)) if bands else (None, None)),
        *((int32(b, n, tiles, blocks), int32(b, n, tiles)) if blocks else (None, None)),
        band_multiple=band_multiple,
    )
    q, keys = (jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape in ((b, t, n, h), (b, s, k, h)))
    return q, keys, keys, plan, int32(b), int32()


def attend(q, k, v, plan, lengths, q_offset):
    return hopper_attention(q, k, v, plan, lengths=lengths, q_offset=q_offset, return_lse=True)


def lowered(function, *args) -> str:
    return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


MILLION = 1 << 20
SHAPES = {
    "every-part-1M-H32-D128": avals(1, MILLION, MILLION, 32, 8, 128, columns=1024, bands=256, blocks=16),
    "chunk-of-2M-H32-D128": avals(1, 4096, 2 * MILLION, 32, 8, 128, columns=1024, bands=256),
    "window-1M-H32-D128": avals(1, MILLION, MILLION, 32, 8, 128, columns=1024, bands=64, band_multiple=64),
    "bands-D64-fp16": avals(2, 1000, 1100, 4, 4, 64, bands=9, dtype="float16"),
    "blocks-D96": avals(1, 777, 777, 8, 1, 96, blocks=9),
    "diagonal-only-T1": avals(1, 1, 1, 1, 1, 128),
}


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())
def test_lowers_for_cuda_without_a_gpu(shapes):
    assert "mosaic_gpu" in lowered(attend, *shapes)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"dtype": "float32"}, "float32"),
        ({"h": 80}, "head_dim 64, 96, 128; q has 80"),
    ],
)
def test_says_what_it_cannot_serve(change, reason):
    q, k, v, plan, *_ = avals(**{"b": 1, "t": 128, "s": 128, "n": 2, "k": 1, "h": 64, "bands": 2, **change})
    assert reason in str(unsupported_reason(q, k, v, plan, device=None))
    with pytest.raises(ValueError, match=reason):
        lowered(lambda q, k, v, plan: hopper_attention(q, k, v, plan), q, k, v, plan)


def test_scale_must_be_positive():
    q, k, v, *_ = avals(1, 128, 128, 1, 1, 64)
    with pytest.raises(ValueError, match="scale must be positive"):
        lowered(lambda q, k, v: hopper_attention(q, k, v, SparsePlan(), scale=0.0), q, k, v)


def test_configurations_that_cannot_run_are_refused():
    assert all(KernelConfig().fits(h) for h in (64, 96, 128))
    assert KernelConfig(stages=3).shared_memory_bytes(128) > SHARED_MEMORY_LIMIT
    q, k, v, *_ = avals(1, 128, 128, 1, 1, 128)
    with pytest.raises(ValueError, match="shared memory"):
        lowered(lambda q, k, v: hopper_attention(q, k, v, SparsePlan(), config=KernelConfig(stages=3)), q, k, v)
    for bad in (
        {"stages": 1},
        {"chain": -1},
        {"polynomial_tiles": 17},
        {"compute_registers": 100},
        {"compute_registers": 240, "memory_registers": 40},
    ):
        with pytest.raises(ValueError):
            KernelConfig(**bad)


@pytest.mark.parametrize("installed", [True, False], ids=["nvJitLink", "ptxas"])
def test_an_assembler_that_moves_no_registers_is_not_asked_to(monkeypatch, installed):
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    monkeypatch.setattr(assembler, "_has_nvjitlink", lambda: installed)
    assert ("setmaxnreg" in lowered(lambda *args: attend(*args), *SHAPES["diagonal-only-T1"])) != installed


def test_query_tiles_follow_each_other_where_they_overlap_or_share_keys(monkeypatch):
    lists = SparsePlan(blocks=jnp.zeros((1, 1, 1, 1), jnp.int32), block_count=jnp.zeros((1, 1, 1), jnp.int32))
    bands = SparsePlan(bands=jnp.full((1, 1, 1), 64, jnp.int32), band_count=jnp.ones((1, 1), jnp.int32))
    for ignored, chains in ((False, [4, 4]), (True, [1, 4])):
        monkeypatch.setattr(attention, "ignores_setmaxnreg", lambda ignored=ignored: ignored)
        found = [default_config(plan) for plan in (lists, bands)]
        assert [config.chain for config in found] == chains and found[0].overlap == (not ignored)


@pytest.mark.parametrize("work", [1, 131, 132, 133, 527, 528, 529, 5_000])
@pytest.mark.parametrize("chain", [1, 2, 4, 5, None])
def test_thread_blocks_share_all_query_tiles(work, chain):
    rounds = KernelConfig(chain=chain, lanes=132).rounds_for(work)
    first, most = jax.jit(jax.vmap(rounds.of))(jnp.arange(rounds.thread_blocks, dtype=jnp.int32))
    taken = [
        start + turn * rounds.lanes
        for start, count in zip(first.tolist(), most.tolist(), strict=True)
        for turn in range(count)
        if start + turn * rounds.lanes < work
    ]
    assert sorted(taken) == list(range(work))
    assert (first < work).all()
