"""What the tests of GPUs share: a fake one, in this process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from aiomm.gpu.choice import use_runtime
from aiomm.gpu.fake import FakeRuntime


@pytest.fixture
def fake() -> Iterator[FakeRuntime]:
    """Two devices, which this process uses for as long as the test lasts; none may be abused."""
    runtime = FakeRuntime([0, 1])
    use_runtime(runtime)
    yield runtime
    runtime.faults.release()
    runtime.join()
    use_runtime(None)
    assert runtime.violations == []
