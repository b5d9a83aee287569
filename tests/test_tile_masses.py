"""Tile masses: the jnp twin against NumPy, what is refused, and the kernel in the interpreter and lowered for CUDA."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import tile_masses
from pallas_kernels.device import Device, lowering_for
from pallas_kernels.index import fp8, xla
from pallas_kernels.index.masses import tile_keys, unsupported_reason
from pallas_kernels.index.tile_keys import TileRule
from pallas_kernels.index.tile_lse import MassConfig

SCRIPT = Path(__file__).with_name("masses_interpreted.py")

CASES = {
    "two-sequences-offset-chunks-GQA2-D64": {
        "b": 2, "t": 384, "s": 1300, "n": 4, "k": 2, "h": 64, "every": 64, "dtype": "bfloat16",
        "q_offset": 896, "valid": [300, 404], "config": {"chunk": 512},
    },
    "blocks-of-one-row-count-D96-fp16": {
        "b": 1, "t": 700, "s": 700, "n": 3, "k": 1, "h": 96, "every": 8, "dtype": "float16",
        "q_offset": 0, "valid": [700], "scale": 0.3, "config": {"chunk": 1024, "polynomial_tiles": 4},
    },
    "half-the-buffers-no-rows-at-all-D256": {
        "b": 2, "t": 640, "s": 640, "n": 2, "k": 1, "h": 256, "every": 32, "dtype": "bfloat16",
        "q_offset": 0, "valid": [577, 0], "config": {"chunk": 1024},
    },
    # The first key far below the rest; far above it two tiles of one group and one of the next.
    "scores-150-octaves-apart-in-one-head-300-in-the-other": {
        "b": 1, "t": 1024, "s": 1024, "n": 2, "k": 2, "h": 64, "every": 128, "dtype": "bfloat16",
        "q_offset": 0, "valid": [1024], "config": {"chunk": 1024},
        "octaves": [{"0": -150, "200": 150, "330": 149, "600": 150}, {"0": -300, "200": 250, "330": 300, "600": 300}],
        "beyond": [3, 5, 9],
    },
    # In FP8: what the keys of a group have in common must not matter, nor that other groups have something else.
    "keys-in-fp8-two-sequences-offset-GQA2-D64": {
        "b": 2, "t": 384, "s": 1300, "n": 4, "k": 2, "h": 64, "every": 64, "dtype": "bfloat16", "common": 2,
        "q_offset": 896, "valid": [300, 384], "scale": 0.05, "config": {"chunk": 1024}, "octaves_apart": 0.2,
    },
    "keys-in-fp8-odd-no-rows-at-all-D96": {
        "b": 2, "t": 1220, "s": 1220, "n": 3, "k": 1, "h": 96, "every": 64, "dtype": "bfloat16", "common": 4,
        "q_offset": 0, "valid": [1220, 0], "scale": 0.02, "config": {"chunk": 1536}, "octaves_apart": 0.2,
    },
    "keys-of-wide-heads-D256": {
        "b": 1, "t": 300, "s": 300, "n": 2, "k": 1, "h": 256, "every": 64, "dtype": "bfloat16",
        "q_offset": 0, "valid": [300], "config": {"chunk": 512}, "octaves_apart": 0.01,
    },
}  # fmt: skip


@pytest.mark.parametrize("part", ["first", "rest"])
def test_interpreted_kernel_agrees_with_its_twin_and_is_free_of_races(part):
    """Cases in one process, which takes seconds to start: the first, and all others."""
    cases = dict(list(CASES.items())[:1] if part == "first" else list(CASES.items())[1:])
    path = os.pathsep.join([str(SCRIPT.parent), str(SCRIPT.parent.parent), os.environ.get("PYTHONPATH", "")])
    env = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=path)
    command = [sys.executable, "-W", "ignore", str(SCRIPT), json.dumps(cases)]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500, check=False)
    assert run.returncode == 0, (run.stdout, run.stderr[-2000:])
    assert run.stdout.splitlines() == [f"{name} agrees" for name in cases]
    assert "RACE" not in run.stdout + run.stderr


def by_hand(q, k, rows, share, lengths, q_offset, scale):
    """The definition, one probe at a time, in float64."""
    b, t, n, _ = q.shape
    s, group = k.shape[1], n // k.shape[2]
    mass = np.zeros((b, n, rows.shape[1], -(-s // 64)))
    lse = np.full((b, n, *rows.shape[1:]), -np.inf)
    for at in np.ndindex(b, n, *rows.shape[1:]):
        batch, head, i, p = at
        row = rows[batch, i, p]
        if share[batch, i, p] <= 0 or not 0 <= row < t or row + q_offset >= lengths[batch]:
            continue
        scores = scale * (k[batch, : row + q_offset + 1, head // group] @ q[batch, row, head])
        lse[at] = scores.max() + np.log(np.exp(scores - scores.max()).sum())
        np.add.at(mass[batch, head, i], np.arange(len(scores)) // 64, share[batch, i, p] * np.exp(scores - lse[at]))
    return mass, lse


@pytest.mark.parametrize("stored", [1 << 25, 1], ids=["at-once", "tile-by-tile"])
def test_twin_is_the_definition(rng, monkeypatch, stored):
    """Odd sizes, GQA, an offset, lengths, rows out of range and shares of nothing; rows of a tile in any order."""
    monkeypatch.setattr(xla, "SCORES", stored)
    b, t, s, n, kv, h, offset = 3, 300, 450, 4, 2, 16, 128
    q, k = 2 * rng.standard_normal((b, t, n, h)), rng.standard_normal((b, s, kv, h))
    rows = rng.integers(-2, t + 20, (b, 3, 5))
    share = np.where(rng.random(rows.shape) < 0.2, rng.integers(-1, 1, rows.shape), rng.random(rows.shape) + 0.1)
    lengths = np.array([450, 300, 0])
    masses = jax.jit(lambda q_offset, lengths: tile_masses(
        *(jnp.asarray(x, jnp.float32) for x in (q, k)), jnp.asarray(rows, jnp.int32), jnp.asarray(share, jnp.float32),
        lengths=lengths, q_offset=q_offset, scale=0.2, return_lse=True))  # fmt: skip
    mass, lse = masses(jnp.int32(offset), jnp.asarray(lengths, jnp.int32))
    expected, expected_lse = by_hand(q, k, rows, share, lengths, offset, 0.2)
    np.testing.assert_allclose(mass, expected, atol=2e-6, rtol=1e-5)
    np.testing.assert_allclose(lse, expected_lse, atol=1e-5, rtol=1e-5)
    assert not mass[2].any()


def test_masses_of_a_query_tile_add_up_to_its_shares(rng):
    q, k = (jnp.asarray(rng.standard_normal((1, 256, heads, 32)), jnp.float32) for heads in (2, 1))
    rows = jnp.arange(256, dtype=jnp.int32).reshape(1, 2, 128)
    mass = tile_masses(q, k, rows, jnp.ones(rows.shape, jnp.float32))
    np.testing.assert_allclose(mass.sum(-1), 128, rtol=1e-5)
    assert not mass[:, :, 0, 2:].any()  # after the diagonal


def avals(t=256, s=256, n=4, k=2, h=64, p=4, dtype="bfloat16", b=1):
    shape = jax.ShapeDtypeStruct
    rows = (b, -(-t // 128), p)
    return (
        shape((b, t, n, h), jnp.dtype(dtype)), shape((b, s, k, h), jnp.dtype(dtype)),
        shape(rows, jnp.int32), shape(rows, jnp.float32), shape((b,), jnp.int32), shape((), jnp.int32),
    )  # fmt: skip


def masses_on_hopper(q, k, rows, share, lengths, q_offset):
    return tile_masses(q, k, rows, share, lengths=lengths, q_offset=q_offset, implementation="hopper")


def keys_on_hopper(q, k, rows, share, lengths, q_offset):
    """What `SharedDensity` makes of them."""
    (b, _, n, _), query_tiles = q.shape, rows.shape[1]
    height = jnp.full((b, query_tiles), 128, jnp.int32)
    rule = TileRule(
        128 * jnp.arange(query_tiles, dtype=jnp.int32), height, height < 128, jnp.zeros((b, n), jnp.float32)
    )
    where = {"lengths": lengths, "q_offset": q_offset, "scale": q.shape[-1] ** -0.5}
    return tile_keys(q, k, rows, share, rule, implementation="hopper", **where)


MASS_SHAPES = {
    "16K-every-16-H32-D128": avals(16_384, 16_384, 32, 8, 128, 8),
    "128K-every-64-H32-D128": avals(131_072, 131_072, 32, 8, 128, 2),
    "chunk-of-128K-two-sequences-H8-D64-fp16": avals(4_096, 131_072, 8, 2, 64, 8, "float16", b=2),
    "odd-H4-D96": avals(777, 1_001, 4, 4, 96, 3),
    "16K-every-8-H8-D64": avals(16_384, 16_384, 8, 2, 64, 16),
    "odd-with-many-probes-H16-D96": avals(8_290, 8_301, 16, 4, 96, 32),
    "H8-D256": avals(8_192, 8_192, 8, 4, 256, 8),
}


@pytest.mark.parametrize("shapes", MASS_SHAPES.values(), ids=MASS_SHAPES.keys())
@pytest.mark.filterwarnings("ignore:.*Triton:DeprecationWarning")
def test_kernel_lowers_for_cuda_without_a_gpu(shapes):
    with lowering_for("9.0"):
        text = jax.jit(masses_on_hopper).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert "tile_lse" in text and "normalised" in text


@pytest.mark.parametrize("shapes", MASS_SHAPES.values(), ids=MASS_SHAPES.keys())
@pytest.mark.filterwarnings("ignore:.*Triton:DeprecationWarning")
def test_keys_lower_for_cuda_and_take_fp8_for_many_probes_of_up_to_128_dimensions(shapes):
    with lowering_for("9.0"):
        text = jax.jit(keys_on_hopper).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    in_fp8 = ['name = "centred_keys"' in text, 'name = "rounded_probes"' in text]
    q, _, rows = (x.shape for x in shapes[:3])
    expected = rows[1] * rows[2] >= fp8.FEWEST and q[-1] <= 128 and shapes[0].dtype == jnp.bfloat16
    assert "tile_lse" in text and in_fp8 == [expected] * 2


def test_says_what_it_cannot_serve():
    for change, reason in (({"dtype": "float32"}, "float32"), ({"h": 80}, "head_dim 64, 96, 128, 256; q has 80")):
        q, k, *rest = avals(**change)
        assert reason in str(unsupported_reason(q, k, device=None))
        with pytest.raises(ValueError, match=f'implementation="hopper" cannot serve this call.*{reason}'):
            jax.eval_shape(masses_on_hopper, q, k, *rest)
    q, k, *_ = avals()
    assert unsupported_reason(q, k, device=Device("gpu", "9.0")) is None
    assert "needs compute capability 9.0; the default device has 8.0" in str(
        unsupported_reason(q, k, device=Device("gpu", "8.0"))
    )


def test_errors_name_the_argument(unchecked):
    q, k, rows, share, _, _ = (jnp.zeros(x.shape, x.dtype) for x in avals())
    for arguments, options, error, words in (
        ((q, k, rows.astype(jnp.float32), share), {}, TypeError, "rows must be int32"),
        ((q, k, rows, share.astype(jnp.bfloat16)), {}, TypeError, "share must be float32"),
        ((q, k, rows, share[..., 1:]), {}, ValueError, r"\(1, 2, 4\) and \(1, 2, 3\)"),
        ((q, k, rows[0], share[0]), {}, ValueError, "rows and share must have one shape"),
        ((q, k[..., 1:], rows, share), {}, ValueError, "head_dim"),
        ((q, k, rows, share), {"implementation": "triton"}, ValueError, "got 'triton'"),
        ((q, k, rows, share), {"q_offset": 64}, ValueError, "q_offset must be a multiple of 128"),
    ):
        with pytest.raises(error, match=words):
            tile_masses(*arguments, **options)


@pytest.mark.parametrize("rows", [1, 100, 4_096, 100_000])
def test_chunks_cover_all_keys_and_are_whole_groups(rows):
    for keys in (1, 512, 5_000, 131_072):
        chunk = MassConfig.of(8, rows, keys).chunk
        assert chunk % 512 == 0 and chunk >= min(keys, 512)
    for bad in ({"chunk": 0}, {"chunk": 700}, {"chunk": 512, "polynomial_tiles": 17}):
        with pytest.raises(ValueError):
            MassConfig(**bad)
