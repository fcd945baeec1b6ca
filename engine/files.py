"""JSON, hashes, a file that appears only when it is whole, and the cache."""
from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache, lru_cache, partial
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from engine.looks import once
from engine.progress import Progress, in_threads
from engine.runs import cache_folder, from_root

TEMPORARY = "fusion-study-"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # disk, quota, the limit of a file's size


def hash_file(path: Path) -> str:
    """sha256 of a file's bytes, read once in a process unless its size or time changes."""
    return _hash_bytes(path, file_state(path))


@cache
def _hash_bytes(path: Path, state: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_source(source: str) -> str:
    """The hash of a local folder's or file's contents; any other name, as of the hub, as it is."""
    path = from_root(source)
    if path.is_file():
        return hash_file(path)
    if not path.is_dir():
        return source
    files = (file for file in path.rglob("*") if file.is_file())
    return hash_json({str(file.relative_to(path)): hash_file(file) for file in files})


def file_stats(paths: Sequence[str]) -> dict[str, os.stat_result]:
    """What the system says of those of these files that are there, links out of their folder apart;
    asked once in one look.
    """
    return once(_ask_about, tuple(paths))


def _ask_about(paths: tuple[str, ...]) -> dict[str, os.stat_result]:
    """`file_stats` as it is now; each folder is read once."""
    wanted, found = set(paths), {}
    for folder in set(map(os.path.dirname, wanted)):
        if os.path.isdir(folder):
            with os.scandir(folder) as entries:
                found |= {entry.path: entry.stat() for entry in entries
                          if entry.path in wanted and entry.is_file() and not _leads_out(entry)}
    return found


def _leads_out(entry: os.DirEntry) -> bool:
    """Whether an entry of a folder is a link to what does not lie in that folder."""
    path = Path(entry.path)
    return entry.is_symlink() and path.parent.resolve() not in path.resolve().parents


def hash_files(paths: Sequence[str]) -> list[str]:
    """The hash of each file's bytes, "" if it is not there."""
    return remember("hashes", fast_hash, paths)


def remember(name: str, look: Callable[[str], str], paths: Sequence[str]) -> list[str]:
    """What `look` says of each file, "" of one that is not there.

    It is kept in the cache with a file's size and times, so that each is read once.
    """
    states = {path: _state(about) for path, about in file_stats(paths).items()}
    folders = sorted(set(map(os.path.dirname, paths)))
    place = cache_folder() / f"{name}-{hash_json(folders)[:16]}.json"
    known = _remembered(place, place.stat().st_mtime_ns if place.exists() else 0)
    todo = [path for path, state in states.items() if known.get(path, ("",))[0] != state]
    if todo:
        bar = Progress("reading files", len(todo), "files")
        said = list(bar.track(in_threads(look, todo)))
        bar.close()
        known = known | {path: (states[path], word) for path, word in zip(todo, said)}
        with suppress(OSError):  # where nothing can be kept, they are read again
            place.parent.mkdir(parents=True, exist_ok=True)
            with lock_of(place.with_suffix(".lock")):
                write_json(place, known)
    return [known[path][1] if path in states else "" for path in paths]


def file_state(path: Path) -> str:
    """What changes when a file's bytes do."""
    return _state(path.stat())


def _state(about: os.stat_result) -> str:
    # The second time changes even if a program sets back the first.
    return f"{about.st_size} {about.st_mtime_ns} {about.st_ctime_ns}"


def fast_hash(path: str | Path) -> str:
    """The hash of a file's bytes as they are now."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, partial(hashlib.blake2b, digest_size=16)).hexdigest()


@lru_cache(maxsize=8)
def _remembered(place: Path, mtime: int) -> dict[str, tuple[str, str]]:
    return read_json(place) or {}


def seal(place: Path, files: Sequence[Path]) -> None:
    """Write the hashes of finished files into `place`, so that damage is seen."""
    write_json(place, {str(file.relative_to(place.parent)): fast_hash(file) for file in files})


def damaged_file(place: Path) -> str:
    """The first file that is not as it was sealed, "" if all are."""
    for file, digest in (read_json(place) or {place.name: ""}).items():
        path = place.parent / file
        if not (path.is_file() and fast_hash(path) == digest):
            return file
    return ""


def hash_json(value: object) -> str:
    """sha256 of a value's JSON form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def read_json(path: Path) -> dict | None:
    """The file's content; None if it is missing or is not a dictionary in JSON."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: of bytes, of JSON
        return None
    return content if isinstance(content, dict) else None


def write_json(path: Path, value: object) -> None:
    """Write a value as indented JSON; a stop, or a full disk, leaves the old file."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    write_text(path, f"{text}\n")


def write_text(path: Path, text: str) -> None:
    """Write a text; a stop, or a full disk, leaves the old file."""
    with put_in_place(path) as partial_path:
        partial_path.write_text(text, encoding="utf-8")


@contextmanager
def put_in_place(path: Path) -> Iterator[Path]:
    """Where to write a file or a folder that is at its place when it is whole.

    A failure leaves what was there; what a kill left takes room, and goes first.
    """
    partial_path = path.with_name(f"{path.name}.partial")
    _remove(partial_path)
    try:
        with full_disk_explained(path.parent):
            yield partial_path
    except BaseException:
        _remove(partial_path)
        raise
    partial_path.replace(path)


def _remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


class NoRoom(OSError):
    """A disk is full; it says which folder's."""


@contextmanager
def full_disk_explained(folder: Path) -> Iterator[None]:
    """Let what fails for want of room say so, in one sentence: each library has its own way."""
    try:
        yield
    except NoRoom:
        raise
    except Exception as error:
        full = getattr(error, "errno", None) in NO_ROOM or any(
            os.strerror(number) in str(error) for number in NO_ROOM)
        if not full and shutil.disk_usage(folder).free > 100_000:
            raise
        raise NoRoom(f"no room is left for a file in {folder}: make some, and start again; what "
                     "is whole is kept") from error


def make_folder(folder: Path, variable: str) -> None:
    """Make a folder if it is missing; OSError with the variable that names another place."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{folder} cannot be made ({error.strerror}); name another folder in "
                      f"{variable}") from error


def lock_of(path: Path) -> BaseFileLock:
    """A lock among processes, which the system frees when its holder ends.

    Where the file system has none, as some of clusters, a file that is there meanwhile.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
        lock.release()
    except Timeout:
        pass  # it works: another process has it
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        soft = path.with_name(f"{path.name}-soft")
        warnings.warn(f"{path.parent} is on a file system without locks; the file {soft.name} "
                      "stands for one. Delete it if a kill on another machine has left it there",
                      stacklevel=2)
        return SoftFileLock(soft)
    return lock


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder for the time being, in the system's; those that killed processes left are removed.

    Who holds the lock in a folder lives: the system frees it, however its holder ends.
    """
    for left in Path(tempfile.gettempdir()).glob(f"{TEMPORARY}*"):
        with suppress(OSError, Timeout), lock_of(left / "alive").acquire(timeout=0):
            shutil.rmtree(left, ignore_errors=True)
    folder, lock = _locked_folder()
    with folder as name, full_disk_explained(Path(name)):
        try:
            yield Path(name)
        finally:
            lock.release()


def _locked_folder() -> tuple[tempfile.TemporaryDirectory, BaseFileLock]:
    """A new folder, and the lock in it, which is held.

    Before it is held, another process may take the folder for one that was left: then the next one.
    """
    while True:
        folder = tempfile.TemporaryDirectory(prefix=TEMPORARY, ignore_cleanup_errors=True)
        with suppress(FileNotFoundError, FileExistsError):
            lock = lock_of(Path(folder.name) / "alive")
            lock.acquire()
            if Path(lock.lock_file).exists():
                return folder, lock


def cache_file(name: str, write: Callable[[Path], None]) -> Path:
    """A file of the cache, made by `write(path)` if it is missing; it appears when it is whole."""
    path = cache_folder() / name
    if path.exists():
        return path
    make_folder(path.parent, "STUDY_CACHE")
    with lock_of(path.parent / ".lock"):  # stages side by side would all make it
        if not path.exists():
            with put_in_place(path) as partial_path:
                write(partial_path)
    return path


def printable(text: str) -> str:
    """A text whose control characters, as a terminal's escape codes, are written out; its line
    breaks stay.
    """
    return "".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1]
                   for char in text)


def one_line(error: Exception) -> str:
    """What an error says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
