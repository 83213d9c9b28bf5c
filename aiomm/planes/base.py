"""The seam of the data planes: what a plane must do, and nothing of how.

A receiver *exports* its arena over a plane and puts the resulting offer into its Hello. A
sender *attaches* to the offer and from then on *writes* rows of its tensors to byte offsets
of the arena. Attaching must fail with :class:`~aiomm.errors.PlaneUnavailable` rather than
guess; the caller tries the next plane.

To write a plane of your own, subclass the three classes here, pass an instance in
`planes=[...]`, or register the class under the entry-point group `aiomm.planes`.
`tests/planes/contract.py` holds the tests that every plane passes.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import msgspec

from ..buffers.arena import Arena
from ..buffers.layout import ByteRange
from ..buffers.tensors import Memory, TokenRows

__all__ = ["MAX_NOTE_NBYTES", "Export", "GrantKey", "Place", "Plane", "RemoteArena", "Run"]

MAX_NOTE_NBYTES = 4096
"""Of one note; see :meth:`RemoteArena.write_and_note`."""


class Place(NamedTuple):
    """Where an endpoint is on the network: what a plane listens on, and what it tells peers."""

    bind: str = "127.0.0.1"
    """An address of this host, or a wildcard; without brackets."""
    advertise: str = "127.0.0.1"
    """The host name or address that peers are told; never a wildcard."""


class GrantKey(NamedTuple):
    """Names one grant: whose, which transfer of theirs, which chunk of it."""

    link: int
    """The receiver's number for its link with the sender that was granted the extents.

    Each of its links has another, counted from 1; its Hello tells the sender.
    """
    generation: int
    """Of the transfer, counted by its sender from 1."""
    sequence: int

    @classmethod
    def of_probe(cls, link: int) -> Self:
        """Return the grant under which the sender on `link` tries the plane, of no transfer."""
        return cls(link, 0, 0)

    @property
    def is_probe(self) -> bool:
        """Whether it is that grant."""
        return self == self.of_probe(self.link)


class Run(msgspec.Struct, frozen=True):
    """One piece of a write: `count` rows from `first` on, to the arena's bytes from `offset` on."""

    rows: TokenRows
    first: int
    count: int
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of the run."""
        return self.count * self.rows.row_nbytes


class Export(ABC):
    """Receiver's side: one arena, open to peers over one plane."""

    noted: Callable[[int, Sequence[bytes]], None]
    """Set by the receiver, for planes that carry notes: to be given the notes of a link, on the
    loop, once every byte of their writes has landed; not if the grant was withdrawn before."""

    @abstractmethod
    def offer(self, link: int) -> bytes:
        """Return what the sender on `link` needs to attach.

        At most 1024 bytes, which is what a Hello takes. The offer may hold a secret of this
        link's own; it travels in the Hello only.
        """

    def permit(self, grant: GrantKey, ranges: Sequence[ByteRange]) -> None:  # noqa: B027
        """Let writes under `grant` touch `ranges`, and nothing else; again replaces them.

        Called before the sender is told of the grant. A plane that cannot check has nothing
        to do here.
        """

    def revoke(self, grant: GrantKey) -> bool:
        """Withdraw `grant`; return True if from now on no byte of it can land.

        False, the default, means that only the sender's word or its death can tell, or the end
        of what :meth:`landing` returns.
        """
        return False

    def landing(self, grant: GrantKey) -> Collection[asyncio.Future[Any]]:
        """Return what still runs for the withdrawn `grant` in this process.

        For planes whose receiver fetches the bytes itself: once all of these are done, none can
        land. Nobody else is given the memory before, whatever the sender says or suffers.
        """
        return ()

    def forget(self, link: int) -> None:  # noqa: B027
        """Drop what is kept for the sender on `link`; it is gone for good."""

    @abstractmethod
    async def aclose(self) -> None:
        """Stop exporting. Idempotent."""


class RemoteArena(ABC):
    """Sender's side: a receiver's arena, reached over one plane."""

    carries_notes: ClassVar[bool] = False
    """Whether there is a :meth:`write_and_note`: for planes whose receiver knows by itself when
    the bytes are there. It need not wait for the sender to hear of that, and to tell it."""

    def write_at_once(self, grant: GrantKey, runs: Sequence[Run]) -> bool:
        """Do what :meth:`write` does, now, if that takes a millisecond or two at most.

        It is asked first, for every write. False, the default, if nothing was done, or not all
        of it; an error means the same.
        """
        return False

    @abstractmethod
    async def write(self, grant: GrantKey, runs: Sequence[Run]) -> None:
        """Copy `runs` into the arena; return once the receiver can read every byte.

        The caller never cancels it (rule 8). After an error bytes may still land until
        :meth:`quiesce` has returned. The loop is never held for more than 5 ms.

        Raises:
            PlaneUnavailable: the write failed, and why.
        """

    async def write_and_note(
        self, grant: GrantKey, runs: Sequence[Run], note: Callable[[], bytes]
    ) -> None:
        """Do what :meth:`write` does, and give the receiver a note behind the last byte, once.

        Args:
            grant: the one that permits it.
            runs: what to write.
            note: called when no byte of `runs` need be read any more, and again should that
                prove wrong; what it returns last counts, at most :data:`MAX_NOTE_NBYTES`. Empty,
                there is none: the transfer has failed, and the bytes may have changed since. On
                return the receiver's :attr:`Export.noted` has had it; after an error nobody knows.
        """
        raise NotImplementedError

    async def quiesce(self) -> None:  # noqa: B027
        """Return once no byte of any failed write can land any more.

        Where the receiver's :meth:`Export.revoke` returns True this may return at once: what
        is still under way is thrown away over there.
        """

    @abstractmethod
    async def aclose(self) -> None:
        """Detach. Running writes are finished or failed first. Idempotent."""


class Plane(ABC):
    """A way bytes move between two processes."""

    name: ClassVar[str]
    """The name on the wire, in settings and in stats, such as `"shm"`."""

    @classmethod
    def at(cls, place: Place, *, by_name: bool) -> Self:
        """Return a plane for an endpoint at `place`.

        Args:
            place: for planes that other hosts reach; the others ignore it.
            by_name: the user has asked for this plane, not for whatever is best.
        """
        return cls()

    def unusable(self) -> str | None:
        """Say why this machine cannot use the plane at all, or None if it may be tried."""
        return None

    def writes_into(self, device: str) -> bool:
        """Whether :meth:`export` can open an arena on a device, such as `"cpu"` or `"cuda:0"`.

        A plane of the host is given memory of the host where the pool is on a GPU; the receiver
        copies what has landed into the pool.
        """
        return device == "cpu"

    async def register(self, memory: Memory) -> None:  # noqa: B027
        """Expect many writes from `memory`, until :meth:`unregister`.

        For planes whose hardware reads only memory that it was told of, which takes long; the
        others have nothing to do. It may be called before anything is attached.

        Raises:
            PlaneUnavailable: this memory cannot be registered, and why. Writes from it work.
        """

    async def unregister(self, memory: Memory) -> None:  # noqa: B027
        """Take back :meth:`register`, after the last write from `memory`. Idempotent."""

    @abstractmethod
    async def export(self, arena: Arena) -> Export:
        """Open `arena` to peers.

        Raises:
            PlaneUnavailable: this arena cannot be exported over this plane, and why.
        """

    @abstractmethod
    async def attach(self, offer: bytes) -> RemoteArena:
        """Reach the arena behind `offer`.

        Raises:
            PlaneUnavailable: it cannot be reached from this process, and why.
        """
