"""Conversations on disk: what is there, and how one is read and replaced without ever being torn.

A conversation is a directory of immutable segment files and one manifest that names them; saving
writes a segment, then a manifest, each through a temporary file and a rename. csrc/FORMAT.md is the
law for every byte; the C library reads and writes the containers, this module decides which files
there are and what a manifest may say. Nothing is pickled.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import fcntl
import functools
import hashlib
import math
import os
import re
import shutil
import stat
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from . import _core
from .errors import CorruptionError, FormatError, KrulError, MismatchError, StoreFullError
from .manifest import (
    FORMAT,
    MAX_GENERATION,
    TENANT_PATTERN,
    Entry,
    LayerLayout,
    Manifest,
    SegmentInfo,
    check_conversation_id,
    check_coverage,
    decode_manifest,
    encode_manifest,
    shown,
)
from .profiles import Profiles
from .reports import ConversationInfo, GcReport, Problem

if TYPE_CHECKING:
    from .cache import Cache
    from .profile import Profile
    from .settings import Settings

__all__ = [
    "CommitResult",
    "ConversationFiles",
    "Entry",
    "LayerLayout",
    "Manifest",
    "SegmentInfo",
    "Store",
]

_MANIFEST_NAME = "manifest"
_DAMAGED_NAME = "manifest.damaged"
_LOCK_NAME = "lock"
_TEMPORARY_PREFIX = ".tmp-"
_SEGMENT_PATTERN = re.compile(r"segment-([0-9]{1,18})\Z", re.ASCII)
_DIRECTORY_PATTERN = re.compile(r"[0-9a-f]{32}\Z", re.ASCII)
_SCHEME_PATTERN = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_HEADER_CRC32C_AT = 60
_HEADER_VERSION_AT = 8

_LOCK_TIMEOUT_S = 10.0
_LOCK_POLL_S = 0.005
# A file or directory younger than this may belong to a save that is just beginning.
_GRACE_S = 600.0


@dataclass(frozen=True)
class CommitResult:
    """What a commit wrote; ``manifest`` is the one now in the store, with its files named."""

    generation: int
    stored_bytes: int
    new_bytes: int
    manifest: Manifest


# ---- files -------------------------------------------------------------------------------------


@contextlib.contextmanager
def _naming(path: str) -> Iterator[None]:
    """Put the file's name into what goes wrong with it."""
    try:
        yield
    except (FormatError, CorruptionError) as exception:
        raise type(exception)(f"{path}: {exception}") from None
    except StoreFullError as exception:
        raise StoreFullError(exception.errno, exception.strerror, path) from None
    except OSError as exception:
        if exception.errno is None or exception.filename is not None:
            raise
        raise OSError(exception.errno, exception.strerror, path) from None


