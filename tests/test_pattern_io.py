"""Pattern files: both formats there and back, presets, and a table of broken files."""

import json
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from numpy_llama import random_llama

from minference_jax import LlamaConfig
from minference_jax.patterns import AShape, BlockSparse, Dense, HeadPatterns, PerTile, SharedDensity, VerticalSlash
from minference_jax.patterns.files import MAX_FILE_BYTES, PRESETS, load_about, load_patterns, preset, save_patterns

OFFICIAL = [
    {"0": ["vertical_and_slash", 1000, 6096, 336], "1": ["stream_llm", 100, 800, 0.5]},
    {"1": ["block_sparse", 100, 0, 0.25]},
]


def test_official_there_and_back(tmp_path):
    path = tmp_path / "official.json"
    path.write_text(json.dumps(OFFICIAL))
    patterns = load_patterns(path)
    assert patterns.layers == (
        (VerticalSlash(1000, 6096), AShape(100, 800)),
        (VerticalSlash(1000, 6096), BlockSparse(100)),  # a head that is not named has the default
    )
    assert patterns.scores == ((336, 0.5), (1, 0.25))
    save_patterns(patterns, path, official=True)
    expected = [dict(layer) for layer in OFFICIAL]
    expected[1]["0"] = ["vertical_and_slash", 1000, 6096, 1]
    assert json.loads(path.read_text()) == expected
    assert load_patterns(path, heads=4).num_heads == 4


def test_ours_there_and_back(tmp_path):
    layer = (
        Dense(),
        AShape(4, 64),
        VerticalSlash(8, tiles=3, probes="spread", coverage=0.9, threshold=0.01),
        BlockSparse(7),
        PerTile(16, 0.01, 8, 9),
    )
    table = ((0.5, 1, 0, 0.25, 0.5),) * 2
    for figures in ({}, {"scores": table}, {"scores": table, "densities": table, "recalls": table}):
        patterns = HeadPatterns((layer, layer), **figures)
        save_patterns(patterns, tmp_path / "p.json", about={"model": "x", "tokens": 3})
        assert load_patterns(tmp_path / "p.json") == patterns
        assert load_about(tmp_path / "p.json") == {"model": "x", "tokens": 3}
    save_patterns(patterns, tmp_path / "p.json")
    assert load_about(tmp_path / "p.json") == {}
    # A density that a layer's heads share is not the density that a head was found to have.
    shared = HeadPatterns(((SharedDensity(0.3, every=4),),), densities=((0.25,),))
    save_patterns(shared, tmp_path / "shared.json")
    assert load_patterns(tmp_path / "shared.json") == shared
    with pytest.raises(ValueError, match="layer 0, head 0: Dense"):
        save_patterns(patterns, tmp_path / "p.json", official=True)


def test_presets():
    assert preset("llama-3.1-8b", 2, 3).layer(1)[2] == VerticalSlash(512, 2048)
    assert isinstance(preset("streaming-llm", 1, 1).layer(0)[0], AShape)
    with pytest.raises(ValueError, match="paper-table-7"):
        preset("nothing", 1, 1)


def test_first_version_of_our_files_is_still_read(tmp_path):
    old = ours(version=1, layers=[[{"pattern": "a_shape", "sink": 4, "window": 64}]], scores=[[0.5]])
    (tmp_path / "p.json").write_text(old)
    assert load_patterns(tmp_path / "p.json") == HeadPatterns(((AShape(4, 64),),), ((0.5,),))


def test_second_version_has_three_families_under_one_name(tmp_path):
    fields = {"pattern": "vertical_slash", "columns": 8, "slashes": 9}
    old = [
        {**fields, "probes": "last"},
        {**fields, "probes": 16, "threshold": 0.01},
        {**fields, "probes": 4, "layer_density": 0.3, "question": 5, "density": 0.25},
    ]
    (tmp_path / "p.json").write_text(ours(version=2, layers=[[entry | {"density": 0.25} for entry in old]]))
    expected = (VerticalSlash(8, 9), PerTile(16, 0.01, 8, 9), SharedDensity(0.3, 4, 5, threshold=0))
    assert load_patterns(tmp_path / "p.json") == HeadPatterns((expected,), densities=((0.25,) * 3,))
    (tmp_path / "p.json").write_text(ours(version=3, layers=[[old[1]]]))
    with pytest.raises(ValueError, match="layer 0, head 0: VerticalSlash: probes"):
        load_patterns(tmp_path / "p.json")


