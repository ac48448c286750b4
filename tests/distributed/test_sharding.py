"""The same call on many devices, in one process and in two, gives the numbers of one device to rounding."""

import json
import os
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow  # processes of their own, which compile everything again

PROGRAM = Path(__file__).with_name("sharded_curvature.py")


def start(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, PROGRAM, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    out, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors[-3000:]
    numbers = [line for line in out.splitlines() if line.startswith("{")]  # the network layer prints lines of its own
    return json.loads(numbers[-1]) if numbers else None


@cache
def single():
    return finish(start())


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name in expected:
        scale = np.max(np.abs(expected[name]))
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=1e-9 * scale, err_msg=name)


def test_eight_devices_of_one_process():
    assert_same(finish(start("--simulate", 8, "--spread", 2)), single())


@pytest.mark.parametrize("spread", [1, 2])
def test_two_processes(spread):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [start("--process", i, "--of", 2, "--port", port, "--spread", spread) for i in range(2)]
    first, second = (finish(process) for process in processes)
    assert second is None
    assert_same(first, single())
