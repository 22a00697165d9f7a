"""The CPU engine in the life of a process: interruption, forks, its end, default devices."""

import os
import subprocess
import sys
import textwrap
import time

import pytest
import torch

import grand_fast as gf
from grand_fast.kernels.cpu import machine_code, memory
from grand_fast.testing import random_graph

SETUP = """
    import os, signal, threading, time, torch
    import grand_fast as gf
    torch.set_num_threads(3)
    n, e = 5000, 100_000
    graph = gf.Graph.from_edge_index(torch.randint(n, (2, e)), n)
    x, q = torch.randn(n, 32), torch.randn(n, 2, 16)
    def call():
        return gf.ops.attention_diffusion(x, q, q, graph, backend="cpu")
    want = call()
"""


def run(script):
    program = textwrap.dedent(SETUP) + textwrap.dedent(script)
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )


def test_an_interrupted_call_leaves_no_helper_behind():
    result = run("""
        class Interrupt(Exception):
            pass

        def interrupt(*_):
            raise Interrupt

        signal.signal(signal.SIGALRM, interrupt)
        interrupted = 0
        for i in range(200):
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.0005 + 0.00001 * i)
                for _ in range(100):
                    call()
            except (Interrupt, RuntimeError):  # RuntimeError: it struck inside a lock
                interrupted += 1
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert interrupted > 100, interrupted
        assert torch.equal(call(), want)
        print("whole", flush=True)
        os._exit(0)  # one of the interrupts may have struck where a thread was being started
    """)
    assert result.returncode == 0 and "whole" in result.stdout, result.stderr[-2000:]


def test_a_thread_may_go_on_when_the_main_thread_has_ended():
    result = run("""
        def work():
            threading.main_thread().join()
            time.sleep(0.2)
            assert torch.equal(call(), want)
            print("done", flush=True)

        threading.Thread(target=work).start()
    """)
    assert "done" in result.stdout, result.stderr[-2000:]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_child_forked_while_a_lock_was_held_can_compute():
    graph = random_graph("hub")
    x = torch.randn(graph.num_nodes, 3)
    with machine_code._lock, memory._lock:
        child = os.fork()
        if child == 0:
            gf.ops.csr_diffusion(x, torch.randn(graph.num_edges), graph, backend="cpu")
            os._exit(0)
    for _ in range(200):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.1)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert done == child and status == 0


def test_a_default_device_is_not_taken_for_that_of_the_arguments():
    graph = random_graph("hub")
    n = graph.num_nodes
    leaves = [t.requires_grad_() for t in (torch.randn(n, 8), torch.randn(12, 8), torch.randn(12))]

    def run():
        f = gf.ops.projected_attention_diffusion(*leaves, graph, heads=2, add=[(0.5, leaves[0])])
        return [f, *torch.autograd.grad(f.square().sum(), leaves)]

    graph._views.clear()
    with torch.device("meta"):
        got = run()
    assert all(torch.equal(a, b) for a, b in zip(got, run(), strict=True))
