"""Run a command that does not outlive the process that started it.

    python -I supervisor.py SECONDS COMMAND [ARGUMENT ...] < a pipe that nobody writes to

The command gets its own process group. When the pipe closes, which the operating system does however the process at its
other end terminates, the group gets SIGTERM, and SIGKILL that many seconds later. The exit status is the command's.
This file is run as a script, and imports only the standard library, so it starts at once.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Run a command until it ends or standard input closes. Returns its exit status; 128 and more for a signal.

    Args:
        argv: seconds between SIGTERM and SIGKILL, then the command.
    """
    grace, arguments = float(argv[0]), argv[1:]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # only the pipe says when to stop
        signal.signal(number, signal.SIG_IGN)
    command = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_default_signals)
    threading.Thread(target=_end_with_stdin, args=(command, grace), daemon=True).start()
    status = command.wait()
    _signal_group(command, signal.SIGKILL)  # everything it left running
    return status if status >= 0 else 128 - status


def _default_signals() -> None:
    """Restore default signal handling, since a program inherits what its parent ignores."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def _end_with_stdin(command: subprocess.Popen[bytes], grace: float) -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    _signal_group(command, signal.SIGTERM)
    time.sleep(grace)  # a daemon thread: the process ends with the command
    _signal_group(command, signal.SIGKILL)


def _signal_group(command: subprocess.Popen[bytes], number: int) -> None:
    try:
        os.killpg(command.pid, number)
    except (ProcessLookupError, PermissionError):  # the group is gone; macOS raises the latter
        pass


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
