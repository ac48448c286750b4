"""The same calls on many devices, in one process and in two, give the numbers of one device to rounding."""

import json
import os
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path

import local_devices
import numpy as np
import pytest
import sharded_parameters

DATA, PARAMETERS = (Path(__file__).with_name(f"sharded_{what}.py") for what in ("curvature", "parameters"))
LOCAL = Path(__file__).with_name("local_devices.py")


def start(program, *arguments):
    # The quick test takes the flags of the suite, with which a program compiles faster.
    quick = program == LOCAL or (program == PARAMETERS and "--all" not in arguments)
    left_out = {"JAX_NUM_CPU_DEVICES"} if quick else {"JAX_NUM_CPU_DEVICES", "XLA_FLAGS"}
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    command = [sys.executable, program, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    out, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors[-3000:]
    numbers = [line for line in out.splitlines() if line.startswith("{")]  # the network layer prints lines of its own
    return json.loads(numbers[-1]) if numbers else None


@cache
def single(*arguments):
    return finish(start(*arguments))


def assert_same(found, expected, tolerance=1e-9):
    assert set(found) == set(expected)
    for name in expected:
        scale = np.max(np.abs(expected[name]))
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=tolerance * scale, err_msg=name)


def in_two_processes(*arguments):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [start(*arguments, "--process", i, "--of", 2, "--port", port) for i in range(2)]
    first, second = (finish(process) for process in processes)
    assert second is None
    return first


def test_parameters_on_eight_devices():
    assert_same(finish(start(PARAMETERS, "--simulate", 8)), sharded_parameters.measure(1, everything=False))


@pytest.mark.slow  # the others, too, are processes of their own, and compile everything again
def test_all_that_takes_parameters_on_eight_devices():
    assert_same(finish(start(PARAMETERS, "--all", "--simulate", 8)), single(PARAMETERS, "--all"))


@pytest.mark.slow
def test_parameters_on_two_processes():
    assert_same(in_two_processes(PARAMETERS, "--all"), single(PARAMETERS, "--all"))


@pytest.mark.slow
def test_data_on_eight_devices_of_one_process():
    assert_same(finish(start(DATA, "--simulate", 8, "--spread", 2)), single(DATA))


@pytest.mark.slow
@pytest.mark.parametrize("spread", [1, 2])
def test_data_on_two_processes(spread):
    assert_same(in_two_processes(DATA, "--spread", spread), single(DATA))


@pytest.mark.parametrize("everything", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "all"])
def test_independent_products_spread_over_the_devices_of_a_machine_by_themselves(everything):
    """Samples, chains and rows, over three devices or as many as divide them, give the numbers of one."""
    found, expected = finish(start(LOCAL, 3, *["--all"] * everything)), local_devices.measure(everything)
    assert found["devices"] == {"6": 3, "3": 3, "5": 1, "1": 1}
    assert set(expected["devices"].values()) == {1}
    assert found["where it was"] == ["cpu:2", "cpu:2"]  # there the parameters were put
    assert found["products told"] == [108, 108]
    assert found["samples before NaN"][0] == 3
    for name in ("within jit", "samples before NaN"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-12)
    assert found["numbers"]["long"] == found["numbers"]["again"]
    chains = [{"chains": numbers["numbers"].pop("chains", [1.0])} for numbers in (found, expected)]
    assert_same(*chains, tolerance=1e-8)  # 600 steps one after the other
    assert_same(found["numbers"], expected["numbers"], tolerance=1e-12)
