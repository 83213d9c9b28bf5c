"""What the two processes know of every transfer, put together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .messages import Finished, Options, Received, Sent

__all__ = ["Report", "Travelled"]


@dataclass(frozen=True, slots=True)
class Travelled:
    """One transfer, as both sides saw it."""

    sent: Sent
    received: Received

    @property
    def error(self) -> str | None:
        """What went wrong, or None if every byte arrived as it was sent."""
        return self.received.error or self.received.difference or self.sent.error

    @property
    def gbps(self) -> float:
        """Gigabytes per second, from `send()` until the receiver had everything."""
        seconds = self.sent.sending_seconds
        return self.received.nbytes / seconds / 1e9 if seconds else 0.0

    def as_json(self) -> dict[str, Any]:
        """Return the transfer as plain values."""
        sent, received = self.sent, self.received
        return {
            "request_id": received.request_id,
            "error": self.error,
            "total_tokens": received.total_tokens,
            "bytes": received.nbytes,
            "buffered_chunks": received.buffered_chunks,
            "resumes": received.resumes,
            "block_indices": received.block_indices,
            "start_offset": received.start_offset,
            "sender_states": [state for state, _ in sent.states],
            "sender_state_seconds": [at for _, at in sent.states],
            "receiver_states": [state for state, _ in received.states],
            "receiver_state_seconds": [at for _, at in received.states],
            "seconds": received.seconds,
            "sending_seconds": sent.sending_seconds,
            "gbps": self.gbps,
            "plane": sent.plane,
            "refused_planes": sent.refused_planes,
            "view": received.view,
            "next_tokens": received.next_tokens,
        }


@dataclass(frozen=True, slots=True)
class Report:
    """The outcome of a demo."""

    options: Options
    address: str
    sent: Mapping[int, Sent]
    received: Mapping[int, Received]
    finished: Finished

    @property
    def transfers(self) -> list[Travelled]:
        """Every request in order; one that nobody sent counts as failed."""
        return [
            Travelled(
                self.sent.get(number) or Sent(number=number, error="never claimed"),
                self.received[number],
            )
            for number in range(self.options.requests)
        ]

    @property
    def verified(self) -> bool:
        """Every byte of every request was compared and is as it was sent."""
        return all(each.error is None for each in self.transfers)

    @property
    def plane(self) -> str:
        """The plane that was used; several are told with commas."""
        return ",".join(sorted({each.sent.plane for each in self.transfers if each.sent.plane}))

    def as_json(self) -> dict[str, Any]:
        """Return the report as plain values."""
        transfers = self.transfers
        nbytes = sum(each.received.nbytes for each in transfers)
        failed = sum(each.error is not None for each in transfers)
        return {
            "plane": self.plane,
            "requests": self.options.requests,
            "completed": len(transfers) - failed,
            "failed": failed,
            "bytes": nbytes,
            "seconds": self.finished.seconds,
            "verified": self.verified,
            "address": self.address,
            "baseline_rss_mb": round(self.finished.baseline_rss_mb, 1),
            "peak_rss_mb": round(self.finished.peak_rss_mb, 1),
            "transfers": [each.as_json() for each in transfers],
        }
