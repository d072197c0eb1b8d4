"""How many threads of the processor a computation takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

#: Unknowns up to which threads cost more than they help: factorisations of so small matrices
#: wait for each other, on a busy machine ten times as long as they take.
_FEW = 256


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with ``count`` threads in this block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def for_unknowns(count: int) -> AbstractContextManager[None]:
    """Compute with one thread where there are few unknowns, else with as many as are set."""
    return threads(1) if count <= _FEW else nullcontext()
