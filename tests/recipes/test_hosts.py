"""Two hosts: network namespaces of this machine, joined by a cable that can be cut."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from tiny_run import read_rows, tiny_grpo

pytestmark = pytest.mark.slow
STEPS = 20


def ip(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(["ip", *words], capture_output=True, text=True)


def problem_of_namespaces() -> str | None:
    """Return why this machine cannot make network namespaces; None if it can."""
    if shutil.which("ip") is None:
        return "`ip` is missing: apt-get install iproute2"
    name = f"rolltune-{os.getpid()}"
    done = ip("netns", "add", name)
    if done.returncode == 0:
        done = ip("netns", "exec", name, "true")
        ip("netns", "del", name)
    return f"network namespaces are not allowed here: {done.stderr.strip()}" if done.returncode else None


@dataclass(kw_only=True)
class Host:
    """A namespace, and `tune run` in it."""

    number: int
    name: str
    interface: str
    errors: Path
    agent: subprocess.Popen | None = None

    @property
    def address(self) -> str:
        return f"10.77.0.{self.number + 1}"

    def start(self, config: Path, *options: str, nodes: str = "2", conf: str = "") -> None:
        command = [sys.executable, "-m", "rolltune.cli", "run", "--nnodes", nodes, "--nproc_per_node", "1"]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "10.77.0.1:29500", "--rdzv-id", "test"]
        command += ["--rdzv-conf", f"is_host={int(self.number == 0)}{conf}", "--local-addr", self.address]
        command += [*options, "grpo", "--config", str(config)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": self.interface}
        with self.errors.open("w") as errors:
            self.agent = subprocess.Popen(
                ["ip", "netns", "exec", self.name, *command], stdout=subprocess.DEVNULL, stderr=errors, env=environment
            )

    def processes(self) -> list[int]:
        return [int(pid) for pid in ip("netns", "pids", self.name).stdout.split()]

    def rank(self) -> int:
        """Return the process id of the rank."""
        (pid,) = (p for p in self.processes() if b"recipes/grpo.py" in Path(f"/proc/{p}/cmdline").read_bytes())
        return pid

    def end(self) -> tuple[int, str]:
        """Wait until the agent and all of its processes have ended; returns exit status and stderr."""
        assert self.agent is not None
        status = self.agent.wait(timeout=180)
        wait_until(lambda: not self.processes())
        return status, self.errors.read_text()


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[list[Host]]:
    if problem := problem_of_namespaces():
        pytest.skip(problem)
    pair = [
        Host(
            number=n, name=f"rolltune-{os.getpid()}-{n}", interface=f"rt{os.getpid()}-{n}", errors=tmp_path / f"{n}.err"
        )
        for n in range(2)
    ]
    first, second = pair
    try:
        for host in pair:
            ip("netns", "add", host.name).check_returncode()
        cable = [first.interface, "netns", first.name, "type", "veth", "peer", second.interface, "netns", second.name]
        ip("link", "add", *cable).check_returncode()
        for host in pair:
            ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", host.interface).check_returncode()
            for interface in ("lo", host.interface):
                ip("-n", host.name, "link", "set", interface, "up").check_returncode()
        yield pair
    finally:
        for host in pair:
            for pid in host.processes():
                os.kill(pid, signal.SIGKILL)
            ip("netns", "del", host.name)


@pytest.fixture
def write_config(tiny_llama, tmp_path, reward_module) -> Callable[[str], Path]:
    def write(name: str) -> Path:
        settings = {"num_steps": STEPS, "stall_seconds": 6.0, "checkpoint": {"every_n_steps": 3, "keep_last": 2}}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tiny_grpo(tiny_llama, tmp_path / name) | settings))
        return path

    return write


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_killed_process_stops_both_hosts(hosts, write_config, tmp_path):
    config = write_config("run")
    for host in hosts:
        host.start(config)
    wait_until((tmp_path / "run/checkpoints/step_000003").exists)
    os.kill(hosts[1].rank(), signal.SIGKILL)
    (first, told), (second, named) = (host.end() for host in hosts)
    assert (first, second) == (1, 128 + 9), told + named
    assert "rank 0: step " in told and "a collective has failed (" in told and "Traceback" not in told
    assert "rank 1 does not answer: it is stopped, or its process or machine is gone" in told
    assert "process 1 was killed by signal 9 (SIGKILL)" in named


def test_a_host_that_is_cut_off_ends_and_the_other_goes_on_by_itself(hosts, write_config, tmp_path):
    config = write_config("run")
    conf = ",last_call_timeout=5,keep_alive_interval=1,keep_alive_max_attempt=3"
    for host in hosts:
        host.start(config, "--max_restarts", "1", nodes="1:2", conf=conf)
    wait_until((tmp_path / "run/checkpoints/step_000006").exists)
    ip("-n", hosts[1].name, "link", "set", hosts[1].interface, "down").check_returncode()
    (first, told), (second, cut_off) = (host.end() for host in hosts)
    assert (first, second) == (0, 1), told + cut_off
    assert "rank 1 does not answer: it is stopped, or its process or machine is gone" in told
    assert "restart 1 by torchrun: resuming from the last checkpoint" in told
    assert "no sign of rank 0: the store at 10.77.0.1:" in cut_off and "this machine is cut off from it" in cut_off
    assert "torchrun is stuck, as 10.77.0.1:29500 does not answer; ended" in cut_off
    command = [sys.executable, "-m", "rolltune.cli", "run", "grpo", "--config", str(write_config("whole"))]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    gone_on, whole = read_rows(tmp_path / "run"), read_rows(tmp_path / "whole")
    assert len(gone_on) == len(whole) == 1 + STEPS
    for a, b in zip(whole[1:], gone_on[1:], strict=True):
        for name in ("step", "reward/mean", "grad_norm", "entropy"):
            assert b[name] == pytest.approx(a[name], rel=1e-5), (a["step"], name)