def _open_directory(path: str) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _open_file(directory_fd: int, name: str) -> int:
    """Open for reading; links are not followed, and a FIFO does not block."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        return os.open(name, flags, dir_fd=directory_fd)
    except OSError as exception:
        if exception.errno == errno.ELOOP:
            raise CorruptionError("a symbolic link stands where a file should") from None
        exception.filename = None
        raise


def _make_directory(path: str) -> None:
    """Make a private directory and make its name durable; one that is there is left as it is."""
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        if not os.path.isdir(path):
            raise NotADirectoryError(
                errno.ENOTDIR, "a file stands where a directory should", path
            ) from None
        return
    parent_fd = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(parent_fd)
    finally:
        os.close(parent_fd)


def _header_crc32c(fd: int) -> int:
    return int.from_bytes(os.pread(fd, 4, _HEADER_CRC32C_AT), "little")


def _is_later_version(fd: int) -> bool:
    """Tell whether this is an intact header of a format that is not known yet."""
    header = os.pread(fd, FORMAT["HEADER_BYTES"], 0)
    if len(header) < FORMAT["HEADER_BYTES"]:
        return False
    is_whole = _core.crc32c(header[:_HEADER_CRC32C_AT]) == int.from_bytes(
        header[_HEADER_CRC32C_AT:], "little"
    )
    version = int.from_bytes(header[_HEADER_VERSION_AT : _HEADER_VERSION_AT + 4], "little")
    return is_whole and header.startswith(b"\x89KRUL\r\n\x1a") and version > FORMAT["VERSION"]


def _file_bytes(payloads: Sequence[Any]) -> int:
    """Size of a container that holds these."""
    end = FORMAT["HEADER_BYTES"] + len(payloads) * FORMAT["ENTRY_BYTES"]
    for payload in payloads:
        end += -end % FORMAT["ALIGNMENT"] + memoryview(payload).nbytes
    return end


def _is_ours(name: str) -> bool:
    """Tell whether a save could have left this file behind."""
    return name.startswith(_TEMPORARY_PREFIX) or _SEGMENT_PATTERN.match(name) is not None


def _lock_now(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class ConversationFiles:
    """The directory of one conversation: read it, replace it, never tear it.

    Safe from several threads and processes. Reading takes no lock: files that a manifest names do
    not change. Writers exclude each other by a lock that ends with its process.

    Parameters
    ----------
    store : Store
        The store that it is in.
    conversation_id : str
        1 to 1024 bytes of UTF-8, any characters.
    """

    def __init__(self, store: Store, conversation_id: str) -> None:
        check_conversation_id(conversation_id)
        self.store = store
        self.conversation_id = conversation_id
        digest = hashlib.sha256(conversation_id.encode()).hexdigest()[:32]
        self.path = os.path.join(store.tenant_path, digest)
        self._manifest: Manifest | None = None

    def read_manifest(self) -> Manifest | None:
        """Return what the store says of the conversation, or None if it has none.

        Raises
        ------
        FormatError
            Not krul's, of a later version, or not as FORMAT.md demands.
        CorruptionError
            Damaged, or another conversation's.
        OSError
            The directory cannot be read.
        """
        try:
            directory_fd = _open_directory(self.path)
        except FileNotFoundError:
            return None
        try:
            manifest = self._read_manifest_at(directory_fd)
        finally:
            os.close(directory_fd)
        self._manifest = manifest
        return manifest

    def has_later_version(self) -> bool:
        """Whether the manifest is whole, but of a version of the format not known here."""
        directory_fd = _open_directory(self.path)
        try:
            return self._has_later_version(directory_fd)
        finally:
            os.close(directory_fd)

    def open_segment(
        self, info: SegmentInfo, manifest: Manifest | None = None
    ) -> tuple[int, list[Entry]]:
        """Open a segment and check that it is the one meant and holds what it must.

        Parameters
        ----------
        info : SegmentInfo
            From the manifest.
        manifest : Manifest or None
            The manifest that it is from; None takes the one read or committed last.

        Returns
        -------
        fd : int
            An open file, the caller's to close.
        entries : list of Entry
            Its blocks, layer-major. Payloads are not read yet.

        Raises
        ------
        CorruptionError
            Missing, damaged, or not the file that the manifest was written with.
        FormatError
            Blocks that do not fit the model's layers, or a later version.
        """
        manifest = manifest or self._manifest or self.read_manifest()
        if manifest is None:
            raise CorruptionError(f"{self.path}: there is no manifest for {info.file}")
        path = os.path.join(self.path, info.file)
        with _naming(path):
            directory_fd = _open_directory(self.path)
            try:
                fd = _open_file(directory_fd, info.file)
            except FileNotFoundError:
                raise CorruptionError("the manifest names this file but it is missing") from None
            finally:
                os.close(directory_fd)
            try:
                entries = self._check_head(fd, info)
                check_coverage(entries, info, manifest)
            except BaseException:
                os.close(fd)
                raise
        return fd, entries

    def commit(
        self,
        manifest: Manifest,
        entries: Sequence[tuple[int, ...]] = (),
        payloads: Sequence[Any] = (),
        expected_generation: int = 0,
    ) -> CommitResult:
        """Add a segment, or only change what the manifest says, in one atomic step.

        Parameters
        ----------
        manifest : Manifest
            The conversation as it shall be. With entries, its last segment is the new one, with
            an empty ``file``; without, every segment is one already stored. Generation, id,
            tenant, times and the new segment's file, size and checksum are filled in.
        entries : sequence of Entry or 14-tuples
            The blocks of the new segment, layer-major; offsets and checksums are filled in.
        payloads : sequence of buffers
            Contiguous bytes, one per entry.
        expected_generation : int
            The generation that the caller read, 0 if there was no conversation or its manifest
            was damaged.

        Returns
        -------
        CommitResult
            Everything is durable when it is returned.

        Raises
        ------
        MismatchError
            Somebody else saved or deleted the conversation since; nothing was written.
        StoreFullError
            The disk, the quota or the store's ``max_bytes``; the old conversation stands.
        ValueError
            The manifest or a block breaks a rule of the format; nothing was written.
        KrulError
            Another process holds the conversation's lock for too long.

        Notes
        -----
        A manifest that is damaged on disk is kept as ``manifest.damaged``; from then on no
        segment of this conversation is removed until it is deleted. One of a later format version
        is never replaced.
        """
        rows = [Entry._make(entry) for entry in entries]
        manifest = self._prepared(manifest, rows, payloads, expected_generation)
        directory_fd, lock_fd = _lock(self.path, self.conversation_id, is_made=True)
        try:
            result = self._commit_locked(
                directory_fd, manifest, rows, payloads, expected_generation
            )
            _remove_garbage(directory_fd, result.manifest)
        finally:
            _unlock(directory_fd, lock_fd)
        self._manifest = result.manifest
        return result

    def delete(self) -> bool:
        """Remove the conversation; False if there was none."""
        try:
            directory_fd, lock_fd = _lock(self.path, self.conversation_id, is_made=False)
        except FileNotFoundError:
            return False
        try:
            _remove_conversation(directory_fd, self.path)
        finally:
            _unlock(directory_fd, lock_fd)
        return True

    # -- steps of a commit

    def _prepared(
        self,
        manifest: Manifest,
        entries: Sequence[Entry],
        payloads: Sequence[Any],
        expected_generation: int,
    ) -> Manifest:
        """Return the manifest with all that can be known before the lock; refuse bad calls."""
        is_count = isinstance(expected_generation, int) and not isinstance(
            expected_generation, bool
        )
        if not is_count or not 0 <= expected_generation < MAX_GENERATION:
            raise ValueError(
                f"expected_generation is {shown(expected_generation)} but must be an integer from "
                f"0 to {MAX_GENERATION - 1}"
            )
        if len(entries) != len(payloads):
            raise ValueError(f"there are {len(entries)} entries but {len(payloads)} payloads")
        n_new = sum(1 for segment in manifest.segments if segment.file == "")
        is_last_new = bool(manifest.segments) and manifest.segments[-1].file == ""
        if n_new != (1 if entries else 0) or (entries and not is_last_new):
            raise ValueError(
                f"{n_new} segments have an empty file but must be {1 if entries else 0}: "
                "the last one when there are entries, none otherwise"
            )
        now_s = time.time()
        manifest = replace(
            manifest,
            conversation_id=self.conversation_id,
            tenant=self.store.tenant,
            generation=expected_generation + 1,
            created_s=now_s,
            updated_s=now_s,
            segments=tuple(manifest.segments),
            layers=tuple(manifest.layers),
        )
        # The segment's own facts are not known yet: stand-ins of the greatest length.
        stand_in = manifest
        if entries:
            stand_in = _with_last_segment(
                manifest, f"segment-{10**18 - 1}", _file_bytes(payloads), (1 << 32) - 1
            )
        encode_manifest(stand_in)
        if entries:
            try:
                check_coverage(entries, manifest.segments[-1], manifest)
            except FormatError as exception:
                raise ValueError(f"entries do not fit the manifest: {exception}") from None
        return manifest

    def _commit_locked(
        self,
        directory_fd: int,
        manifest: Manifest,
        entries: Sequence[Entry],
        payloads: Sequence[Any],
        expected_generation: int,
    ) -> CommitResult:
        is_damaged, current = self._check_generation(directory_fd, expected_generation)
        if current is not None:
            manifest = replace(manifest, created_s=current.created_s)
        for segment in manifest.segments[: -1 if entries else None]:
            self._check_still_there(directory_fd, segment)
        self._check_room(directory_fd, manifest, payloads)
        segment_bytes = 0
        segment_name = None
        if entries:
            segment_name = self._next_segment_name(directory_fd, manifest.generation)
            with _naming(os.path.join(self.path, segment_name)):
                segment_bytes = _core.store_write(
                    directory_fd, segment_name, FORMAT["SEGMENT"], entries, payloads
                )
        try:
            if segment_name is not None:
                fd = _open_file(directory_fd, segment_name)
                try:
                    crc32c = _header_crc32c(fd)
                finally:
                    os.close(fd)
                manifest = _with_last_segment(manifest, segment_name, segment_bytes, crc32c)
            manifest_entries, manifest_payloads = encode_manifest(manifest)
            if is_damaged:
                _keep_aside(directory_fd)
            with _naming(os.path.join(self.path, _MANIFEST_NAME)):
                manifest_bytes = _core.store_write(
                    directory_fd,
                    _MANIFEST_NAME,
                    FORMAT["MANIFEST"],
                    manifest_entries,
                    manifest_payloads,
                )
        except BaseException:
            if segment_name is not None:
                self._withdraw(directory_fd, segment_name)
            raise
        return CommitResult(
            generation=manifest.generation,
            stored_bytes=manifest_bytes + sum(s.file_bytes for s in manifest.segments),
            new_bytes=manifest_bytes + segment_bytes,
            manifest=manifest,
        )

    def _check_generation(
        self, directory_fd: int, expected_generation: int
    ) -> tuple[bool, Manifest | None]:
        """Refuse a conversation that is not as the caller knows it.

        Returns whether its manifest is damaged, and the manifest if it is not.
        """
        try:
            current = self._read_manifest_at(directory_fd)
        except CorruptionError:
            return True, None
        except FormatError:
            if self._has_later_version(directory_fd):
                raise
            return True, None
        found = 0 if current is None else current.generation
        if found != expected_generation:
            how = "another save came first" if found else "it has been deleted"
            raise MismatchError(
                f"conversation {shown(self.conversation_id)} was opened at generation "
                f"{expected_generation} but is at generation {found} now: {how}; "
                "nothing was written"
            )
        return False, current

    def _has_later_version(self, directory_fd: int) -> bool:
        fd = _open_file(directory_fd, _MANIFEST_NAME)
        try:
            return _is_later_version(fd)
        finally:
            os.close(fd)

    def _check_still_there(self, directory_fd: int, segment: SegmentInfo) -> None:
        """Refuse to name a file that is not the one that the caller knows."""
        try:
            fd = _open_file(directory_fd, segment.file)
        except (FileNotFoundError, CorruptionError):
            raise MismatchError(
                f"{os.path.join(self.path, segment.file)}: missing, but the conversation to be "
                "saved continues it; nothing was written"
            ) from None
        try:
            found = (os.fstat(fd).st_size, _header_crc32c(fd))
        finally:
            os.close(fd)
        if found != (segment.file_bytes, segment.crc32c):
            raise MismatchError(
                f"{os.path.join(self.path, segment.file)}: size and CRC-32C are {found} but the "
                f"conversation to be saved continues {(segment.file_bytes, segment.crc32c)}; "
                "nothing was written"
            )

    def _check_room(self, directory_fd: int, manifest: Manifest, payloads: Sequence[Any]) -> None:
        max_bytes = self.store.max_bytes
        if max_bytes is None:
            return
        new_bytes = _file_bytes(payloads) if len(payloads) else 0
        if len(payloads):
            manifest = _with_last_segment(manifest, f"segment-{10**18 - 1}", new_bytes, 0)
        new_bytes += _file_bytes(encode_manifest(manifest)[1])
        with contextlib.suppress(FileNotFoundError):
            new_bytes -= os.stat(_MANIFEST_NAME, dir_fd=directory_fd).st_size
        wanted_bytes = self.store.usage_bytes() + new_bytes
        if wanted_bytes > max_bytes:
            raise StoreFullError(
                errno.ENOSPC,
                f"the store would hold {wanted_bytes} bytes but max_bytes is {max_bytes}",
                self.path,
            )

    def _next_segment_name(self, directory_fd: int, generation: int) -> str:
        """Return a name that no file has: after damage the numbers may run ahead."""
        taken = [_SEGMENT_PATTERN.match(name) for name in os.listdir(directory_fd)]
        numbers = [int(match[1]) for match in taken if match is not None]
        last = max((number for number in numbers if number < MAX_GENERATION), default=0)
        return f"segment-{max(generation, last + 1)}"

    def _withdraw(self, directory_fd: int, segment_name: str) -> None:
        """Remove a segment that did not get its manifest; leave it if that cannot be told."""
        with contextlib.suppress(KrulError, OSError):
            current = self._read_manifest_at(directory_fd)
            names = () if current is None else [segment.file for segment in current.segments]
            if segment_name not in names:
                os.unlink(segment_name, dir_fd=directory_fd)

    # -- reading

    def _read_manifest_at(self, directory_fd: int) -> Manifest | None:
        with _naming(os.path.join(self.path, _MANIFEST_NAME)):
            try:
                fd = _open_file(directory_fd, _MANIFEST_NAME)
            except FileNotFoundError:
                return None
            try:
                manifest = _read_manifest_file(fd)
            finally:
                os.close(fd)
            found = (manifest.tenant, manifest.conversation_id)
            wanted = (self.store.tenant, self.conversation_id)
            if found != wanted:
                raise CorruptionError(
                    f"the manifest of {shown(found)} stands where that of {shown(wanted)} should"
                )
        return manifest

    def _check_head(self, fd: int, info: SegmentInfo) -> list[Entry]:
        kind, _, file_bytes, entries = _core.store_read_head(fd)
        if kind != FORMAT["SEGMENT"]:
            raise FormatError(f"the kind of file is {kind} but must be {FORMAT['SEGMENT']}")
        found = (file_bytes, _header_crc32c(fd))
        if found != (info.file_bytes, info.crc32c):
            raise CorruptionError(
                f"size and header CRC-32C are {found} but the manifest was written with "
                f"{(info.file_bytes, info.crc32c)}"
            )
        return [Entry._make(entry) for entry in entries]


def _with_last_segment(manifest: Manifest, name: str, n_bytes: int, crc32c: int) -> Manifest:
    last = replace(manifest.segments[-1], file=name, file_bytes=n_bytes, crc32c=crc32c)
    return replace(manifest, segments=(*manifest.segments[:-1], last))


def _read_manifest_file(fd: int) -> Manifest:
    kind, _, _, entries = _core.store_read_head(fd)
    if kind != FORMAT["MANIFEST"]:
        raise FormatError(f"the kind of file is {kind} but must be {FORMAT['MANIFEST']}")
    return decode_manifest({entry[0]: _core.store_read_payload(fd, entry) for entry in entries})


def _keep_aside(directory_fd: int) -> None:
    """Give a damaged manifest a second name, so that the first can be replaced."""
    number = 1
    while True:
        name = _DAMAGED_NAME if number == 1 else f"{_DAMAGED_NAME}-{number}"
        try:
            os.link(
                _MANIFEST_NAME,
                name,
                src_dir_fd=directory_fd,
                dst_dir_fd=directory_fd,
                follow_symlinks=False,
            )
            return
        except FileExistsError:
            number += 1


def _lock(
    path: str, label: str, *, is_made: bool, timeout_s: float | None = None
) -> tuple[int, int]:
    """Return a conversation's open directory and its open lock, held.

    FileNotFoundError if it is not there and not to be made; KrulError if the lock is not free in
    time.
    """
    wait_s = _LOCK_TIMEOUT_S if timeout_s is None else timeout_s
    deadline_s = time.monotonic() + wait_s
    while True:
        if is_made:
            _make_directory(os.path.dirname(path))
            _make_directory(path)
        fds = []
        try:
            fds.append(_open_directory(path))
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            fds.append(os.open(_LOCK_NAME, flags, 0o600, dir_fd=fds[0]))
            while not _lock_now(fds[1]):
                if time.monotonic() >= deadline_s:
                    raise KrulError(
                        f"conversation {shown(label)} has been locked by another save for "
                        f"{wait_s} s; nothing was written"
                    )
                time.sleep(_LOCK_POLL_S)
            # Somebody may have deleted the conversation while we waited: then this lock is that of
            # a directory that is gone.
            named = os.stat(os.path.join(path, _LOCK_NAME), follow_symlinks=False)
            if os.path.samestat(os.fstat(fds[1]), named):
                directory_fd, lock_fd = fds
                fds = []
                return directory_fd, lock_fd
        except FileNotFoundError:
            if not is_made:
                raise
        finally:
            for fd in fds:
                os.close(fd)


def _unlock(directory_fd: int, lock_fd: int) -> None:
    # Unlocked by name: a child forked meanwhile has the same open file and would keep it locked.
    fcntl.flock(lock_fd, fcntl.LOCK_UN)
    os.close(lock_fd)
    os.close(directory_fd)


def _remove_garbage(
    directory_fd: int, manifest: Manifest | None, older_than_s: float = math.inf
) -> tuple[int, int]:
    """Remove what no manifest names; with the lock. Returns files and bytes removed."""
    names = os.listdir(directory_fd)
    is_damaged = any(name.startswith(_DAMAGED_NAME) for name in names)
    used = {segment.file for segment in manifest.segments} if manifest is not None else set()
    n_files = n_bytes = 0
    for name in names:
        is_kept = name in used or (is_damaged and not name.startswith(_TEMPORARY_PREFIX))
        if is_kept or not _is_ours(name):
            continue
        with contextlib.suppress(OSError):
            about = os.stat(name, dir_fd=directory_fd, follow_symlinks=False)
            if about.st_mtime < older_than_s:
                os.unlink(name, dir_fd=directory_fd)
                n_files += 1
                n_bytes += about.st_size
    return n_files, n_bytes


def _remove_conversation(directory_fd: int, path: str) -> None:
    """Remove all files; with the lock. The manifest first: half a removal is no conversation."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(_MANIFEST_NAME, dir_fd=directory_fd)
        os.fsync(directory_fd)
    shutil.rmtree(path)


