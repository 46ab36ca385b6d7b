"""Two machines on one: each has its own processes, network, name and address; they share the disk, and there is a cable."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

HOSTS = "127.0.0.1 localhost\n10.77.0.1 machine0\n10.77.0.2 machine1\n"
OWN = ["--net", "--uts", "--mount", "--pid", "--fork", "--kill-child"]
BOOT = "mount --bind hosts /etc/hosts && hostname {} && ip link set lo up && echo up && exec sleep infinity"
PLUG = "ip addr add 10.77.0.{}/24 dev cable && ip link set cable up"


class Machine:
    """Namespaces of the kernel; they end, with every process in them, when the one that holds them is killed.

    Args:
        number: 0 or 1.
        other: the machine that it is connected to.
    """

    def __init__(self, number, other=None):
        self.name = f"machine{number}"
        Path("hosts").write_text(HOSTS)
        unshare = ["unshare", "--user", "--map-root-user"] if other is None else [*other.enter("--user"), "unshare"]
        command = [*unshare, *OWN, "sh", "-c", BOOT.format(self.name)]
        try:
            self.holder = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        except FileNotFoundError as error:
            pytest.skip(f"no second machine here: {error}")
        if self.holder.stdout.readline() != "up\n":
            pytest.skip(f"no second machine here: {self.holder.communicate()[1].strip()}")
        if other is not None:
            try:
                other.administer(f"ip link add cable type veth peer name cable netns {self.holder.pid}")
            except subprocess.CalledProcessError as error:
                self.off()
                pytest.skip(f"no cable between machines here: {error}")
            other.administer(PLUG.format(1))
            self.administer(PLUG.format(2))

    def enter(self, *namespaces):
        """The words with which a command begins that is to run in these namespaces."""
        return ["nsenter", f"--target={self.holder.pid}", "--preserve-credentials", *namespaces, f"--wdns={Path.cwd()}"]

    def administer(self, command):
        subprocess.run([*self.enter("--user", "--net"), "sh", "-c", command], check=True)

    def start(self, module, *args, **environment):
        """``python -m MODULE ARGS``, with these environment variables too."""
        processes = f"--pid=/proc/{self.holder.pid}/ns/pid_for_children"
        words = [*self.enter("--user", "--net", "--uts", "--mount", processes), sys.executable, "-m", module, *args]
        return Task([str(word) for word in words], Path(f"{self.name}.txt"), os.environ | environment)

    def off(self):
        self.holder.kill()
        self.holder.communicate()


class Task:
    """A process of a machine, and those that it starts; their output is added to ``log``."""

    def __init__(self, words, log, environment):
        self.log = log
        with log.open("a") as file:
            self.process = subprocess.Popen(words, env=environment, stdout=file, stderr=subprocess.STDOUT)

    def wait(self, timeout=180):
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout} s:\n{self.output()}") from None

    def output(self):
        return self.log.read_text()

    def wait_for(self, condition, timeout=180):
        end = time.monotonic() + timeout
        while not condition():
            assert self.process.poll() is None, self.output()
            assert time.monotonic() < end, self.output()
            time.sleep(0.005)

    def signal(self, number):
        """To the process that does the work: the last that was started by the last that was started ..."""
        pid = self.process.pid
        while children := Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            pid = int(children[-1])
        os.kill(pid, number)
