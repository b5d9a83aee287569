"""Pictures: the numbers in them against plain NumPy, and that files of the right kind come out."""

import jax.numpy as jnp
import numpy as np
import pytest

from minference_jax import AShape, BlockSparse, Dense, HeadPatterns, VerticalSlash, save_patterns
from minference_jax.attention import make_plan
from minference_jax.cli import main
from minference_jax.viz import head_picture, plot_head, plot_patterns
from minference_jax.viz.patterns import colours

pytest.importorskip("matplotlib")

ALL = (Dense(), AShape(4, 64), VerticalSlash(8, 60), VerticalSlash(8, tiles=3), BlockSparse(7))


def test_every_kind_has_a_colour_and_larger_budgets_are_darker():
    assert len({p.label() for p in ALL}) == len({p.colour() for p in ALL}) == len(ALL)
    assert [p.budget() for p in ALL[:5]] == [np.inf, 68, 68, 200, 448]
    fields = colours(HeadPatterns((tuple(AShape(0, w) for w in (10, 100, 1000)),)))
    assert fields.shape == (1, 3, 3)
    brightness = fields.sum(-1)[0]
    assert brightness[0] > brightness[1] > brightness[2]
    np.testing.assert_allclose(fields[0, 2], AShape().colour())


@pytest.mark.parametrize("suffix", [".png", ".svg", ".PDF"])
def test_pattern_map_is_written(suffix, tmp_path):
    table = ((0.1, 0.2, 0.3, 0.4, 0.5),) * 2
    for figures in ({}, {"scores": table, "densities": table, "recalls": table}):
        path = tmp_path / f"map{suffix}"
        plot_patterns(HeadPatterns((ALL, ALL), **figures), path, title="two layers")
        start = {".png": b"\x89PNG", ".svg": b"<?xml", ".PDF": b"%PDF"}[suffix]
        assert path.read_bytes().startswith(start)
        path.unlink()


def test_head_picture_holds_what_numpy_finds(rng):
    t, block, head = 300, 8, 3
    q = jnp.asarray(rng.normal(size=(1, t, 4, 16)), jnp.float32)
    k = jnp.asarray(rng.normal(size=(1, t, 2, 16)), jnp.float32)
    picture = head_picture(q, k, AShape(20, 40), head)
    scores = np.asarray(q)[0, :, head] @ np.asarray(k)[0, :, 1].T / 4
    weights = np.exp(np.where(np.tri(t, dtype=bool), scores, -np.inf))
    weights /= weights.sum(1, keepdims=True)
    mask = np.asarray(make_plan(q, k, AShape(20, 40)).to_mask(t, t))[0, head]

    def cells(x, rows):
        padded = np.pad(x, ((0, 304 - t), (0, 304 - t))).reshape(38, block, 38, block).sum((1, 3))
        return padded / rows

    rows = np.minimum(block, t - block * np.arange(38))[:, None]
    assert picture.block == block
    np.testing.assert_allclose(picture.dense, cells(weights, rows), atol=1e-5)
    np.testing.assert_allclose(picture.lost, cells(weights * ~mask, rows), atol=1e-5)
    np.testing.assert_allclose(picture.visited, cells(mask, np.maximum(cells(np.tri(t), 1), 1)), atol=1e-6)
    assert picture.recall == pytest.approx((weights * mask).sum() / t, abs=1e-5)
    assert picture.density == pytest.approx(mask.sum() / np.tri(t).sum(), abs=1e-5)


def test_head_picture_is_written_and_mistakes_are_named(rng, tmp_path, unchecked):
    q = jnp.asarray(rng.normal(size=(1, 200, 2, 8)), jnp.float32)
    picture = head_picture(q, q, Dense(), 0)
    assert picture.recall == pytest.approx(1)
    plot_head(picture, tmp_path / "head.png", title="layer 0, head 0")
    assert (tmp_path / "head.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"\.png, \.pdf, \.svg"):
        plot_head(picture, tmp_path / "head.jpeg")
    with pytest.raises(ValueError, match=r"head must be in 0 … 1, got 2"):
        head_picture(q, q, Dense(), 2)
    with pytest.raises(ValueError, match="one prompt"):
        head_picture(jnp.concatenate([q, q]), q, Dense(), 0)


def test_inspect_draws_a_pattern_file(tmp_path, capsys):
    save_patterns(HeadPatterns((ALL, ALL)), tmp_path / "p.json")
    assert main(["inspect", "--patterns", str(tmp_path / "p.json"), "--plot", str(tmp_path / "out.png")]) == 0
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert "out.png" in capsys.readouterr().out
    assert main(["inspect", "--plot", str(tmp_path / "out.png")]) == 2
    assert main(["inspect", "--patterns", str(tmp_path / "p.json"), "--plot", str(tmp_path / "out.bmp")]) == 2
    assert "pictures end in" in capsys.readouterr().err