def test_writing_replaces_a_file_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "p.json"
    save_patterns(HeadPatterns.uniform(Dense(), 1, 1), path)
    before = path.read_bytes()

    def full(descriptor):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        save_patterns(HeadPatterns.uniform(AShape(), 9, 9), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", PRESETS)
def test_model_takes_patterns_by_file_and_by_preset(name, tmp_path, rng):
    config = LlamaConfig(61, 32, 40, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8)
    if isinstance(PRESETS[name], Path):
        with pytest.raises(ValueError, match="heads per layer; expected 2"):
            preset(name, 2, 2)
        return
    model = random_llama(config, name)
    assert model.patterns is not None
    save_patterns(model.patterns, tmp_path / "p.json", official=True)
    again = model.with_patterns(tmp_path / "p.json")
    assert again.patterns is not None and again.patterns.layers == model.patterns.layers
    tokens = jnp.asarray(rng.integers(0, 61, (1, 40)))
    np.testing.assert_array_equal(again(tokens), model(tokens))
    save_patterns(HeadPatterns(model.patterns.layers[:1]), tmp_path / "p.json")
    with pytest.raises(ValueError, match=r"p\.json: not a pattern file: the file has 1 layers; expected 2"):
        model.with_patterns(str(tmp_path / "p.json"))


def ours(**changes):
    layers = [[{"pattern": "dense"}]]
    return json.dumps({"format": "minference_jax.patterns", "version": 2, "layers": layers} | changes)


BROKEN = {
    "empty": ("", "Expecting value"),
    "truncated": (json.dumps(OFFICIAL)[:40], "not a pattern file"),
    "no list": ("3", "expected a list"),
    "no layers": ("[]", "official format"),
    "no heads": ("[{}]", "no layer names a head"),
    "pickle": ("\x80\x04K\x01.", "not a pattern file"),
    "deep": ("[" * 100_000, "nested too deeply|not a pattern file"),
    "NaN": ('[{"0": ["vertical_and_slash", 10, 10, NaN]}]', "NaN"),
    "huge score": ('[{"0": ["vertical_and_slash", 10, 10, 1e999]}]', "finite"),
    "duplicate head": ('[{"0": ["stream_llm", 1, 2, 3], "0": ["stream_llm", 1, 2, 3]}]', "occurs twice"),
    "unknown pattern": ('[{"0": ["slash", 10, 10, 1]}]', "layer 0, head 0: unknown pattern 'slash'"),
    "negative": ('[{"0": ["vertical_and_slash", -10, 10, 1]}]', "layer 0, head 0.*columns"),
    "absurd": ('[{"0": ["vertical_and_slash", 10, 99999999999, 1]}]', "slashes"),
    "float budget": ('[{"0": ["vertical_and_slash", 10.5, 10, 1]}]', "columns must be an int"),
    "three entries": ('[{"0": ["vertical_and_slash", 10, 10]}]', "expected"),
    "head name": ('[{"head": ["vertical_and_slash", 10, 10, 1]}]', "head keys"),
    "absurd head": ('[{"99999999": ["vertical_and_slash", 10, 10, 1]}]', "head keys"),
    "absurd layers": ("[" + "{}," * 2000 + '{"999": ["stream_llm", 1, 2, 3]}]', "more than any model"),
    "absurd integer": ('[{"0": ["stream_llm", 1, 2, 1' + "0" * 400 + "]}]", "not a pattern file"),
    "no text": ("\xff\xfe\x00", "not a pattern file"),
    "list budget": ('[{"0": ["stream_llm", [1], 2, 3]}]', "sink must be an int"),
    "boolean budget": ('[{"0": ["stream_llm", true, 2, 3]}]', "sink must be an int"),
    "word as score": ('[{"0": ["stream_llm", 1, 2, "good"]}]', "score must be a finite number"),
    "version": (ours(version=4), "version 4"),
    "version in words": (ours(version="two"), "version 'two'"),
    "about": (ours(about=[1]), '"about" must be'),
    "infinite score": (ours(layers=[[{"pattern": "dense", "score": float("inf")}]]), "Infinity"),
    "density": (ours(layers=[[{"pattern": "dense", "density": 1.5}]]), "density must be in"),
    "some scores": (ours(layers=[[{"pattern": "dense", "score": 1}, {"pattern": "dense"}]]), "some have none"),
    "coverage": (ours(layers=[[{"pattern": "vertical_slash", "coverage": "all"}]]), "layer 0, head 0"),
    "no pattern": (ours(layers=[[{"sink": 1}]]), "expected an object with"),
    "layers in a string": (ours(layers="dense"), "list of layers"),
    "unknown entry": (ours(extra=1), "extra"),
    "unknown field": (ours(layers=[[{"pattern": "dense", "sink": 1}]]), "no .*sink"),
    "ragged": (ours(layers=[[{"pattern": "dense"}], [{"pattern": "dense"}] * 2]), "layer 1 has 2 heads"),
    "score shape": (ours(version=1, scores=[[1, 2]]), "differ in shape"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_give_one_clear_error(tmp_path, name):
    text, message = BROKEN[name]
    path = tmp_path / "broken.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message) as error:
        load_patterns(path)
    assert str(path) in str(error.value)


def test_huge_files_are_not_read(tmp_path):
    with (tmp_path / "p.json").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(ValueError, match="larger than"):
        load_patterns(tmp_path / "p.json")


@pytest.mark.parametrize("size", range(0, 280, 23))
def test_truncated_files_are_refused(size, tmp_path):
    path = tmp_path / "p.json"
    save_patterns(HeadPatterns.uniform(AShape(), 2, 2), path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match="not a pattern file"):
        load_patterns(path)


def test_wrong_number_of_heads(tmp_path):
    (tmp_path / "p.json").write_text(json.dumps(OFFICIAL))
    with pytest.raises(ValueError, match="names head 1; expected 1"):
        load_patterns(tmp_path / "p.json", heads=1)
