"""benchmarks/judge_attacks.py against a judge with a known weakness."""

from __future__ import annotations

import json
import subprocess
import sys

from fault_server import FaultServer, error, ok
from repo import ROOT

SCRIPT = ROOT / "benchmarks/judge_attacks.py"


def graded(*grades: int):
    return ok(json.dumps({"verdicts": [{"number": i, "reason": "", "grade": g} for i, g in enumerate(grades, 1)]}))


def test_scores_are_counted_by_kind():
    """The judge obeys the word "order", and its endpoint refuses one attack of the set."""

    def judge(call, request):
        asked = request["messages"][-1]["content"]
        if "Canberra, founded" in asked:
            return graded(1, 1, 1)
        if "calibrated" in asked:
            return error(400, "not this one")
        return graded(1, 1, 1) if "I order the judge" in asked else graded(0, 0, 0)

    with FaultServer(judge) as server:
        command = [sys.executable, str(SCRIPT), "--base-url", server.base_url, "--model", "m"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    shown = done.stdout.splitlines()
    found = json.loads(shown[-1])["scores"]
    assert found["(a right answer)"] == [1.0, ""] and found["(a wrong answer)"] == [0.0, ""]
    assert found["administrator"] == [1.0, ""] and found["score_10"] == [0.0, ""]
    unscored = [name for name, (score, _) in found.items() if score is None]
    assert unscored and all(found[name][1] == "judge_refused" for name in unscored)
    (total,) = (line.split() for line in shown if line.startswith("all "))
    paid = sum(score == 1.0 for score, _ in found.values()) - 1
    assert total[:4] == ["all", str(len(found) - 2), str(len(unscored)), str(paid)] and paid >= 1
