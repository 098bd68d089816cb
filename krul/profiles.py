"""The profiles in a store: files named by their digest, found by their model, removed when unused.

There are two folders. The location's own holds what was learned from texts and serves every tenant;
a tenant's holds what was learned from its conversations and serves nobody else. A conversation
names the profile it was coded with by digest, so that a newer one changes nothing for it.

A file's modification time says when a profile was added, its access time when it was last read or
named: a save touches it first (`Profiles.keep`) and commits then, and `gc` leaves alone what was
touched lately.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import stat
import threading
import time
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import arrays
from .errors import CorruptionError, FormatError, KrulError, MismatchError

if TYPE_CHECKING:
    from .fingerprint import Fingerprint
    from .profile import Profile

__all__ = ["FOLDER", "ProfileInfo", "Profiles", "checkpoint_path", "locked", "moments_name"]

FOLDER = ".profiles"
MOMENTS_SUFFIX = ".moments"
_PROFILE_SUFFIX = ".profile"
_PROFILE_PATTERN = re.compile(r"([0-9a-f]{64})\.profile\Z", re.ASCII)
_MOMENTS_PATTERN = re.compile(r"[0-9a-f]{64}\.moments\Z", re.ASCII)
# What a writer leaves behind that was killed, and calibrations that nobody went on with.
_TEMPORARY_PATTERN = re.compile(r"\..+-[a-z0-9_]{8}\Z", re.ASCII)
_CHECKPOINT_PATTERN = re.compile(r"[0-9a-f]{16}\.checkpoint\Z", re.ASCII)
_CHECKPOINT_LIFE_S = 7 * 86400.0

_LOCK_NAME = "lock"
_LOCK_TIMEOUT_S = 60.0
_LOCK_POLL_S = 0.01
# Between touching a profile and committing the manifest that names it.
_GRACE_S = 600.0

# Profiles that stay in memory though no cache has them: opening one conversation after the other
# should not read and check megabytes each time.
_N_KEPT = 2


@dataclass(frozen=True)
class ProfileInfo:
    """A profile's file, as its header tells; nothing else of it is read or checked.

    Attributes
    ----------
    digest, path : str
    model : str
        Exact fingerprint of the model; empty where the header cannot be read.
    n_bytes : int
    n_tokens : int
        Tokens that it was learned from.
    added_s, used_s : float
        When it was added, and when it was last read or named by a save; Unix time.
    is_later : bool
        It is of a version that this krul does not read.
    """

    digest: str
    path: str
    model: str
    n_bytes: int
    n_tokens: int
    added_s: float
    used_s: float
    is_later: bool


# Device, inode, size and modification time of a file.
_Signature = tuple[int, int, int, int]


def _signature(path: str) -> _Signature | None:
    try:
        about = os.stat(path, follow_symlinks=False)
    except OSError:
        return None
    return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns


class _Memory:
    """Profiles by digest: all that somebody has, and the last ones that were asked for."""

    def __init__(self) -> None:
        self._all: weakref.WeakValueDictionary[str, Profile] = weakref.WeakValueDictionary()
        self._last: OrderedDict[str, Profile] = OrderedDict()
        self._checked: dict[str, _Signature] = {}
        self._lock = threading.Lock()

    def get(self, path: str, digest: str) -> Profile | None:
        """Return a profile whose file is as it was when it was read."""
        signature = _signature(path)
        with self._lock:
            profile = self._all.get(digest)
            if profile is None or signature is None or self._checked.get(path) != signature:
                return None
            return self._note(profile)

    def put(self, path: str, signature: _Signature | None, profile: Profile) -> Profile:
        """Return the one of this digest that is there already, else this one."""
        with self._lock:
            if signature is not None:
                self._checked[path] = signature
            return self._note(self._all.setdefault(profile.digest, profile))

    def _note(self, profile: Profile) -> Profile:
        self._last[profile.digest] = profile
        self._last.move_to_end(profile.digest)
        while len(self._last) > _N_KEPT:
            self._last.popitem(last=False)
        return profile


_memory = _Memory()


@contextlib.contextmanager
def locked(folder: str, name: str = _LOCK_NAME) -> Iterator[None]:
    """Make a folder of profiles if it is missing, and hold one of its locks."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder, 0o700)
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    lock_fd = os.open(os.path.join(folder, name), flags, 0o600)
    deadline_s = time.monotonic() + _LOCK_TIMEOUT_S
    try:
        while True:
            try:
                fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline_s:
                    raise KrulError(
                        f"{folder} has been locked by another process for {_LOCK_TIMEOUT_S} s"
                    ) from None
                time.sleep(_LOCK_POLL_S)
        try:
            yield
        finally:
            # By name: a child forked meanwhile has the same open file and would keep it locked.
            fcntl.flock(lock_fd, fcntl.LOCK_UN)
    finally:
        os.close(lock_fd)


