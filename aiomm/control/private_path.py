"""The right to a Unix socket path: a private directory, and a lock beside the socket.

ZeroMQ unlinks whatever stands at an `ipc://` path before it binds, so a second bind silently
steals a live one; new peers then reach the thief. The lock makes the second bind fail. It dies
with its process, so nothing has to be cleared after a crash.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from pathlib import Path

__all__ = ["PathClaim"]

OPEN_FLAGS = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW


class PathClaim:
    """Holds one path for this process until released.

    Raises:
        OSError: EADDRINUSE if a living process holds the path; EACCES if others than this user
            may enter the directory; or what the file system says.
    """

    def __init__(self, path: Path) -> None:
        _require_private(path.parent)
        self._path = path
        self._lock_path = path.with_name(path.name + ".lock")
        self._descriptor: int | None = _lock(self._lock_path, path)

    def release(self) -> None:
        """Give the path up and remove what stands there. Idempotent."""
        if self._descriptor is None:
            return
        self._path.unlink(missing_ok=True)  # ZeroMQ leaves its socket behind
        # Unlinked while still locked: whoever waits for this very file sees that it is gone.
        self._lock_path.unlink(missing_ok=True)
        os.close(self._descriptor)
        self._descriptor = None


def _require_private(directory: Path) -> None:
    with contextlib.suppress(FileExistsError):
        directory.mkdir(mode=0o700)
    status = directory.stat()
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
        message = "the directory of an ipc:// socket must belong to this user alone (mode 0700)"
        raise PermissionError(errno.EACCES, message, str(directory))


def _lock(lock_path: Path, path: Path) -> int:
    while True:
        descriptor = os.open(lock_path, OPEN_FLAGS, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_same_file(descriptor, lock_path):
                return descriptor
        except BlockingIOError as exc:
            os.close(descriptor)
            raise OSError(
                errno.EADDRINUSE, "another process listens at this path", str(path)
            ) from exc
        os.close(descriptor)  # its former holder removed it between our open and our lock


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
