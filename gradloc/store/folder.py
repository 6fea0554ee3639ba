"""Where a run's files lie: a local directory, or a prefix in an object store. Every write is whole or not at all.

Locally a file is written under a temporary name, synced and renamed. An object store shows an object only once it is
complete, so that it needs neither.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from time import sleep
from typing import IO, Any, ClassVar, Literal, Protocol

import pyarrow as pa
from pyarrow import fs

from gradloc.core.names import without_credentials
from gradloc.errors import ConfigError, RunExistsError, StoreError

TEMPORARY = ".tmp"
LOCK = "writer.lock"
Write = Callable[[IO[bytes]], object]
WriterState = Literal["closed", "writing", "gone", "unknown"]
"""A writer that closed (or never was), is at work, or ended without closing; object stores can't tell the last two apart."""
_REMOTE = re.compile(r"[a-z][a-z0-9+]+://")
_AT_WORK = b"recording\n"
"""What a local lock file holds until its writer closes."""


class Folder(Protocol):
    """Named files under one root; names are relative, with ``/``. `local` says whether reading a byte is cheap."""

    local: bool

    def __str__(self) -> str:
        """The root, as a user may see it: without credentials."""

    def names(self, directory: str = "") -> list[str]:
        """Names of all files below `directory`, sorted; none if it isn't there."""

    def exists(self, name: str) -> bool: ...

    def open(self, name: str) -> pa.NativeFile:
        """Opens a file for reading at any place."""

    def write(self, name: str, write: Write) -> None:
        """Makes a file from what `write` puts into the stream it is given.

        Raises:
            StoreError: it can't be written; nothing is left behind then.
        """

    def delete(self, name: str) -> None:
        """Deletes a file, if it is there."""

    def bytes_used(self, directory: str = "") -> int:
        """Bytes of all files below `directory`."""

    @contextlib.contextmanager
    def local_copy(self, name: str) -> Iterator[Path]:
        """A file on the local disk, for readers that map it into memory."""

    def writer(self, name: str) -> WriterState:
        """What became of the writer that `lock` made the only one."""

    def lock(self, name: str) -> Lock:
        """Makes this process the only one that writes what `name` stands for.

        Raises:
            RunExistsError: another one does.
        """


class Lock(Protocol):
    """Held by a writer."""

    def check(self) -> None:
        """Raises `RunExistsError` if another writer has taken over."""

    def release(self) -> None:
        """Safe to call twice."""


def local_path(location: str | Path) -> Path:
    """A directory's path, with the home directory in place of ``~``.

    Raises:
        ConfigError: there is no such home.
    """
    if not isinstance(location, (str, os.PathLike)):
        raise ConfigError(
            f"run is a {type(location).__name__}; pass the path of a directory, or an object store's prefix."
        )
    try:
        return Path(location).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"run={str(location)!r}: {str(error).rstrip('.')}. Write the directory out.") from error


def absolute(location: str | Path) -> str | Path:
    """The same location, whatever the working directory will be.

    Raises:
        ConfigError: it begins with a home that there isn't.
    """
    return location if _REMOTE.match(str(location)) else local_path(location).absolute()


def open_folder(location: str | Path) -> Folder:
    """A directory, or a prefix in an object store (``s3://bucket/prefix``, ``gs://…``, ``abfs://…``).

    An S3-compatible server is named with ``?endpoint_override=host:port&scheme=http``. Credentials come from the environment, as
    AWS's own tools find them.

    Raises:
        ConfigError: the location can't be understood.
        StoreError: the store can't be reached.
    """
    text = str(location)
    if not _REMOTE.match(text):
        return LocalFolder(local_path(location))
    shown = without_credentials(text)
    try:
        filesystem, path = fs.FileSystem.from_uri(text)
    except (ValueError, pa.ArrowInvalid) as error:
        raise ConfigError(
            f"run={shown!r}: not a location that can be opened ({error}). Give a directory, or s3://, gs:// or abfs://."
        ) from error
    except OSError as error:
        raise StoreError(f"run={shown!r}: can't be reached ({error}).") from error
    if isinstance(filesystem, fs.LocalFileSystem):
        return LocalFolder(Path(path))
    return ObjectFolder(filesystem, path.rstrip("/"), shown)


class LocalFolder:
    """A directory on a local disk; the same one when the working directory changes."""

    local = True

    def __init__(self, path: Path) -> None:
        self.path, self._shown = path.absolute(), str(path)

    def __str__(self) -> str:
        return self._shown

    def names(self, directory: str = "") -> list[str]:
        root = self.path / directory
        return sorted(path.relative_to(self.path).as_posix() for path in root.rglob("*") if path.is_file())

    def exists(self, name: str) -> bool:
        return (self.path / name).is_file()

    def open(self, name: str) -> pa.NativeFile:
        return pa.memory_map(os.fsencode(self.path / name))  # names are bytes; Arrow would take text for UTF-8

    def write(self, name: str, write: Write) -> None:
        target = self.path / name
        # Of its own, as several processes may be making the same file.
        temporary = target.with_name(f"{target.name}.{uuid.uuid4().hex}{TEMPORARY}")
        try:
            try:
                with temporary.open("wb") as file:
                    write(file)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, target)
                _sync_directory(target.parent)
            except BaseException:
                with contextlib.suppress(OSError):
                    temporary.unlink(missing_ok=True)
                raise
        except OSError as error:
            raise StoreError(
                f"{target}: can't be written ({error}). Check that the directory exists, is writable and has space."
            ) from error

    def make(self, *directories: str) -> None:
        """Makes directories, which an object store needs not.

        Raises:
            StoreError: they can't be made.
        """
        try:
            for directory in directories:
                (self.path / directory).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(
                f"run={self._shown!r}: can't be made ({error}). Choose a path in a writable directory."
            ) from error

    def delete(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)

    def bytes_used(self, directory: str = "") -> int:
        total = 0
        for name in self.names(directory):
            with contextlib.suppress(FileNotFoundError):  # a temporary name that a writer has just given up
                total += (self.path / name).stat().st_size
        return total

    @contextlib.contextmanager
    def local_copy(self, name: str) -> Iterator[Path]:
        yield self.path / name

    def writer(self, name: str) -> WriterState:
        try:
            with (self.path / name).open("rb") as file:
                if not file.read(1):
                    return "closed"
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    return "writing"
                file.seek(0)  # it may have closed in between
                return "gone" if file.read(1) else "closed"
        except FileNotFoundError:
            return "closed"
        except OSError:
            return "unknown"

    def lock(self, name: str) -> Lock:
        return _FileLock(self.path / name)


