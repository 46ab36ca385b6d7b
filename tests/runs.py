"""Runs of the command line in processes that can be killed, forked from a server that has imported everything once."""

import contextlib
import csv
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["amortized.cli", "toy"])


def _main(args, log, environment):
    os.environ.update(environment)
    if "RANK" in environment:  # read when Lightning is imported, which was before
        rank_zero_only.rank = int(environment["RANK"])
    os.setsid()  # a group of its own, so that a whole run can be killed
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["amortized"]
    torch.set_num_threads(1)
    from amortized.cli.app import main

    main(args)


class Run:
    """``amortized ARGS`` in another process, with these environment variables too; its output is in ``log``."""

    def __init__(self, args, log="log.txt", **environment):
        self.log = Path(log)
        arguments = ([str(a) for a in args], str(self.log.absolute()), environment)
        self.process = _CONTEXT.Process(target=_main, args=arguments)
        self.process.start()

    def wait(self, timeout=120):
        self.process.join(timeout)
        if self.process.is_alive():
            self.kill()
            raise AssertionError(f"still running after {timeout} s:\n{self.output()}")
        return self.process.exitcode

    def signal(self, number, group=False):
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self.process.pid, number)

    def kill(self):
        self.signal(signal.SIGKILL, group=True)
        self.process.join()

    def output(self):
        return self.log.read_text() if self.log.exists() else ""

    def wait_for(self, condition, timeout=60):
        end = time.monotonic() + timeout
        while not condition() and self.process.is_alive():
            assert time.monotonic() < end, self.output()
            time.sleep(0.005)


def metrics(folder):
    with (Path(folder) / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def last_checkpoint(folder):
    paths = sorted((Path(folder) / "checkpoints").glob("step=*.ckpt"))
    return torch.load(paths[-1], weights_only=True) if paths else None
