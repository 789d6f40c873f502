import resource
import sys
import time

import pytest
import torch

from rolltune.metrics.timing import Phases, peak_memory_gib


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_phases_add_up(clock):
    phases = Phases()
    for seconds in (1.5, 0.5):
        with phases("sample"):
            clock[0] += seconds
        clock[0] += 50.0  # belongs to no phase
    with phases("train"):
        clock[0] += 4.0
    assert phases.metrics(sample=300, train=0) == {
        "seconds/sample": 2.0,
        "seconds/train": 4.0,
        "tokens_per_second/sample": 150.0,
        "tokens_per_second/train": 0.0,
    }


def test_a_phase_that_fails_has_taken_its_time(clock):
    phases = Phases()
    with pytest.raises(RuntimeError), phases("sample"):
        clock[0] += 3.0
        raise RuntimeError
    assert phases.metrics() == {"seconds/sample": 3.0}


def test_no_rate_where_no_time_passed(clock):
    phases = Phases()
    with phases("sample"):
        pass
    assert phases.metrics(sample=5, train=5) == {"seconds/sample": 0.0}


def test_phases_wait_for_the_accelerator(clock, monkeypatch):
    """Kernels are queued: their time belongs to the phase that launched them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: clock.__setitem__(0, clock[0] + 7.0))
    phases = Phases()
    with phases("train"):
        clock[0] += 1.0
    assert phases.metrics() == {"seconds/train": 8.0}


@pytest.mark.parametrize(("platform", "unit"), [("linux", 1024), ("darwin", 1)])
def test_peak_memory_in_the_platforms_unit(monkeypatch, platform, unit):
    class Usage:
        ru_maxrss = 3 * 2**30 // unit

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(resource, "getrusage", lambda who: Usage)
    assert peak_memory_gib() == 3.0


def test_peak_memory_of_this_process_is_plausible(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert 0.05 < peak_memory_gib() < 64.0
