"""The judge of a rubric run, as a program: ``judge.py PORT FILE``. The file says how it answers: grade, slow or 500."""

import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from fault_server import FaultServer, Response, error
from judge_server import grade


def answer(call: int, request: dict[str, Any]) -> Response:
    mode = Path(sys.argv[2]).read_text()
    if mode == "slow":
        time.sleep(0.5)
    return error(500, "oops") if mode == "500" else grade(call, request)


with FaultServer(answer, port=int(sys.argv[1])):
    signal.pause()
