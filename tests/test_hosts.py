"""Two processes of two CPU devices each, over loopback: the results of one device, and no hang when one dies."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import CONFIG, random_tensors, write_byte_model, write_hf
from helpers import run_command

from minference_jax.parallel.hosts import join_hosts

HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 16, "intermediate_size": 24}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def both(commands, timeout=300):
    """Two processes at once: (exit status, standard output, standard error) of each."""
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "2"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = [subprocess.Popen([sys.executable, *command], env=environment, **pipes) for command in commands]
    try:
        found = [process.communicate(timeout=timeout) for process in running]
    finally:
        for process in running:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(running, found, strict=True)]


def test_two_hosts_generate_what_one_device_does(tmp_path, capsys):
    model = write_byte_model(tmp_path / "model")
    config = CONFIG | HEADS | {"vocab_size": 256}
    write_hf(model, random_tensors(config), config)
    command = ["generate", str(model), "A prompt of some bytes", "--raw", "--json", "--max-new-tokens", "8"]
    status, out, err = run_command(capsys, *command)
    assert status == 0, err
    port = free_port()
    shared = ["-m", "minference_jax", *command, "--mesh", "heads=4", "--hosts"]
    first, second = both([[*shared, f"127.0.0.1:{port},2,{place}"] for place in range(2)])
    assert first[0] == second[0] == 0, first[2] + second[2]
    # Gloo, which joins CPUs, says on standard output who is there.
    assert json.loads(first[1].splitlines()[-1])["tokens"] == json.loads(out)["tokens"]
    assert "tokens" not in second[1]


def test_a_process_that_dies_ends_the_others():
    child, port = str(Path(__file__).with_name("two_hosts.py")), free_port()
    alive, dead = both(
        [[child, f"127.0.0.1:{port},2,{place}", "10", what] for place, what in enumerate(("sum", "die"))]
    )
    assert dead[0] == 3 and alive[0] != 0 and "6.0" not in alive[1]


@pytest.mark.parametrize("hosts", ["here", "host:1,2,2", "host,2,0", "host:1,2"])
def test_hosts_are_checked(hosts):
    with pytest.raises(ValueError, match="hosts must be auto or"):
        join_hosts(hosts)