def _sync_directory(directory: Path) -> None:
    """Makes a rename in `directory` survive a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


_A_LOOK = 0.05
"""Seconds after which a reader that looked whether a writer is at work has let go for certain."""


class _FileLock:
    def __init__(self, path: Path) -> None:
        try:
            self._file = path.open("a")
        except OSError as error:
            raise StoreError(f"{path}: can't be made ({error}).") from error
        for last_try in (False, True):
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if not last_try:
                    sleep(_A_LOOK)
                    continue
                self._file.close()
                raise RunExistsError(
                    f"{path.parent}: another process is writing this run. Choose another run=, or wait for it."
                ) from error
        self._mark(_AT_WORK)

    def _mark(self, word: bytes) -> None:
        # A full disk will be noticed by who writes the run.
        with contextlib.suppress(OSError):
            os.ftruncate(self._file.fileno(), 0)
            os.write(self._file.fileno(), word)

    def check(self) -> None:
        """The system keeps others out."""

    def release(self) -> None:
        if not self._file.closed:
            self._mark(b"")
            with contextlib.suppress(OSError):
                fcntl.flock(self._file, fcntl.LOCK_UN)
            self._file.close()


class ObjectFolder:
    """A prefix in an object store, through pyarrow's filesystems."""

    local = False

    def __init__(self, filesystem: Any, root: str, shown: str) -> None:
        self._filesystem, self._root, self._shown = filesystem, root, shown

    def __str__(self) -> str:
        return self._shown

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _files(self, directory: str = "") -> list[Any]:
        chosen = fs.FileSelector(self._at(directory), recursive=True, allow_not_found=True)
        return [entry for entry in self._filesystem.get_file_info(chosen) if entry.type is fs.FileType.File]

    def names(self, directory: str = "") -> list[str]:
        return sorted(str(PurePosixPath(entry.path).relative_to(self._root)) for entry in self._files(directory))

    def exists(self, name: str) -> bool:
        return bool(self._filesystem.get_file_info(self._at(name)).type is fs.FileType.File)

    def open(self, name: str) -> pa.NativeFile:
        return self._filesystem.open_input_file(self._at(name))

    def write(self, name: str, write: Write) -> None:
        buffer = pa.BufferOutputStream()  # the upload begins once the content is whole
        write(buffer)
        try:
            with self._filesystem.open_output_stream(self._at(name)) as stream:
                stream.write(buffer.getvalue())
        except OSError as error:
            raise StoreError(f"{self._shown}/{name}: can't be written ({error}).") from error

    def delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._filesystem.delete_file(self._at(name))

    def bytes_used(self, directory: str = "") -> int:
        return sum(entry.size for entry in self._files(directory))

    @contextlib.contextmanager
    def local_copy(self, name: str) -> Iterator[Path]:
        with tempfile.NamedTemporaryFile(suffix=PurePosixPath(name).suffix) as file:
            with self.open(name) as source:
                file.write(source.read())
            file.flush()
            yield Path(file.name)

    def writer(self, name: str) -> WriterState:
        try:
            with self.open(name) as file:
                return "writing" if file.read().decode() in _ObjectLock.held else "unknown"
        except FileNotFoundError:
            return "closed"
        except (OSError, ValueError):
            return "unknown"

    def lock(self, name: str) -> Lock:
        return _ObjectLock(self, name)


class _ObjectLock:
    """An object with the writer's own word in it. Stores lack a lock that ends with the process, so the last one to come takes
    over, and the one before stops at its next write; the two never both write."""

    held: ClassVar[set[str]] = set()
    """The words of this process's own writers."""

    def __init__(self, folder: ObjectFolder, name: str) -> None:
        self._folder, self._name, self._word = folder, name, uuid.uuid4().hex
        folder.write(name, lambda stream: stream.write(self._word.encode()))
        self.held.add(self._word)

    def check(self) -> None:
        with self._folder.open(self._name) as file:
            there = file.read().decode()
        if there != self._word:
            raise RunExistsError(f"{self._folder}: another process has taken over writing this run.")

    def release(self) -> None:
        if self._word in self.held:
            self.held.remove(self._word)
            with contextlib.suppress(OSError):
                self.check()
                self._folder.delete(self._name)


__all__ = [
    "LOCK",
    "TEMPORARY",
    "Folder",
    "LocalFolder",
    "Lock",
    "ObjectFolder",
    "WriterState",
    "absolute",
    "local_path",
    "open_folder",
]
