"""Usage of an endpoint, counted over a run's processes and restarts."""

from __future__ import annotations

import asyncio
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from fault_server import FaultServer, ok

from rolltune.endpoints.budget import Budget, Usage
from rolltune.endpoints.client import BudgetExceeded, Endpoint
from rolltune.endpoints.settings import EndpointSettings


def use(path: Path) -> int:
    budget = Budget(path, "m")
    return max(budget.add(calls=1, prompt_tokens=3).calls for _ in range(50))


def test_entries_of_several_processes_add_up(tmp_path):
    path = tmp_path / "run/budget.sqlite"
    with ProcessPoolExecutor(2) as pool:
        assert max(pool.map(use, [path] * 4)) == 200
    assert Budget(path, "m").read() == Usage(calls=200, prompt_tokens=600)
    assert Budget(path, "another").read() == Usage()


def test_a_file_that_is_none_is_named(tmp_path):
    (tmp_path / "budget.sqlite").write_text("no database at all, and long enough to be told from one" * 20)
    with pytest.raises(ValueError, match=r"budget\.sqlite: cannot store"):
        Budget(tmp_path / "budget.sqlite", "m").add(calls=1)


def ask(endpoint: Endpoint, times: int) -> int:
    """How many calls were answered before a cap was reached."""

    async def run() -> int:
        done = 0
        try:
            while done < times:
                await endpoint.chat([{"role": "user", "content": "?"}])
                done += 1
        except BudgetExceeded:
            pass
        finally:
            await endpoint.aclose()
        return done

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("cap", "answered"),
    [
        ({"max_calls": 5}, 5),
        ({"max_total_tokens": 70}, 5),  # 15 a call: the fifth begins at 60
        ({"max_dollars": 0.00016, "dollars_per_million_input": 2.0, "dollars_per_million_output": 4.0}, 4),  # 40e-6
    ],
)
def test_a_cap_holds_over_endpoints_that_share_a_budget(tmp_path, cap, answered):
    """Three starts of a run, or ranks of one, each with the same cap: together they have it once."""
    with FaultServer(lambda call, request: ok("yes", prompt_tokens=10, completion_tokens=5)) as server:
        done = []
        for _ in range(3):
            endpoint = Endpoint(EndpointSettings(base_url=server.base_url, model="m", **cap))
            endpoint.share_budget(Budget(tmp_path / "budget.sqlite", "m"))
            done.append(ask(endpoint, 3))
        assert sum(done) == answered == len(server.calls)
        alone = Endpoint(EndpointSettings(base_url=server.base_url, model="m", **cap))
        assert ask(alone, 9) == answered  # its own caps are those of its process


def test_of_the_last_call_one_process_gets_it(tmp_path):
    """The cap is looked at, and then reached by somebody else before the call is entered."""
    with FaultServer(lambda call, request: ok("yes")) as server:
        endpoint = Endpoint(EndpointSettings(base_url=server.base_url, model="m", max_calls=2))
        budget = Budget(tmp_path / "budget.sqlite", "m")
        endpoint.share_budget(budget)
        endpoint._check_caps = lambda: budget.add(calls=2) and None  # pyright: ignore[reportAttributeAccessIssue]
        with pytest.raises(BudgetExceeded, match="max_calls: the cap of 2 is reached after 2 calls"):
            asyncio.run(endpoint.chat([{"role": "user", "content": "?"}]))
        assert server.calls == [] and budget.read().calls == 2
