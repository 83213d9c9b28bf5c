"""Two processes that move tensors by cuda-bindings, on a driver that needs no GPU."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from tests.gpu.driver_children import driver_child
from tests.gpu.driving import built

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(60),
    pytest.mark.skipif(find_spec("cuda") is None, reason="cuda-bindings is not installed"),
]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> str:
    return built(tmp_path_factory.mktemp("driver"))


@pytest.mark.parametrize("planes", ["cuda_ipc", "shm", "tcp"])
@pytest.mark.parametrize("device", [0, 1, None], ids=["same-gpu", "other-gpu", "host"])
async def test_moves(
    driver: str, monkeypatch: pytest.MonkeyPatch, planes: str, device: int | None
) -> None:
    """Granted at once and resumed, longer than the pool, and closed in order."""
    monkeypatch.setenv("FAKE_CUDA_DEVICES", "2")
    monkeypatch.setenv("LD_LIBRARY_PATH", driver)
    settings = {"bind": "tcp://127.0.0.1:*", "blocks": 8, "device": "cuda:0", "planes": planes}
    async with (
        driver_child("receiver", default_blocks=2, **settings) as receiver,
        driver_child("sender", planes=planes) as sender,
    ):
        for request_id, num_tokens in (("short", 100), ("resumed", 900), ("long", 2500)):
            ticket = (await receiver.ask("expect", "ticket", request_id=request_id))["ticket"]
            if device is None:
                sender.tell("send", ticket=ticket, seed=5, num_tokens=num_tokens)
            else:
                sender.tell("put", ticket=ticket, seed=5, num_tokens=num_tokens, device=device)
            sent = await sender.hear("ended", request_id=request_id)
            assert (sent["error"], sent.get("plane")) == (None, planes), sent
            received = await receiver.hear("ended", request_id=request_id)
            assert (received["is_right"], received["num_tokens"]) == (True, num_tokens)
        for child in (receiver, sender):
            child.tell("close")
            await child.hear("closed")
            assert await child.wait() == 0
            assert child.stderr == b""


async def test_a_killed_sender_is_survived(driver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", driver)
    settings = {"bind": "tcp://127.0.0.1:*", "blocks": 8, "device": "cuda:0"}
    async with driver_child("receiver", **settings) as receiver:
        for number in range(2):
            async with driver_child("sender", planes="cuda_ipc") as sender:
                name = f"r{number}"
                ticket = (await receiver.ask("expect", "ticket", request_id=name))["ticket"]
                sender.tell("put", ticket=ticket, seed=1, num_tokens=500, device=0)
                assert (await receiver.hear("ended", request_id=name))["is_right"]
                sender.kill()
        receiver.tell("close")
        await receiver.hear("closed")
        assert await receiver.wait() == 0