# ---- the store ---------------------------------------------------------------------------------


class Store:
    """Conversations under one directory.

    Parameters
    ----------
    location : str or path
        A directory, made if it is missing (0700; files are 0600), or ``"memory:"`` for a private
        one that is gone when the store is closed. ``~`` is expanded.
    max_bytes : int or None
        A save that would leave this tenant with more fails with `StoreFullError`, and the old
        version stands. Saves of several conversations at one instant may pass it together.
        Profiles, and what they are learned from, are not counted.
    ttl_s : float or None
        `gc` removes conversations that were last saved longer ago, in seconds.
    tenant : str
        1 to 64 of ``A-Z a-z 0-9 . _ -``, not beginning with a dot: whose conversations. Tenants
        do not see one another's.

    Raises
    ------
    ValueError
        A location of another kind, or a bad value; the message names the argument.
    OSError
        The directory cannot be made or read.

    Notes
    -----
    Safe from several threads and processes: readers take no lock, and of two that save one
    conversation one wins whole and the other gets `MismatchError`.

    Examples
    --------
    >>> with Store("memory:") as store:
    ...     store.list()
    []
    """

    def __init__(
        self,
        location: str | os.PathLike[str],
        *,
        max_bytes: int | None = None,
        ttl_s: float | None = None,
        tenant: str = "default",
    ) -> None:
        _check_store(max_bytes, ttl_s, tenant)
        self.max_bytes = max_bytes
        self.ttl_s = ttl_s
        self.tenant = tenant
        self._is_closed = False
        self._remove_private: Callable[[], Any] | None = None
        self.path = self._find_root(location)
        self.tenant_path = os.path.join(self.path, tenant)
        _make_directory(self.tenant_path)
        #: What was learned of models; a conversation names its profile by digest.
        self.profiles = Profiles(self.path, self.tenant_path)

    def _find_root(self, location: str | os.PathLike[str]) -> str:
        text = os.fspath(location)
        if not isinstance(text, str):
            raise TypeError(f"location is {shown(text)} but must be a str or a path")
        if text == "memory:":
            is_there = os.access("/dev/shm", os.W_OK | os.X_OK)
            path = tempfile.mkdtemp(prefix="krul-", dir="/dev/shm" if is_there else None)
            self._remove_private = weakref.finalize(self, _remove_private, path, os.getpid())
            return path
        scheme = _SCHEME_PATTERN.match(text)
        if not text or "\0" in text or scheme is not None or text.startswith("memory:"):
            raise ValueError(
                f"location is {shown(text)} but this version supports a directory or 'memory:' "
                "only, no server"
            )
        path = os.path.abspath(os.path.expanduser(text))
        if not os.path.isdir(path):
            parent = os.path.dirname(path)
            if os.path.lexists(path):
                raise NotADirectoryError(
                    errno.ENOTDIR, "a file stands where the store's directory should", path
                )
            os.makedirs(parent, 0o700, exist_ok=True)
            _make_directory(path)
        return path

    def __enter__(self) -> Store:
        self._check_open()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Store({self.path!r}, tenant={self.tenant!r})"

    def close(self) -> None:
        """Refuse further use; remove what ``"memory:"`` holds. Twice does no harm."""
        self._is_closed = True
        if self._remove_private is not None:
            self._remove_private()

    def files(self, conversation_id: str) -> ConversationFiles:
        """Return the files of one conversation, whether there are any or not."""
        self._check_open()
        return ConversationFiles(self, conversation_id)

    def open(
        self,
        conversation_id: str,
        model: Any,
        *,
        settings: Settings | None = None,
        profile: Profile | str | os.PathLike[str] | None = None,
    ) -> Cache:
        """Return the cache of a conversation, empty if there is none.

        Parameters
        ----------
        conversation_id : str
            1 to 1024 bytes of UTF-8, any characters.
        model : transformers.PreTrainedModel
            The model that the cache is for.
        settings : Settings or None
            None takes the defaults.
        profile : Profile, path or None
            What the codec ``predict`` codes new tokens with. None takes the newest of this model
            that the store has, if any. What is stored already is read with the profile that it
            names, whatever this one is.

        Returns
        -------
        Cache
            It knows its length and tokens at once and fills layer by layer in the background.

        Raises
        ------
        MismatchError
            The conversation is another model's, or the profile is.
        UnsupportedModelError
            krul cannot keep this model's cache.
        ValueError, TypeError
            A bad id, or something that is no profile.
        FormatError, CorruptionError, OSError
            The profile's file cannot be read.
        """
        self._check_open()
        check_conversation_id(conversation_id)
        if profile is not None:
            profile = _a_profile(profile)
        from .restore import open_cache

        return open_cache(self, conversation_id, model, settings, profile)

    def add_profile(self, profile: Profile | str | os.PathLike[str]) -> str:
        """Add a profile for conversations of its model, of every tenant; returns its digest.

        From then on `open` takes it, as the newest of its model. Conversations that were coded with
        another one go on naming that: it stays as long as they are there.

        Parameters
        ----------
        profile : Profile or path

        Raises
        ------
        TypeError
            It is something else.
        FormatError, CorruptionError
            The file is no profile, of another version, or damaged.
        OSError
            It cannot be read or written; the store is as it was.
        """
        self._check_open()
        profile = _a_profile(profile)
        self.profiles.add(profile)
        return profile.digest

    def list(self) -> builtins.list[ConversationInfo]:
        """Return what is stored, the last saved first.

        Conversations that cannot be read are left out: `verify` tells of them.
        """
        self._check_open()
        found = []
        for path in self._directories():
            try:
                manifest = _read_manifest_of(path)
            except (FormatError, CorruptionError, OSError):
                continue
            if manifest is not None:
                found.append(_info_of(manifest, path))
        return sorted(found, key=lambda info: (-info.updated_s, info.conversation_id))

    def info(self, conversation_id: str) -> ConversationInfo:
        """Return what is stored of one conversation.

        Raises
        ------
        KeyError
            There is none.
        FormatError, CorruptionError
            Its manifest cannot be read.
        """
        files = self.files(conversation_id)
        manifest = files.read_manifest()
        if manifest is None:
            raise KeyError(f"no conversation {shown(conversation_id)} in {self.tenant_path}")
        return _info_of(manifest, files.path)

    def verify(self, conversation_id: str | None = None) -> builtins.list[Problem]:
        """Read every byte of one conversation, or of all, and return what is wrong.

        Profiles that a conversation names are part of it.

        Parameters
        ----------
        conversation_id : str or None
            None checks all of the tenant's.

        Returns
        -------
        list of Problem
            Empty when all is well. Where a manifest cannot be read, ``conversation_id`` is that
            of the call or else the name of the directory.

        Raises
        ------
        KeyError
            There is no such conversation.
        """
        self._check_open()
        if conversation_id is not None:
            files = self.files(conversation_id)
            if not os.path.lexists(files.path):
                raise KeyError(f"no conversation {shown(conversation_id)} in {self.tenant_path}")
            return _verify(files, conversation_id, self.profiles.problem)
        problems = []
        check_profile = functools.cache(self.profiles.problem)  # many conversations name one
        for path in self._directories():
            label = os.path.basename(path)
            try:
                manifest = _read_manifest_of(path)
                if manifest is None:
                    continue
                files = self.files(manifest.conversation_id)
                if files.path != path:
                    raise CorruptionError(
                        f"{path}: the manifest is that of {shown(manifest.conversation_id)}, "
                        f"which belongs into {files.path}"
                    )
            except (KrulError, OSError) as exception:
                problems.append(Problem(label, _MANIFEST_NAME, str(exception), 0))
                continue
            problems += _verify(files, manifest.conversation_id, check_profile)
        return problems

    def delete(self, conversation_id: str) -> bool:
        """Remove a conversation; False if there was none. Caches open on it keep what they have."""
        return self.files(conversation_id).delete()

    def gc(self) -> GcReport:
        """Remove conversations past ``ttl_s``, and what interrupted saves left behind.

        Conversations that are being saved are passed over. Files that are not krul's stay. Of the
        profiles those go that no conversation names and that are not the newest of their model; as
        long as some conversation cannot be read, none.
        """
        self._check_open()
        now_s = time.time()
        n_conversations = n_files = removed_bytes = 0
        for path in self._directories():
            removed = self._collect(path, now_s)
            n_conversations += removed[0]
            n_files += removed[1]
            removed_bytes += removed[2]
        n_profiles, n_more, more_bytes = self._collect_profiles()
        return GcReport(
            n_conversations,
            n_files + n_more,
            removed_bytes + more_bytes,
            self.usage_bytes(),
            n_profiles,
        )

    def usage_bytes(self) -> int:
        """Return the bytes of all files of the tenant's conversations."""
        self._check_open()
        return sum(size for path in self._directories() for size in _file_sizes(path).values())

    def _collect(self, path: str, now_s: float) -> tuple[int, int, int]:
        """Tidy one directory; returns conversations, files and bytes removed."""
        sizes = _file_sizes(path)
        try:
            label = os.path.basename(path)
            directory_fd, lock_fd = _lock(path, label, is_made=False, timeout_s=0)
        except (KrulError, OSError):
            return 0, 0, 0
        try:
            manifest = _read_manifest_of(path)
            if manifest is None:
                is_old = os.stat(path).st_mtime < now_s - _GRACE_S
                is_bare = all(_is_ours(name) or name == _LOCK_NAME for name in sizes)
                is_gone = is_old and is_bare
            else:
                is_gone = self.ttl_s is not None and manifest.updated_s + self.ttl_s < now_s
            if is_gone:
                _remove_conversation(directory_fd, path)
                return int(manifest is not None), len(sizes), sum(sizes.values())
            return (0, *_remove_garbage(directory_fd, manifest, now_s - _GRACE_S))
        except (FormatError, CorruptionError):
            return 0, 0, 0  # never removed unasked
        finally:
            _unlock(directory_fd, lock_fd)

    def _collect_profiles(self) -> tuple[int, int, int]:
        with os.scandir(self.path) as found:
            tenants = [
                item.path
                for item in found
                if TENANT_PATTERN.fullmatch(item.name) and item.is_dir(follow_symlinks=False)
            ]
        named = {path: _names_of(path) for path in tenants}
        own = named.get(self.tenant_path)
        others = list(named.values())
        everywhere = None if None in others else set().union(*(names[0] for names in others))
        own_profiles, own_models = (None, None) if own is None else own
        return self.profiles.collect(own_profiles, everywhere, own_models)

    def _directories(self) -> Iterator[str]:
        return iter(_directories_of(self.tenant_path))

    def _check_open(self) -> None:
        if self._is_closed:
            raise ValueError(f"the store {self.path} is closed")


