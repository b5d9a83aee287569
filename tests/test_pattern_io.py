"""Pattern files: both formats there and back, presets, and a table of broken files."""

import json

import pytest

from minference_jax.pattern_io import load_patterns, preset, save_patterns
from minference_jax.patterns import AShape, BlockSparse, Dense, HeadPatterns, VerticalSlash

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
    layer = (Dense(), AShape(4, 64), VerticalSlash(8, tiles=3, probes="spread", coverage=0.9), BlockSparse(7))
    for scores in (None, ((0.5, 1, 2, 3),) * 2):
        patterns = HeadPatterns((layer, layer), scores)
        save_patterns(patterns, tmp_path / "p.json")
        assert load_patterns(tmp_path / "p.json") == patterns
    with pytest.raises(ValueError, match="layer 0, head 0: Dense"):
        save_patterns(patterns, tmp_path / "p.json", official=True)


def test_presets():
    assert preset("llama-3.1-8b", 2, 3).layer(1)[2] == VerticalSlash(512, 2048)
    assert isinstance(preset("streaming-llm", 1, 1).layer(0)[0], AShape)
    with pytest.raises(ValueError, match="paper-table-7"):
        preset("nothing", 1, 1)


def ours(**changes):
    layers = [[{"pattern": "dense"}]]
    return json.dumps({"format": "minference_jax.patterns", "version": 1, "layers": layers} | changes)


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
    "version": (ours(version=2), "version 2"),
    "unknown entry": (ours(extra=1), "extra"),
    "unknown field": (ours(layers=[[{"pattern": "dense", "sink": 1}]]), "no .*sink"),
    "ragged": (ours(layers=[[{"pattern": "dense"}], [{"pattern": "dense"}] * 2]), "layer 1 has 2 heads"),
    "score shape": (ours(scores=[[1, 2]]), "differ in shape"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_give_one_clear_error(tmp_path, name):
    text, message = BROKEN[name]
    path = tmp_path / "broken.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message) as error:
        load_patterns(path)
    assert str(path) in str(error.value)


def test_wrong_number_of_heads(tmp_path):
    (tmp_path / "p.json").write_text(json.dumps(OFFICIAL))
    with pytest.raises(ValueError, match="names head 1; expected 1"):
        load_patterns(tmp_path / "p.json", heads=1)
