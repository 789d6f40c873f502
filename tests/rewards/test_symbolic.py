from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from rolltune.rewards import symbolic
from rolltune.rewards.symbolic import SymbolicChecker, UnparseableError


@pytest.fixture(scope="module")
def checker() -> Iterator[SymbolicChecker]:
    checker = SymbolicChecker()
    yield checker
    checker.close()


def worker_id(checker: SymbolicChecker) -> int:
    assert checker._process is not None
    return checker._process.pid


@pytest.mark.parametrize(
    ("gold", "answer", "equal"),
    [
        (r"2\sqrt{3}", r"\sqrt{12}", True),
        (r"2\sqrt{3}", r"3\sqrt{2}", False),
        ("(x+1)^{2}", "x^{2}+2x+1", True),
        ("2ab", "2ba", True),
        ("2ab", "2", False),  # math-verify's default settings take "ab" for a unit
        (r"\sqrt{2}", "1.414214", True),  # six decimals
        (r"\sqrt{2}", "1.4142", False),
        (r"\frac{1}{0}", "2", False),
    ],
)
def test_verdicts(checker: SymbolicChecker, gold: str, answer: str, equal: bool) -> None:
    assert checker.equal(gold, answer, timeout=30) is equal


def test_says_which_side_cannot_be_read(checker: SymbolicChecker) -> None:
    with pytest.raises(UnparseableError, match=r"\(\(x"):
        checker.equal("x", "((x", timeout=30)
    with pytest.raises(ValueError, match="gold answer"):
        checker.equal("((x", "x", timeout=30)


def test_one_worker_serves_many_checks_and_threads(checker: SymbolicChecker) -> None:
    assert checker.equal("x", "x", timeout=30)
    before = worker_id(checker)
    verdicts: dict[int, bool] = {}

    def run(i: int) -> None:
        verdicts[i] = checker.equal(f"{i}x", "3x", timeout=30)

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(2, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert verdicts == {2: False, 3: True, 4: False, 5: False}
    assert worker_id(checker) == before


def test_a_late_check_ends_the_worker_and_the_next_one_gets_another(checker: SymbolicChecker) -> None:
    assert checker.equal("x", "x", timeout=30)
    process = checker._process
    assert process is not None
    with pytest.raises(TimeoutError):
        checker.equal("10^{10}", "9^{9^{9}}", timeout=0.5)  # a number of 370 million digits
    assert process.poll() is not None
    assert checker.equal("x+1", "1+x", timeout=30)
    assert worker_id(checker) != process.pid


def test_a_worker_that_died_is_replaced(checker: SymbolicChecker) -> None:
    assert checker.equal("x", "x", timeout=30)
    process = checker._process
    assert process is not None
    process.kill()
    process.wait()
    assert checker.equal("x", "x", timeout=30)


def test_a_forked_process_starts_its_own_worker() -> None:
    assert symbolic.equal("x", "x", timeout=30)
    mine = worker_id(symbolic._checker)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        symbolic.equal("x", "x", timeout=30)
        os.write(writing, str(worker_id(symbolic._checker)).encode())
        symbolic._checker.close()
        os._exit(0)
    os.close(writing)
    theirs = os.read(reading, 100)
    os.close(reading)
    os.waitpid(child, 0)
    assert theirs and int(theirs) != mine
    assert symbolic.equal("x", "x", timeout=30)
    assert worker_id(symbolic._checker) == mine


def test_a_script_without_a_main_guard_may_use_it() -> None:
    # multiprocessing would import the script again in the worker, and start a worker there, and so on.
    script = "from rolltune.rewards import symbolic\nprint(symbolic.equal('2x', 'x+x', timeout=30))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("True\n", "", 0)


def test_importing_the_rewards_does_not_import_sympy() -> None:
    script = "import sys, rolltune.rewards.answer; print('sympy' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "False False\n"