def _remove_private(path: str, owner_pid: int) -> None:
    """Remove a private directory, but not from a forked child, which merely inherited it."""
    if os.getpid() == owner_pid:
        shutil.rmtree(path, ignore_errors=True)


def _check_store(max_bytes: Any, ttl_s: Any, tenant: Any) -> None:
    if max_bytes is not None and (
        isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 1
    ):
        raise ValueError(f"max_bytes is {shown(max_bytes)} but must be an integer above 0 or None")
    if ttl_s is not None and (
        isinstance(ttl_s, bool) or not isinstance(ttl_s, (int, float)) or not 0 < ttl_s < math.inf
    ):
        raise ValueError(f"ttl_s is {shown(ttl_s)} but must be a finite number above 0 or None")
    if not isinstance(tenant, str) or TENANT_PATTERN.fullmatch(tenant) is None:
        raise ValueError(
            f"tenant is {shown(tenant)} but must be 1 to 64 of A-Z a-z 0-9 . _ -, "
            "not beginning with a dot"
        )


def _file_sizes(path: str) -> dict[str, int]:
    """Return the sizes of a directory's files by name, of those that can be seen."""
    sizes = {}
    with contextlib.suppress(OSError), os.scandir(path) as found:
        for item in found:
            with contextlib.suppress(FileNotFoundError):
                about = item.stat(follow_symlinks=False)
                if stat.S_ISREG(about.st_mode):
                    sizes[item.name] = about.st_size
    return sizes


