"""The kernels' threads: the same results for any number, from several callers, after a fork."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from instruction_sets import threads

from quire.kernels.layers import rms_norm
from quire.kernels.native import extension
from quire.weights.dense import DenseProduct


def test_many_short_loops() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(40, 64), torch.randn(64)
    product = DenseProduct.make(torch.randn(200, 64))
    normed, multiplied = rms_norm(x, weight, 1e-5), product(x, None, None)
    for count in (2, 3, 8, 1):
        with threads(count):
            for _ in range(50):
                assert torch.equal(rms_norm(x, weight, 1e-5), normed)
                assert torch.equal(product(x, None, None), multiplied)


def test_several_callers_at_once() -> None:
    """Kernels leave the interpreter's lock: calls from Python threads overlap."""
    torch.manual_seed(0)
    product = DenseProduct.make(torch.randn(300, 256))
    inputs = [torch.randn(3 + i, 256) for i in range(8)]
    expected = [product(x, None, None) for x in inputs]
    with threads(2), ThreadPoolExecutor(4) as callers:
        for _ in range(20):
            found = list(callers.map(lambda x: product(x, None, None), inputs))
            assert all(map(torch.equal, found, expected))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_after_a_fork() -> None:
    """A child has none of its parent's threads, and works with one."""
    kernels = extension()
    x, weight = torch.randn(64, 64), torch.randn(64)
    expected = rms_norm(x, weight, 1e-5)
    with threads(2):
        rms_norm(x, weight, 1e-5)
        child = os.fork()
        if child == 0:
            right = kernels.threads() == 1
            right &= torch.equal(rms_norm(x, weight, 1e-5), expected)
            kernels.set_threads(2)
            right &= torch.equal(rms_norm(x, weight, 1e-5), expected)
            sys.stdout.flush()
            os._exit(0 if right else 1)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert torch.equal(rms_norm(x, weight, 1e-5), expected)
