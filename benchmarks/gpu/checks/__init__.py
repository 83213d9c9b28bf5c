"""All checks, in the order in which they are run."""

from __future__ import annotations

from benchmarks.gpu.bench import Check
from benchmarks.gpu.checks import cancels, content, deaths, handles, lives, order, speed

__all__ = ["CHECKS", "QUESTIONS"]

CHECKS = (
    Check("facts", handles.facts, 60),
    Check("handles", handles.handles, 60),
    Check("namespaces", handles.namespaces, 60),
    Check("refusals", handles.refusals, 120),
    Check("bytes", content.extents, 90),
    Check("ways", content.ways, 150),
    Check("late tensors", order.late_tensors, 60),
    Check("slow reader", order.slow_reader, 60),
    Check("sender killed", deaths.sender_killed, 90),
    Check("receiver killed", deaths.receiver_killed, 90),
    Check("reconnects", lives.reconnects, 150),
    Check("cancels", cancels.cancels, 90),
    Check("busy receiver", speed.busy_receiver, 90),
    Check("transfers", speed.transfers, 120),
    Check("planes", speed.planes, 120),
    Check("writes", speed.writes, 60),
    Check("copies", speed.copies, 90),
    Check("opening", speed.opening, 60),
    Check("waking", speed.waking, 60),
)
"""What is most likely to show that nothing works comes first."""

QUESTIONS = {
    "a": "Does memory of one process open in another one here, in this kind of machine?",
    "b": "Which engine copies within one GPU, and how fast by size?",
    "c": "What does a writer see when the process that has the memory is killed?",
    "d": "How much later does a sleeping waiter know of an event's end than one that asks?",
    "e": "From how many extents on is a batch of copies faster than a loop?",
    "f": "Are equal process numbers the only failure between namespaces of process numbers?",
}
"""Those that only a machine with a GPU can answer."""
