"""Reads parts of a stored object as if it were an open file: what seeks, as Parquet does, needs no whole one."""

import io
from typing import Any

from infra import storage


class PartialFile(io.RawIOBase):
    """An object at a URL, each read of which is one request for a range of its bytes."""

    def __init__(self, url: str, size: int) -> None:
        super().__init__()
        self.url, self.size, self.at = url, size, 0

    def readable(self) -> bool:
        """Tells that it can be read."""
        return True

    def seekable(self) -> bool:
        """Tells that reading can begin anywhere."""
        return True

    def tell(self) -> int:
        """Returns the position of the next read."""
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Moves the position of the next read, and returns it."""
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size}[whence]
        return self.at

    def readinto(self, buffer: Any) -> int:
        """Fills a buffer from here on, and returns the number of bytes that there were."""
        count = min(len(buffer), self.size - self.at)
        if count <= 0:
            return 0
        part = storage.read_part(self.url, self.at, count)
        buffer[:count] = part
        self.at += count
        return count
