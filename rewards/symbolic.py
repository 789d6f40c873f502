"""Compare two LaTeX expressions with math-verify in a process that can be killed.

sympy can run for hours on a short expression, and math-verify's own time limit is an alarm signal, which works only in
the main thread. Checks therefore run in a worker process. It starts at the first check, stays, and is killed and
replaced when a check is late. This works in any thread and in forked processes.

This file is also the worker's program. The worker runs it by path, so that it imports neither rolltune nor the caller's
``__main__`` again. It must not import rolltune.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import threading
from multiprocessing.connection import wait

# Importing sympy takes a second or two, more on a busy machine. A check's own timeout does not include it.
STARTUP_SECONDS = 120.0
WORKER_MEMORY_BYTES = 4 << 30

_READY, _EQUAL, _DIFFERENT, _NO_GOLD, _NO_ANSWER = b"r", b"=", b"!", b"g", b"a"


class UnparseableError(ValueError):
    """math-verify cannot read the answer."""


class SymbolicChecker:
    """A lazily started worker process. Thread-safe: it runs one check at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def equal(self, gold: str, answer: str, *, timeout: float) -> bool:
        """Return whether ``answer`` equals ``gold``, both LaTeX without dollar signs.

        math-verify compares symbolically, or to six decimals if one side has a decimal point.

        Args:
            gold: trusted expression.
            answer: expression of a model, already restricted to a grammar without nested powers.
            timeout: seconds for this check.

        Raises:
            TimeoutError: no verdict within the time or the worker's memory.
            UnparseableError: the answer cannot be read.
            ValueError: the gold answer cannot be read.
        """
        with self._lock:
            reply = self._ask({"gold": gold, "answer": answer, "timeout": timeout})
        if reply == _NO_GOLD:
            raise ValueError(f"math-verify cannot read the gold answer {gold!r}; it must be a number or LaTeX")
        if reply == _NO_ANSWER:
            raise UnparseableError(f"math-verify cannot read {answer!r}")
        if reply not in (_EQUAL, _DIFFERENT):
            raise TimeoutError(f"no verdict on {answer!r} within {timeout} s")
        return reply == _EQUAL

    def close(self) -> None:
        """End the worker. The next check starts a new one."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _ask(self, request: dict[str, str | float]) -> bytes:
        process = self._running()
        assert process.stdin is not None
        process.stdin.write(json.dumps(request).encode() + b"\n")
        reply = _read_byte(process, float(request["timeout"]))
        if reply not in (_EQUAL, _DIFFERENT, _NO_GOLD, _NO_ANSWER):
            self.close()
        return reply

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self.close()
            # -P keeps this folder off the worker's path. Without a buffer, wait() sees the pipe itself.
            command = [sys.executable, "-P", __file__]
            self._process = subprocess.Popen(command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            if _read_byte(self._process, STARTUP_SECONDS) != _READY:
                self.close()
                raise RuntimeError(f"the math-verify worker did not start: {' '.join(command)}")
        return self._process


def _read_byte(process: subprocess.Popen[bytes], timeout: float) -> bytes:
    """Read one byte from the process; empty if none came in time or the process has ended."""
    assert process.stdout is not None
    return process.stdout.read(1) if wait([process.stdout], timeout) else b""  # type: ignore[list-item]


_checker = SymbolicChecker()
atexit.register(lambda: _checker.close())


def equal(gold: str, answer: str, *, timeout: float) -> bool:
    """Call :meth:`SymbolicChecker.equal` of this process's checker."""
    return _checker.equal(gold, answer, timeout=timeout)


def _forget_parents_worker() -> None:
    global _checker
    _checker = SymbolicChecker()


# After a fork the pipes, and perhaps a held lock, belong to the parent.
os.register_at_fork(after_in_child=_forget_parents_worker)


def serve() -> None:
    """Run the worker: read one JSON request per line from stdin, answer each with one byte, until stdin closes."""
    import logging
    import resource
    import signal

    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable()  # silences math-verify's warning that its own time limit is off
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":  # macOS refuses the limit
        resource.setrlimit(resource.RLIMIT_AS, (WORKER_MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    # units=False: otherwise "2ab" is read as 2 of the unit "ab".
    plain = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="none", equations=False
    )
    config = LatexExtractionConfig(boxed_match_priority=-1, normalization_config=plain)

    def read(latex: str) -> list:
        return parse(f"${latex}$", [config], fallback_mode="no_fallback", parsing_timeout=0)

    def check(gold: str, answer: str) -> bytes:
        golds, answers = read(gold), read(answer)
        if not golds or not answers:
            return _NO_ANSWER if golds else _NO_GOLD
        return _EQUAL if verify(golds, answers, timeout_seconds=0) else _DIFFERENT

    sys.stdout.buffer.write(_READY)
    sys.stdout.buffer.flush()
    for line in sys.stdin:
        request = json.loads(line)
        # Ends the worker if the caller is killed during a check.
        signal.alarm(int(request["timeout"]) + 2)
        reply = check(request["gold"], request["answer"])
        signal.alarm(0)
        sys.stdout.buffer.write(reply)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    serve()