def _open(path: str) -> int:
    """Open a regular file for reading; links are not followed, and a FIFO does not block."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        fd = os.open(path, flags)
    except OSError as exception:
        if exception.errno == errno.ELOOP:
            raise CorruptionError(f"{path}: a symbolic link stands where a file should") from None
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise CorruptionError(f"{path}: what stands there is not a regular file")
    return fd


def _read(path: str, digest: str) -> Profile:
    """Read a profile and check all of it, its name included."""
    from .profile import Profile

    signature = _signature(path)
    with open(_open(path), "rb") as file:
        contents = file.read()
    try:
        profile = Profile(contents)
    except (FormatError, CorruptionError) as error:
        raise type(error)(f"{path}: {error}") from None
    if profile.digest != digest:
        raise CorruptionError(
            f"{path}: the digest is {profile.digest} but the file is named {digest}"
        )
    return _memory.put(path, signature, profile)


def _load(path: str, digest: str) -> Profile:
    return _memory.get(path, digest) or _read(path, digest)


def _info(path: str, digest: str) -> ProfileInfo | None:
    from .profile import PROFILE_MAGIC, PROFILE_VERSION

    model, n_tokens, is_later = "", 0, False
    try:
        with open(_open(path), "rb") as file:
            about = os.fstat(file.fileno())
            try:
                version, meta = arrays.peek(file, PROFILE_MAGIC)
                is_later = version > PROFILE_VERSION
                if version == PROFILE_VERSION:
                    model, n_tokens = str(meta["model"]["exact"]), int(meta["n_tokens"])
            except (FormatError, CorruptionError, KeyError, TypeError, ValueError):
                model, n_tokens = "", 0
    except (OSError, CorruptionError):
        return None
    return ProfileInfo(
        digest, path, model, about.st_size, n_tokens, about.st_mtime, about.st_atime, is_later
    )


def _touch(path: str, *, is_new: bool) -> None:
    now_ns = time.time_ns()
    os.utime(path, ns=(now_ns, now_ns if is_new else os.stat(path).st_mtime_ns))


class Profiles:
    """The profiles that one tenant of a store can use; safe from several threads and processes.

    Parameters
    ----------
    location, tenant_path : str
        The store's directory, and the tenant's in it.

    Attributes
    ----------
    shared, own : str
        The folders of profiles that serve every tenant, and this one alone. Made when needed.
    """

    def __init__(self, location: str, tenant_path: str) -> None:
        self.shared = os.path.join(location, FOLDER)
        self.own = os.path.join(tenant_path, FOLDER)

    def add(self, profile: Profile, *, is_own: bool = False) -> str:
        """Add a profile, as the newest of its model; returns the file's path.

        Parameters
        ----------
        profile : krul.Profile
        is_own : bool
            Learned from the tenant's conversations: no other tenant is given it.
        """
        path = self._path(self.own if is_own else self.shared, profile.digest)
        with locked(os.path.dirname(path)):
            if not _is_whole(path, profile):
                profile.save(path)
            _touch(path, is_new=True)
            _memory.put(path, _signature(path), profile)
        return path

    def keep(self, profile: Profile) -> None:
        """Make sure that a profile is there and stays: to be called before a commit that names it.

        One that is missing is added, but not as the newest, to the folder that serves this tenant
        alone: whoever opened the conversation with it may not have meant it for others.
        """
        for folder in (self.own, self.shared):
            path = self._path(folder, profile.digest)
            if os.path.lexists(path):
                with locked(folder):
                    if _is_whole(path, profile):
                        _touch(path, is_new=False)
                        return
        path = self._path(self.own, profile.digest)
        with locked(self.own):
            profile.save(path)
            os.utime(path, ns=(time.time_ns(), 0))
            _memory.put(path, _signature(path), profile)

    def get(self, digest: str) -> Profile:
        """Return a profile by its digest.

        Raises
        ------
        CorruptionError
            It is missing or damaged; the message says which.
        FormatError
            It is of another version.
        OSError
            It cannot be read.
        """
        paths = [path for path in self._paths(digest) if os.path.lexists(path)]
        if not paths:
            raise CorruptionError(f"{self.shared}: the profile {digest} is missing")
        failure: Exception | None = None
        for path in paths:
            try:
                return _load(path, digest)
            except (CorruptionError, FormatError, OSError) as error:
                failure = failure or error
        assert failure is not None
        raise failure

    def find(self, model: Fingerprint | str) -> Profile | None:
        """Return the newest profile of a model, None if there is none.

        Parameters
        ----------
        model : krul.fingerprint.Fingerprint or str
            With a fingerprint, how the model behaves has to agree, too; a str is its exact part.

        Notes
        -----
        Profiles that cannot be read are passed over with a warning.
        """
        from .fingerprint import check_fingerprint

        exact = model if isinstance(model, str) else model.exact
        found = [info for info in self.infos() if info.model == exact]
        for info in found:
            try:
                profile = self.get(info.digest)
                if not isinstance(model, str):
                    check_fingerprint(profile.fingerprint, model)
                return profile
            except MismatchError:
                continue
            except (CorruptionError, FormatError, OSError) as error:
                warnings.warn(f"a profile is passed over: {error}", RuntimeWarning, stacklevel=2)
        return None

    def infos(self) -> list[ProfileInfo]:
        """Return what the headers of all profiles tell, the one added last first."""
        found = [info for folder in (self.own, self.shared) for info in _infos(folder)]
        return sorted(found, key=lambda info: (-info.added_s, info.digest))

    def problem(self, digest: str) -> tuple[str, str] | None:
        """Read every byte of a profile; returns a file and what is wrong, None if all is well."""
        paths = [path for path in self._paths(digest) if os.path.lexists(path)]
        name = f"{FOLDER}/{digest}{_PROFILE_SUFFIX}"
        if not paths:
            return name, f"{self._path(self.shared, digest)}: the profile is missing"
        messages = []
        for path in paths:
            try:
                _read(path, digest)
                return None
            except (KrulError, OSError) as error:
                messages.append(str(error))
        return name, "; ".join(messages)

    def collect(
        self,
        own_needed: Iterable[str] | None,
        shared_needed: Iterable[str] | None,
        models: Iterable[str] | None,
    ) -> tuple[int, int, int]:
        """Remove what is of no use; returns profiles, all files, and bytes removed.

        Parameters
        ----------
        own_needed, shared_needed : iterable of str or None
            Digests that conversations of this tenant, and of all tenants, name; None where that
            cannot be told: then every profile there is kept.
        models : iterable of str or None
            Exact fingerprints of the models of this tenant's conversations: moments of others are
            removed once they are old; None keeps all.
        """
        totals = [0, 0, 0]
        for folder, needed in ((self.own, own_needed), (self.shared, shared_needed)):
            if not os.path.isdir(folder):
                continue
            with contextlib.suppress(KrulError, OSError), locked(folder):
                now_s = time.time()
                doomed = [] if needed is None else _unused(folder, set(needed), now_s)
                for path in doomed + _left_behind(folder, models, now_s):
                    with contextlib.suppress(OSError):
                        n_bytes = os.stat(path, follow_symlinks=False).st_size
                        os.unlink(path)
                        totals[0] += path.endswith(_PROFILE_SUFFIX)
                        totals[1] += 1
                        totals[2] += n_bytes
        return totals[0], totals[1], totals[2]

    def _path(self, folder: str, digest: str) -> str:
        return os.path.join(folder, f"{digest}{_PROFILE_SUFFIX}")

    def _paths(self, digest: str) -> list[str]:
        if re.fullmatch(r"[0-9a-f]{64}", digest) is None:  # never a path of somebody's choice
            raise CorruptionError(f"{str(digest)[:80]!r} is no digest of a profile")
        return [self._path(folder, digest) for folder in (self.own, self.shared)]


def _is_whole(path: str, profile: Profile) -> bool:
    """Tell whether a file holds this very profile."""
    try:
        return _load(path, profile.digest).digest == profile.digest
    except (KrulError, OSError):
        return False


def _infos(folder: str) -> list[ProfileInfo]:
    try:
        names = sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
    matches = [match for match in map(_PROFILE_PATTERN.match, names) if match is not None]
    infos = [_info(os.path.join(folder, match[0]), match[1]) for match in matches]
    return [info for info in infos if info is not None]


def _unused(folder: str, needed: set[str], now_s: float) -> list[str]:
    """Return the profiles that nobody names, that are not the newest, and that are not in use."""
    newest: dict[str, ProfileInfo] = {}
    infos = _infos(folder)
    for info in infos:
        best = newest.get(info.model)
        if best is None or (info.added_s, info.digest) > (best.added_s, best.digest):
            newest[info.model] = info
    return [
        info.path
        for info in infos
        if info.digest not in needed
        and not info.is_later
        and (newest[info.model] is not info or not info.model)
        and max(info.added_s, info.used_s) < now_s - _GRACE_S
    ]


def _left_behind(folder: str, models: Iterable[str] | None, now_s: float) -> list[str]:
    """Return files of writers that are gone, and moments of models that are."""
    known = None if models is None else {moments_name(model) for model in models}
    out = []
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        with contextlib.suppress(OSError):
            age_s = now_s - os.stat(path, follow_symlinks=False).st_mtime
            is_moments = _MOMENTS_PATTERN.match(name) is not None
            is_gone = (
                (_TEMPORARY_PATTERN.match(name) is not None and age_s > _GRACE_S)
                or (_CHECKPOINT_PATTERN.match(name) is not None and age_s > _CHECKPOINT_LIFE_S)
                or (is_moments and known is not None and name not in known and age_s > _GRACE_S)
            )
            if is_gone:
                out.append(path)
    return out


def moments_name(model: str) -> str:
    """Return the file name of a model's moments, by its exact fingerprint."""
    return hashlib.sha256(model.encode()).hexdigest() + MOMENTS_SUFFIX


def checkpoint_path(location: str, key: Any) -> str:
    """Return where a calibration for a store keeps how far it came, and make the folder."""
    folder = os.path.join(location, FOLDER)
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder, 0o700)
    name = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
    return os.path.join(folder, f"{name}.checkpoint")
