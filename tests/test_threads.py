"""Results that are computed ahead, and one call for what many threads ask for at once."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from seg_core.threads import CallBatcher, count_cpus, count_memory, prefetch


def test_cpus_are_those_that_the_scheduler_and_the_control_group_allow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); from seg_core.threads import count_cpus"
    found = subprocess.run([sys.executable, "-c", f"{code}; print(count_cpus())"], capture_output=True, check=True)
    assert int(found.stdout) == 1
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr("seg_core.threads.CPU_QUOTA", quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    for text, cpus in {"max 100000": 64, "400000 100000": 4, "150000 100000": 2, "5000 100000": 1}.items():
        quota.write_text(text)
        assert count_cpus() == cpus
    quota.unlink()
    assert count_cpus() == 64


def test_no_more_memory_counts_than_the_process_may_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr("seg_core.threads.MEMORY_LIMIT", limit)
    whole = count_memory()
    assert whole == psutil.virtual_memory().total
    for text, memory in {"max\n": whole, "1073741824\n": 2**30, f"{2**62}\n": whole}.items():
        limit.write_text(text)
        assert count_memory() == memory


def test_no_more_is_computed_ahead_than_asked_for() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(20):
            taken.append(number)
            yield number

    with ThreadPoolExecutor(4) as pool:
        for number, result in enumerate(prefetch(pool, lambda item: item**2, items(), 3)):
            assert result == number**2
            assert len(taken) <= number + 1 + 3
    assert len(taken) == 20


def test_what_is_asked_for_meanwhile_goes_into_the_next_call_and_each_gets_its_own() -> None:
    calls: list[list[int]] = []
    begun, go_on = threading.Event(), threading.Event()

    def block(numbers: Sequence[int]) -> list[int]:
        calls.append(list(numbers))
        begun.set()
        assert go_on.wait(60)
        return [number**2 for number in numbers]

    together = CallBatcher(block, most=4)
    with ThreadPoolExecutor(10) as pool:
        first = pool.submit(together, 10)
        assert begun.wait(60)
        others = [pool.submit(together, number) for number in range(9)]
        while len(together.waiting) < len(others):
            assert not any(other.done() for other in others)
        go_on.set()
        assert first.result(60) == 100
        assert [other.result(60) for other in others] == [number**2 for number in range(9)]
    assert [len(call) for call in calls] == [1, 4, 4, 1]
    assert sorted(number for call in calls[1:] for number in call) == list(range(9))


def test_it_runs_once_at_a_time() -> None:
    running, overlaps = threading.Lock(), []

    def alone(numbers: Sequence[int]) -> Sequence[int]:
        if not running.acquire(blocking=False):
            overlaps.append(numbers)
            return numbers
        time.sleep(0.001)
        running.release()
        return list(numbers)

    together = CallBatcher(alone, most=3)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(together, range(100))) == list(range(100))
    assert not overlaps


def test_those_at_fault_fail_and_no_others() -> None:
    begun, go_on = threading.Event(), threading.Event()

    def refuse_odd(numbers: Sequence[int]) -> Sequence[int]:
        begun.set()
        assert go_on.wait(60)
        if odd := [number for number in numbers if number % 2]:
            raise ValueError(odd[0])
        return list(numbers)

    together = CallBatcher(refuse_odd, most=8)
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(together, 0)
        assert begun.wait(60)
        others = [pool.submit(together, number) for number in range(1, 7)]
        while len(together.waiting) < len(others):
            pass
        go_on.set()
        assert first.result(60) == 0
        for number, other in enumerate(others, 1):
            if number % 2:
                with pytest.raises(ValueError, match=f"^{number}$"):
                    other.result(60)
            else:
                assert other.result(60) == number
