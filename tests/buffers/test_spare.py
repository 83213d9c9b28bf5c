"""Memory that a result leaves is used again, once nobody sees it any more."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path

import pytest
import torch

from aiomm.buffers.arrays import array_over
from aiomm.buffers.memcpy import address_of
from aiomm.buffers.spare import UNIT_NBYTES, SpareMemory
from aiomm.types import Field

NBYTES = 2 * UNIT_NBYTES


def is_mapped(address: int) -> bool:
    """Whether there is memory at `address`."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, _, stop = line.partition(" ")[0].partition("-")
        if int(start, 16) <= address < int(stop, 16):
            return True
    return False


def take(spare: SpareMemory, nbytes: int) -> int:
    """Take memory, leave it at once, and return where it is."""
    return address_of(spare.take(nbytes).view)


def test_what_is_left_is_used_again() -> None:
    spare = SpareMemory(2 * NBYTES)
    memory = spare.take(NBYTES)
    assert memory.view.nbytes == NBYTES
    memory.view[-1] = 7
    address = address_of(memory.view)
    assert spare.nbytes == 0
    del memory
    assert spare.nbytes == NBYTES
    again = spare.take(NBYTES - UNIT_NBYTES + 1)
    assert (address_of(again.view), again.view.nbytes, spare.nbytes) == (address, NBYTES, 0)


def test_not_before_the_last_view_is_gone() -> None:
    spare = SpareMemory(NBYTES)
    memory = spare.take(NBYTES)
    memory.view[:] = b"\x05" * NBYTES
    tensor = array_over(memory.view, Field("uint8", 16), NBYTES // 16)
    assert isinstance(tensor, torch.Tensor)
    part = tensor[100:200, 3]
    del memory, tensor
    gc.collect()
    assert spare.nbytes == 0
    assert part.tolist() == [5] * 100
    del part
    assert spare.nbytes == NBYTES


def test_short_memory_is_not_rounded() -> None:
    assert SpareMemory(NBYTES).take(5000).view.nbytes == 5000


def test_what_is_far_too_long_stays_for_others() -> None:
    spare = SpareMemory(16 * UNIT_NBYTES)
    long = spare.take(5 * UNIT_NBYTES), spare.take(4 * UNIT_NBYTES)
    addresses = [address_of(memory.view) for memory in long]
    del long
    assert take(spare, 2 * UNIT_NBYTES) == addresses[1]
    assert take(spare, 3 * UNIT_NBYTES) == addresses[1]
    assert take(spare, 5 * UNIT_NBYTES) == addresses[0]
    assert take(spare, UNIT_NBYTES) not in addresses
    assert spare.nbytes == 10 * UNIT_NBYTES


def test_the_oldest_is_unmapped_first() -> None:
    spare = SpareMemory(3 * UNIT_NBYTES)
    taken = [spare.take(UNIT_NBYTES) for _ in range(4)]
    addresses = [address_of(memory.view) for memory in taken]
    while taken:
        del taken[0]
    assert spare.nbytes == 3 * UNIT_NBYTES
    assert [is_mapped(address) for address in addresses] == [False, True, True, True]
    del addresses[0]
    assert take(spare, UNIT_NBYTES) in addresses


def test_nothing_is_kept_that_is_longer_than_all_may_be() -> None:
    spare = SpareMemory(NBYTES - 1)
    address = take(spare, NBYTES)
    assert spare.nbytes == 0
    assert not is_mapped(address)


def test_nothing_is_kept_when_it_is_closed() -> None:
    spare = SpareMemory(4 * NBYTES)
    held = spare.take(NBYTES)
    addresses = [take(spare, NBYTES), address_of(held.view)]
    spare.close()
    spare.close()
    assert [is_mapped(address) for address in addresses] == [False, True]
    held.view[0] = 1
    del held
    assert not any(map(is_mapped, addresses))


def test_growing_keeps_the_bytes_and_forgets_the_old_place() -> None:
    spare = SpareMemory(1 << 40)
    memory = spare.take(UNIT_NBYTES)
    memory.view[:3] = b"abc"
    memory.grow(100 * UNIT_NBYTES)
    assert bytes(memory.view[:3]) == b"abc"
    assert memory.view.nbytes == 100 * UNIT_NBYTES
    memory.view[-1] = 1
    memory.grow(UNIT_NBYTES)  # there is room
    assert memory.view.nbytes == 100 * UNIT_NBYTES
    assert spare.nbytes == 0
    del memory
    assert spare.nbytes == 100 * UNIT_NBYTES


@pytest.mark.parametrize(("nbytes", "error"), [(1 << 60, OSError), (1 << 64, OverflowError)])
def test_what_there_is_not(nbytes: int, error: type[Exception]) -> None:
    spare = SpareMemory(NBYTES)
    memory = spare.take(NBYTES)
    with pytest.raises(error):
        memory.grow(nbytes)
    memory.view[-1] = 1
    with pytest.raises(error):
        spare.take(nbytes)
    del memory
    assert spare.nbytes == NBYTES


def test_memory_comes_back_while_the_lock_is_held() -> None:
    """As if garbage were collected there, on the same thread or another: nobody waits for it."""
    spare = SpareMemory(4 * NBYTES)
    first, second = spare.take(NBYTES), spare.take(NBYTES)
    with spare._lock:
        del first
        thread = threading.Thread(target=spare.give_back, args=(*second._mapping,))
        second._end.detach()
        thread.start()
        thread.join(10)
        assert not thread.is_alive()
    third = spare.take(NBYTES)
    assert spare.nbytes == 2 * NBYTES
    del third
    assert spare.nbytes == 3 * NBYTES


def test_the_kernel_may_have_the_pages() -> None:
    """What is kept counts as memory that is free for whoever needs it."""
    spare = SpareMemory(64 * UNIT_NBYTES)
    memory = spare.take(16 * UNIT_NBYTES)
    memory.view[:] = b"\x01" * memory.view.nbytes
    before = lazily_free()
    del memory
    assert lazily_free() - before > 8 * UNIT_NBYTES


def lazily_free() -> int:
    """Return how many bytes of this process the kernel may take at any time."""
    rollup = Path(f"/proc/{os.getpid()}/smaps_rollup").read_text()
    (line,) = (line for line in rollup.splitlines() if line.startswith("LazyFree:"))
    return int(line.split()[1]) * 1024