def _read_manifest_of(path: str) -> Manifest | None:
    """Read the manifest in a directory, whoever's it is."""
    with _naming(os.path.join(path, _MANIFEST_NAME)):
        try:
            directory_fd = _open_directory(path)
        except FileNotFoundError:
            return None
        try:
            fd = _open_file(directory_fd, _MANIFEST_NAME)
        except FileNotFoundError:
            return None
        finally:
            os.close(directory_fd)
        try:
            return _read_manifest_file(fd)
        finally:
            os.close(fd)


def _directories_of(tenant_path: str) -> list[str]:
    with os.scandir(tenant_path) as found:
        names = sorted(
            item.name
            for item in found
            if _DIRECTORY_PATTERN.match(item.name) and item.is_dir(follow_symlinks=False)
        )
    return [os.path.join(tenant_path, name) for name in names]


def _a_profile(value: Any) -> Profile:
    from .profile import Profile

    if isinstance(value, Profile):
        return value
    if isinstance(value, (str, os.PathLike)):
        return Profile.load(os.path.expanduser(value))
    raise TypeError(f"profile is {shown(value)} but must be a krul.Profile, a path or None")


def _profiles_of(manifest: Manifest) -> dict[str, int]:
    """Return the digests that a conversation names, each with the first token that needs it."""
    found: dict[str, int] = {}
    for segment in manifest.segments:
        digest = segment.strategy.get("profile")
        if isinstance(digest, str):
            found.setdefault(digest, segment.token_start)
    return found


