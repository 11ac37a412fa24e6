"""Where what was found broken is kept for somebody to look at. Nothing is removed from there."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import uuid
from pathlib import Path

from mora_serve.adapters.blobs import sync_directory

log = logging.getLogger(__name__)

# What says that a file itself is bad, and not that the process lacks memory or descriptors.
_BAD = (
    *(errno.EIO, errno.EBADMSG, errno.EUCLEAN, errno.EACCES, errno.EPERM),
    *(errno.EISDIR, errno.ENOTDIR, errno.ELOOP),
)


def means_damage(error: OSError) -> bool:
    """Whether an error while reading says that the file is bad."""
    return error.errno in _BAD


class Quarantine:
    """The directory of broken things; it is made when there is the first."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def take(self, path: Path, what: str) -> bool:
        """Move a file or a directory here, and say so; ``what`` says in the log what it is.

        False where the disk does not let it: it stays where it is then. What is gone already is
        somebody else's find.
        """
        name = f"{path.parent.name}-{path.name}-{uuid.uuid4().hex[:8]}"
        try:
            self._directory.mkdir(mode=0o700, exist_ok=True)
            os.rename(path, self._directory / name)
        except FileNotFoundError:
            return True
        except OSError as e:
            log.error("%s; it cannot be set aside (%s), so it is passed over", what, e.strerror)
            return False
        with contextlib.suppress(OSError):  # if it comes back, it is found again
            sync_directory(self._directory)
            sync_directory(path.parent)
        log.error("%s; set aside as %s/%s", what, self._directory.name, name)
        return True
