"""Permits cover exactly the bytes that were granted."""

from __future__ import annotations

import random

import pytest

from aiomm.buffers.layout import ByteRange
from aiomm.planes.base import GrantKey
from aiomm.planes.permits import Permit, Permits

GRANT = GrantKey(1, 2, 3)


def test_the_grant_of_a_probe_is_no_transfers() -> None:
    probe = GrantKey.of_probe(7)
    assert (probe.link, probe.is_probe) == (7, True)
    assert GrantKey.of_probe(8) != probe
    assert not GRANT.is_probe
    assert not GrantKey(7, 1, 0).is_probe


@pytest.mark.parametrize("seed", range(20))
def test_covers_what_a_set_of_bytes_says(seed: int) -> None:
    chance = random.Random(seed)
    ranges = [
        ByteRange(start, start + chance.randint(0, 6)) for start in chance.choices(range(30), k=5)
    ]
    granted = {byte for part in ranges for byte in range(*part)}
    permit = Permit(ranges)
    for offset in range(40):
        for nbytes in range(1, 12):
            expected = granted.issuperset(range(offset, offset + nbytes))
            assert permit.covers(offset, nbytes) is expected


def test_told_the_same_again_nothing_changes() -> None:
    permits = Permits()
    permits.add(GRANT, [ByteRange(0, 4), ByteRange(4, 8)])
    permit = permits.get(GRANT)
    permits.add(GRANT, [ByteRange(0, 8)])
    assert permits.get(GRANT) is permit
    permits.add(GRANT, [ByteRange(0, 9)])
    assert permit is not None
    assert permit.is_withdrawn
    assert permits.get(GRANT) is not permit


def test_withdraws_one_one_links_and_all() -> None:
    permits = Permits()
    grants = [GRANT, GRANT._replace(sequence=4), GRANT._replace(link=9), GRANT._replace(link=8)]
    for grant in grants:
        permits.add(grant, [ByteRange(0, 8)])
    held = [permits.get(grant) for grant in grants]

    def withdrawn() -> list[bool]:
        return [permit is not None and permit.is_withdrawn for permit in held]

    permits.withdraw(GRANT)
    permits.withdraw(GRANT)
    assert withdrawn() == [True, False, False, False]
    permits.withdraw_all(9)
    assert withdrawn() == [True, False, True, False]
    permits.withdraw_all()
    assert withdrawn() == [True] * 4
    assert not any(permits.get(grant) for grant in grants)
