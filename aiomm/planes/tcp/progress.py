"""How far writes have come at the receiver: what outlives the connection that carries them."""

from __future__ import annotations

from typing import Any

from ...errors import ProtocolError
from ..permits import Permit
from .wire import MAX_ANSWERS, Answer, Header, Piece, Status

__all__ = ["Attachment", "Attachments", "Incoming"]

MAX_ATTACHMENTS = 8
"""Of one link; one more, and the progress of the first of them is forgotten."""
MAX_UNFINISHED = 8
"""Writes of one attachment whose progress is kept. Only one is on its way at a time; more of
them break only when connections do so again and again."""
MAX_ENDED = 256
"""Writes of one attachment whose end is kept, for the case that the answer was lost. A sender has
no more of them on their way, so that none is written again, and its note given again."""
assert MAX_UNFINISHED + MAX_ENDED <= MAX_ANSWERS


class Incoming:
    """One announced write: where its next bytes belong, and how it ends."""

    def __init__(self, header: Header, permit: Permit | None) -> None:
        self.number = header.number
        self.landed = 0
        """Bytes taken from the socket, in place or thrown away."""
        self.pieces = header.pieces
        self.has_note = header.has_note
        self.note = b""
        """What has come behind the bytes."""
        self._index = 0
        self._done = 0
        self._permit = permit
        if permit is not None and not all(permit.covers(*piece) for piece in header.pieces):
            self._permit = None
        self._skip_finished()

    @property
    def is_complete(self) -> bool:
        """Whether every announced byte has been taken from the socket."""
        return self._index == len(self.pieces)

    @property
    def status(self) -> Status:
        """How the write ends if nothing else happens to it. It asks the permit anew every time."""
        if self._permit is None:
            return Status.NOT_PERMITTED
        return Status.REVOKED if self._permit.is_withdrawn else Status.LANDED

    def place(self, max_nbytes: int) -> Piece:
        """Return where the next bytes belong, at most so many."""
        piece = self.pieces[self._index]
        return Piece(piece.offset + self._done, min(piece.nbytes - self._done, max_nbytes))

    def advance(self, nbytes: int) -> None:
        """Count bytes that have been taken."""
        self.landed += nbytes
        self._done += nbytes
        self._skip_finished()

    def _skip_finished(self) -> None:
        while not self.is_complete and self._done == self.pieces[self._index].nbytes:
            self._index += 1
            self._done = 0


class Attachment:
    """The writes of one sender's attachment, over all connections that follow each other."""

    def __init__(self) -> None:
        self._unfinished: dict[int, Incoming] = {}
        self._ended: dict[int, Answer] = {}

    def begin(self, header: Header, permit: Permit | None) -> Incoming:
        """Return the write that `header` announces; one that goes on is where it was.

        Raises:
            ProtocolError: it goes on with another write, or at another byte.
        """
        known = self._unfinished.pop(header.number, None)
        if header.landed:
            if known is None or (known.landed, known.pieces) != (header.landed, header.pieces):
                raise ProtocolError(f"write {header.number} does not go on where it broke off")
            incoming = known
        else:
            incoming = Incoming(header, permit)
        self._unfinished[header.number] = incoming
        _bound(self._unfinished, MAX_UNFINISHED)
        return incoming

    def end(self, incoming: Incoming) -> Answer:
        """Return how a write has ended, and keep it until the sender has surely heard of it."""
        self._unfinished.pop(incoming.number, None)
        answer = Answer(incoming.number, incoming.status, incoming.landed)
        self._ended[answer.number] = answer
        _bound(self._ended, MAX_ENDED)
        return answer

    def resume(self, oldest: int) -> list[Answer]:
        """Return how the writes from `oldest` on stand, and forget those before it."""
        for kept in (self._unfinished, self._ended):
            for number in [number for number in kept if number < oldest]:
                del kept[number]
        for incoming in list(self._unfinished.values()):
            if incoming.status is not Status.LANDED:
                self.end(incoming)
        unfinished = [
            Answer(incoming.number, Status.UNFINISHED, incoming.landed)
            for incoming in self._unfinished.values()
            if incoming.landed
        ]
        return [*self._ended.values(), *unfinished]


class Attachments:
    """The attachments of all senders of one arena."""

    def __init__(self) -> None:
        self._attachments: dict[int, dict[int, Attachment]] = {}

    def get(self, link: int, number: int) -> Attachment:
        """Return an attachment over `link`, a new one if it is not known."""
        of_link = self._attachments.setdefault(link, {})
        attachment = of_link.setdefault(number, Attachment())
        _bound(of_link, MAX_ATTACHMENTS)
        return attachment

    def forget(self, link: int) -> None:
        """Drop those of one link."""
        self._attachments.pop(link, None)

    def clear(self) -> None:
        """Drop all of them."""
        self._attachments.clear()


def _bound(kept: dict[int, Any], limit: int) -> None:
    """Drop what was put first into `kept` if that is more than `limit`."""
    while len(kept) > limit:
        del kept[next(iter(kept))]
