"""What a machine is, and what its driver does with handles of memory."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import Sequence

from benchmarks.gpu.bench import Bench, Failed, Skipped, require
from benchmarks.gpu.content import ONE_FIELD
from benchmarks.gpu.peers import Died, Peer, Told

__all__ = ["facts", "handles", "namespaces", "refusals"]

NBYTES = 8 << 20
ALLOCATORS = ("expandable_segments:True", "backend:cudaMallocAsync")
"""Settings of torch's, under which its memory cannot be opened by other processes."""
UNSHARE = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
"""CUDA finds itself in /proc: without one of its own, cuInit fails with 304."""
SECOND = ["sh", "-c", '"$0" "$@"; exit $?']
"""Runs a command as the second process of its namespace."""


async def facts(bench: Bench) -> str:
    """Tell driver, devices, limits, and what kind of machine this is."""
    child = await bench.peer("bare")
    found = await child.call("facts")
    bench.findings |= found
    unshareable = [each["why_no_ipc"] for each in bench.gpus["devices"] if each["why_no_ipc"]]
    require(not unshareable, f"the driver shares no memory here: {unshareable}")
    names = ", ".join(each["name"] for each in bench.gpus["devices"])
    mps = "with MPS" if found["mps_runs"] else "no MPS"
    return (
        f"{names}; runtime {bench.gpus['runtime']}; {mps}; sandbox: {found['sandbox']}; "
        f"/dev/shm {found['shared_memory_gib']} GiB"
    )


async def handles(bench: Bench) -> str:
    """Open, write and close across two processes, and do what is not allowed."""
    owner, other = await asyncio.gather(bench.peer("bare"), bench.peer("bare"))
    await owner.call("allocate", key="pool", nbytes=NBYTES)
    await owner.call("write", key="pool", seed=1, nbytes=NBYTES)
    handle = await owner.call("export", key="pool")
    try:
        await other.call("open", key="pool", handle=handle)
    except Told as exc:
        bench.answers["a"] = f"no: {exc.message}"
        raise Failed(f"another process cannot open the memory: {exc.message}") from None
    require(await other.call("has", key="pool", seed=1, nbytes=NBYTES), "it holds something else")
    await other.call("write", key="pool", seed=2, nbytes=NBYTES)
    require(await owner.call("has", key="pool", seed=2, nbytes=NBYTES), "a write got lost")
    bench.answers["a"] = "yes: it opens, and both processes see each other's writes"
    await _refused(bench, owner, "own handle", "open", key="own", handle=handle)
    if not bench.is_dry:  # the fake one refuses all of these, too, and then counts them as faults
        await _refused(bench, owner, "inside", "export", key="pool", offset=4096)
        await _tried(bench, other, "second open", "open", key="again", handle=handle)
        if bench.findings["second open"] == "done":
            await other.call("close", key="again")
    await other.call("close", key="pool")
    if not bench.is_dry:
        await _tried(bench, other, "second close", "close", key="pool")
    await owner.call("free", key="pool")
    await _tried(bench, other, "open after free", "open", key="pool", handle=handle)
    await owner.call("allocate", key="pool", nbytes=NBYTES)
    again = await owner.call("export", key="pool")
    bench.findings["handle of new memory"] = "the same bytes" if again == handle else "other bytes"
    for child in (owner, other):
        await child.call("works")
    told = ", ".join(f"{name}: {how}" for name, how in bench.findings.items())
    return f"opened and written from both sides; {told}"


async def _tried(bench: Bench, child: Peer, what: str, do: str, **arguments: object) -> None:
    """Do what nobody should, and note what comes of it."""
    try:
        await child.call(do, **arguments)
        bench.findings[what] = "done"
    except Told as exc:
        require(exc.kind == "GpuError", f"{what}: {exc}")
        bench.findings[what] = f"refused ({exc.message})"


async def _refused(bench: Bench, child: Peer, what: str, do: str, **arguments: object) -> None:
    """Do what must be refused."""
    await _tried(bench, child, what, do, **arguments)
    require(bench.findings[what] != "done", f"{what}: this must be refused, and is not")


async def namespaces(bench: Bench) -> str:
    """Open memory of another namespace of process numbers, under an equal and another number."""
    bench.only_real("only CUDA compares process numbers")
    if shutil.which("unshare") is None or not await asyncio.to_thread(_can_unshare):
        raise Skipped("this process may not make namespaces of process numbers")
    same = await _opened(bench, [*UNSHARE], [*UNSHARE])
    different = await _opened(bench, [*UNSHARE], [*UNSHARE, *SECOND])
    bench.findings |= {"equal numbers": same, "different numbers": different}
    bench.answers["f"] = f"equal process numbers: {same}; different ones: {different}"
    return bench.answers["f"]


async def _opened(bench: Bench, first: Sequence[str], second: Sequence[str]) -> str:
    try:
        owner = await bench.peer("bare", prefix=first)
        other = await bench.peer("bare", prefix=second)
        await owner.call("allocate", key="pool", nbytes=NBYTES)
        handle = await owner.call("export", key="pool")
    except (Told, Died) as exc:
        return f"CUDA does not work there ({exc})"
    try:
        await other.call("open", key="pool", handle=handle)
    except (Told, Died) as exc:
        return f"refused ({exc})"
    await other.call("close", key="pool")
    return "opened"


def _can_unshare() -> bool:
    try:
        tried = subprocess.run([*UNSHARE, "true"], timeout=10, capture_output=True, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return tried.returncode == 0


async def refusals(bench: Bench) -> str:
    """Memory that cannot be shared is refused as a pool, and works as a source."""
    bench.only_real("only torch on CUDA has allocators of this kind")
    for allocator in ALLOCATORS:
        environ = {"PYTORCH_CUDA_ALLOC_CONF": allocator, "PYTORCH_ALLOC_CONF": allocator}
        bare, sender, receiver = await asyncio.gather(
            bench.peer("bare", environ),
            bench.peer("sender", environ, fields=ONE_FIELD),
            bench.peer("receiver", environ, fields=ONE_FIELD, blocks=4),
        )
        said = await bare.call("export_tensor", nbytes=32 << 20)
        bench.findings[allocator] = said
        require("cannot be shared" in said or "as a whole" in said, f"not clear: {said}")
        ticket = await receiver.call("expect", request_id="one")
        received = receiver.begin("receive", request_id="one", seed=1)
        await sender.call("send", ticket=ticket, seed=1, num_tokens=300)
        result = await received
        require(not result["wrong"], f"{allocator}: {result['wrong']}")
        require(result["plane"] == "cuda_ipc", f"{allocator}: it came over {result['plane']}")
    return f"refused with a reason, and good as sources: {', '.join(ALLOCATORS)}"
