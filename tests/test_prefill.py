"""`bench prefill`: its rows, its table and JSON, and the configs that random weights can have."""

import contextlib
import dataclasses
import json
import math

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from numpy_llama import random_llama

from minference_jax.bench import prefill
from minference_jax.bench.prefill import bench_prefill
from minference_jax.bench.timing import median_seconds
from minference_jax.checkpoints.presets import CONFIGS, known_config
from minference_jax.cli import main
from minference_jax.models.config import LlamaConfig
from minference_jax.models.llama import Llama
from minference_jax.models.params import param_shapes
from minference_jax.patterns import VerticalSlash
from minference_jax.planning.memory import OutOfDeviceMemoryError

TINY = LlamaConfig(61, 32, 40, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8)


def test_rows_say_what_ran_and_what_was_estimated():
    methods = {"dense": (None, False), "minference": (VerticalSlash(columns=4, tiles=1), False)}
    model = random_llama(TINY)
    dense, sparse = bench_prefill(model, [640], methods, repeats=1, dense_limit=512)
    assert (dense.tokens, dense.method, dense.estimated) == (640, "dense", True)
    assert dense.seconds == dense.attention + dense.projections and dense.density == 1.0 and dense.speedup == 1.0
    assert not sparse.estimated and sparse.seconds > 0 and sparse.index > 0 and 0 < sparse.density < 0.6
    assert sparse.speedup == pytest.approx(dense.seconds / sparse.seconds)
    weights = 4 * sum(parameter.size for parameter in model.params().values())
    assert weights / 2**30 < sparse.memory_gib < (weights + 4e7) / 2**30


def test_a_second_run_says_that_its_programs_come_from_the_cache(tmp_path):
    methods, found = {"dense": (None, False), "minference": (VerticalSlash(columns=4, tiles=1), False)}, []
    with _compile_cache(tmp_path):
        for end in (1, 2):
            # A program that no other test has compiled; and another config for `jit`, but the same for the cache.
            config = dataclasses.replace(TINY, vocab_size=67, eos_token_ids=(end,))
            model = Llama.random(config, jax.random.key(0))
            found.append(list(bench_prefill(model, [128], methods, repeats=1, pieces=False, jobs=2)))
    assert [[row.cached for row in rows] for rows in found] == [[False] * 2, [True] * 2]
    assert all(row.seconds > 0 and math.isnan(row.attention) for rows in found for row in rows)


@contextlib.contextmanager
def _compile_cache(directory):
    options = {"jax_compilation_cache_dir": str(directory), "jax_persistent_cache_min_compile_time_secs": 0.0}
    options["jax_persistent_cache_min_entry_size_bytes"] = -1
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def test_the_command_takes_pattern_files_prints_json_and_draws(tmp_path, capsys):
    config, image = tmp_path / "config.json", tmp_path / "plot.png"
    config.write_text(json.dumps(TINY.to_hf()))
    arguments = ["bench", "prefill", "--random-weights", str(config), "--lengths", "128", "--repeats", "1", "--json"]
    official = tmp_path / "official.json"
    official.write_text(json.dumps([{"0": ["vertical_and_slash", 4, 8, 1], "3": ["stream_llm", 8, 64, 1]}, {}]))
    arguments += ["--pattern", str(official)]
    assert main([*arguments, "--methods", "dense,minference", "--plot", str(image)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(row["tokens"], row["method"]) for row in found["rows"]] == [(128, "dense"), (128, "minference")]
    assert found["rows"][0]["tokens_per_second"] == pytest.approx(128 / found["rows"][0]["seconds"])
    assert image.read_bytes()[:4] == b"\x89PNG"
    rows, again = tmp_path / "rows.json", tmp_path / "again.png"
    rows.write_text(json.dumps(found))
    assert main(["bench", "prefill", "--rows", str(rows), "--plot", str(again)]) == 0
    assert "minference" in capsys.readouterr().out and again.read_bytes() == image.read_bytes()
    assert main(["bench", "prefill", "--random-weights", str(config), "--lengths", "8Q"]) == 2
    assert "8Q" in capsys.readouterr().err


def test_rows_before_an_error_are_printed(tmp_path, capsys, monkeypatch):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(TINY.to_hf()))
    timed = prefill._time

    def time(case, *rest, **options):
        if case.tokens > 128:
            raise OutOfDeviceMemoryError("out of device memory")
        return timed(case, *rest, **options)

    monkeypatch.setattr(prefill, "_time", time)
    arguments = [
        "bench",
        "prefill",
        "--random-weights",
        str(config),
        "--lengths",
        "128,256",
        "--repeats",
        "1",
        "--json",
    ]
    assert main([*arguments, "--methods", "dense"]) == 1
    out, err = capsys.readouterr()
    assert [row["tokens"] for row in json.loads(out)["rows"]] == [128] and "out of device memory" in err


def test_a_long_run_is_not_repeated():
    runs = []
    median_seconds(lambda: runs.append(1), repeats=4)
    median_seconds(lambda: runs.append(2), repeats=4, long=-1.0)
    assert runs == [1] * 5 + [2]


PUBLISHED = {
    "llama-3-8b": 8.03,
    "llama-3.1-8b": 8.03,
    "qwen2-7b": 7.62,
    "smollm3-3b": 3.08,
    "seed-oss-36b": 36.15,
    "granite-3.3-8b": 8.17,
    "glm-4-9b": 9.40,
    "qwen3-30b-a3b": 30.53,
    "gemma-3-270m": 0.27,
    "gemma-3-1b": 1.00,
    "gpt-oss-20b": 20.91,
    "gpt-oss-120b": 116.83,
}


@pytest.mark.parametrize(("name", "billions"), PUBLISHED.items())
def test_presets_have_the_published_number_of_parameters(name, billions):
    total = sum(map(math.prod, param_shapes(CONFIGS[name]).values()))
    assert total / 1e9 == pytest.approx(billions, abs=0.01)


def test_a_config_is_known_by_name_file_or_directory(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_hf()))
    assert known_config(tmp_path) == known_config(tmp_path / "config.json") == LlamaConfig.from_hf(TINY.to_hf())
    assert known_config("smollm2").tie_embeddings
    with pytest.raises(ValueError, match="llama-3-8b"):
        known_config("llama-4")