def _names_of(tenant_path: str) -> tuple[set[str], set[str]] | None:
    """Return profiles and models that a tenant's conversations name, None if one does not tell."""
    profiles: set[str] = set()
    models: set[str] = set()
    try:
        for path in _directories_of(tenant_path):
            manifest = _read_manifest_of(path)
            if any(name.startswith(_DAMAGED_NAME) for name in os.listdir(path)):
                return None
            if manifest is not None:
                profiles.update(_profiles_of(manifest))
                models.add(manifest.fingerprint["exact"])
    except (FormatError, CorruptionError, OSError):  # damaged, or deleted meanwhile
        return None
    return profiles, models


def _info_of(manifest: Manifest, path: str) -> ConversationInfo:
    manifest_bytes = _file_sizes(path).get(_MANIFEST_NAME, 0)
    kept = [layer.key_dtype for layer in manifest.layers if layer.kind != "none"]
    return ConversationInfo(
        conversation_id=manifest.conversation_id,
        tenant=manifest.tenant,
        n_tokens=manifest.n_tokens,
        n_batch=manifest.n_batch,
        n_layers=len(manifest.layers),
        n_segments=len(manifest.segments),
        stored_bytes=manifest_bytes + sum(segment.file_bytes for segment in manifest.segments),
        generation=manifest.generation,
        created_s=manifest.created_s,
        updated_s=manifest.updated_s,
        dtype=kept[0] if kept else "none",
        fingerprint=manifest.fingerprint["exact"],
        guard=dict(manifest.segments[-1].guard) if manifest.segments else {},
        profiles=tuple(_profiles_of(manifest)),
    )


