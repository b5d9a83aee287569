"""Which compiler options a model's program has: they are for whole programs, and for devices of one process."""

import jax
import jax.numpy as jnp
import numpy as np
from helpers import assert_close
from numpy_llama import random_llama

from minference_jax.models.config import LlamaConfig
from minference_jax.models.programs import Program
from minference_jax.parallel import make_mesh
from minference_jax.parallel.exchange import ONE, Exchange

CONFIG = LlamaConfig(96, 32, 48, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=16)


def test_options_follow_the_weights_and_the_devices(monkeypatch):
    program = Program(lambda config, params, exchange: params["embed"], ())
    params, narrow = ({"embed": jnp.ones(2), name: jnp.ones(2)} for name in ("layers.wq", "layers.wq_scale"))
    mesh = Exchange(make_mesh(heads=2))
    plain = program.form(params, ONE)
    forms = [plain, program.form(narrow, ONE), program.form(params, mesh), program.form(narrow, mesh)]
    assert len({id(form) for form in forms}) == 4
    monkeypatch.setattr(type(mesh.mesh), "is_multi_process", property(lambda mesh: True))
    assert program.form(params, mesh) is plain
    found = []
    jax.jit(lambda: found.append(program.form(narrow, mesh)))()  # nothing that it is called with is traced
    assert found == [plain]
    assert program.compiled() == 0
    program(CONFIG, params, exchange=ONE)
    assert program.compiled() == 1


def test_a_model_on_a_mesh_runs_inside_a_jitted_function():
    model = random_llama(CONFIG).on(make_mesh(heads=2))
    tokens = np.arange(24, dtype=np.int32)[None]
    inside = jax.jit(lambda: (model(tokens), model.token_log_likelihoods(tokens)))()
    for expected, found in zip((model(tokens), model.token_log_likelihoods(tokens)), inside, strict=True):
        assert_close(found, expected)
