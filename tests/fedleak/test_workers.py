"""Work spread over processes."""

from __future__ import annotations

import os

from fedleak.workers import Crash, run_processes


def _work(item: int) -> int:
    if item == 1:
        os._exit(3)
    if item == 2:
        raise ValueError("two")
    return 10 * item


def test_a_worker_that_ends_costs_only_its_item() -> None:
    found = dict(run_processes(_work, range(5), jobs=2))
    assert {k: v for k, v in found.items() if k not in (1, 2)} == {0: 0, 3: 30, 4: 40}
    assert found[1] == Crash("the worker process ended with exit code 3")
    assert found[2] == Crash("ValueError: two")