def _verify(
    files: ConversationFiles,
    label: str,
    check_profile: Callable[[str], tuple[str, str] | None],
) -> list[Problem]:
    """Check one conversation; several problems share the length of the good prefix."""
    found: list[tuple[str, str]] = []
    n_good_tokens = 0
    try:
        manifest = files.read_manifest()
    except (KrulError, OSError) as exception:
        found.append((_MANIFEST_NAME, str(exception)))
        manifest = None
    if manifest is not None:
        n_good_tokens = manifest.n_tokens
        for info in manifest.segments:
            message = _verify_segment(files, info, manifest)
            if message is not None:
                found.append((info.file, message))
                n_good_tokens = min(n_good_tokens, info.token_start)
        for digest, token_start in _profiles_of(manifest).items():
            problem = check_profile(digest)
            if problem is not None:
                found.append(problem)
                n_good_tokens = min(n_good_tokens, token_start)
    for name in sorted(_file_sizes(files.path)):
        if name.startswith(_DAMAGED_NAME):
            found.append((name, f"{os.path.join(files.path, name)}: kept from an earlier damage"))
    return [Problem(label, file, message, n_good_tokens) for file, message in found]


def _verify_segment(files: ConversationFiles, info: SegmentInfo, manifest: Manifest) -> str | None:
    try:
        fd, entries = files.open_segment(info, manifest)
        try:
            with _naming(os.path.join(files.path, info.file)):
                for entry in entries:
                    _core.store_read_payload(fd, entry)
        finally:
            os.close(fd)
    except (KrulError, OSError) as exception:
        return str(exception)
    return None
