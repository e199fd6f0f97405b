"""The life of a save directory: how a tag comes to be, is replaced, and goes; and which one `latest` names.

A tag's directory is complete or it is not there under its name, and `latest` never names anything else, whatever is
killed when. No process group here: one process, rank 0, makes these changes.

[Note: the commit, step by step]
Each step is durable (fsync) before the next begins. What a crash after each leaves behind:

| after | on disk | the next load sees |
|---|---|---|
| writing into the staging directory, the manifest last | `.staging-…`, torn or whole | the checkpoint before |
| renaming it to the tag, if there is none | the tag, whole; `latest` as before | the checkpoint before |
| exchanging it with the tag, if there is one | new: the tag; old: `.staging-…` | the new one, if `latest` names it |
| replacing `latest` | the same | the new one |
| removing the replaced copy | the new one | the new one |

What is left over in `.staging-…` goes with the next save.

Where the file system has no exchange (NFS, some of FUSE's), a tag that exists is replaced by more steps, at no instant
of which `latest` names nothing:

| after | on disk | `latest` names |
|---|---|---|
| a copy of the old tag by hard links, hidden first, then renamed | the tag and `<tag>.replaced-…`, both old | the tag |
| replacing `latest`, if it named the tag | the same | `<tag>.replaced-…` |
| renaming the old tag to `.trash-…` | `<tag>.replaced-…` | `<tag>.replaced-…` |
| renaming the staging directory to the tag | the tag, new, and `<tag>.replaced-…` | `<tag>.replaced-…` |
| replacing `latest` again | the same | the tag |
| removing `<tag>.replaced-…` and `.trash-…` | the tag, new | the tag |

A crash in between leaves `<tag>.replaced-…`: a checkpoint like any other, until the tag is saved again.

[Note: what is stale]
A save locks a file beside its staging directory, `.lock-…`, for as long as it runs; the kernel lets go when the process
dies, however it dies. So a staging directory whose file can be locked, or is gone, is a dead save's, and goes, under
the lock: whoever has made a file and finds it locked, or gone, makes it again. It is a file, since NFS and Lustre have
a file's lock (flock) hold on every machine, and Linux lets a directory's hold on one alone, without a word. Where a
file system knows no locks, what hasn't changed for a day is taken for dead. Some have locks of one machine alone all
the same (FUSE's, Lustre with `localflock`). So what is taken for dead gets another name first: a save that lives can
fail of it, and can't commit a half. Trash is always stale.

Behind a URL it is another life: see [Note: the commit where nothing can be renamed].
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
import time
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from lightning_zero.checkpoint import kernel, remote
from lightning_zero.checkpoint.integrity import read_manifest, require_sound
from lightning_zero.checkpoint.manifest import MANIFEST_NAME, Manifest
from lightning_zero.checkpoint.shards import is_ours, is_shard_name
from lightning_zero.checkpoint.storage import Location, is_remote, link, names_in, read_file, remove_file
from lightning_zero.errors import CheckpointWriteError, CorruptCheckpointError, IncompleteCheckpointError, ZeroError

LATEST = "latest"
_STAGING = ".staging-"
_TRASH = ".trash-"
_LOCK = ".lock-"
_REPLACED = re.compile(r"\.replaced-[0-9a-f]{8}\Z")
_TAG_BYTES = 200
_IDLE_SECONDS = 24 * 3600
_TRIES = 500
"""How often something is made again that another run's save has just taken for a dead save's, and removed."""


class InvalidTagError(ZeroError, ValueError):
    """A tag that can't be the name of a checkpoint's directory."""


def validate_tag(tag: str, *, hidden: bool = False) -> str:
    """The tag itself, if it can be the name of a directory within the save directory.

    Args:
        tag: the name.
        hidden: let it begin with a dot: such a checkpoint is never listed, nor `latest` (Lightning's `lr_find`
            saves one and removes it).

    Raises:
        InvalidTagError: it can't; the message says why.
    """
    if not isinstance(tag, str):
        raise InvalidTagError(f"a tag is a string, not {tag!r:.80}")
    if not tag or tag == LATEST or tag in (".", "..") or tag.startswith((_STAGING, _TRASH, _LOCK)):
        raise InvalidTagError(f"{tag!r} can't be a tag: it is empty, or a name of our own")
    if "/" in tag or "\\" in tag or not tag.isprintable():
        raise InvalidTagError(f"{tag!r:.200} can't be a tag: it is one plain name, without separators of a path")
    if tag.startswith(".") and not hidden:
        raise InvalidTagError(f"{tag!r:.200} can't be a tag: it is hidden; begin it without a dot")
    given = _REPLACED.sub("", tag)  # the name of a copy is as long as it comes to be
    if len(given.encode(errors="replace")) > _TAG_BYTES:
        raise InvalidTagError(f"{tag!r:.40}… can't be a tag: it is longer than {_TAG_BYTES} bytes")
    return tag


# ----------------------------------------------------------------------------------------------------- latest


def read_latest(save_dir: Location) -> str | None:
    """The tag that `latest` names, or None where there is no such file.

    Raises:
        CorruptCheckpointError: there is one, and what it holds can't be a tag.
    """
    path = save_dir / LATEST
    try:
        content = read_file(path, 4096)
    except IncompleteCheckpointError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise CorruptCheckpointError(str(error)) from error
    try:
        return validate_tag(content.decode().strip("\r\n"))  # a blank may be a part of it
    except (UnicodeDecodeError, InvalidTagError) as error:
        raise CorruptCheckpointError(f"{path} is damaged: {error}") from None


def require_own_latest(save_dir: Location) -> None:
    """Make sure that `latest` isn't somebody else's: a link to another run, or a directory.

    Where it names another system's checkpoint, as DeepSpeed's does, there is a warning: it is going to name ours.

    Raises:
        CheckpointWriteError: it is.
    """
    path = save_dir / LATEST
    if is_remote(path):
        return
    if path.is_symlink() or path.is_dir():
        raise CheckpointWriteError(
            f"{path} is a {'link' if path.is_symlink() else 'directory'} and none of our files; it was left as it is. "
            "Save into another directory, or give it another name"
        )
    with suppress(CorruptCheckpointError):  # a damaged one names nothing
        tag = read_latest(save_dir)
        if tag is not None and (save_dir / tag).is_dir() and not (save_dir / tag / MANIFEST_NAME).exists():
            warnings.warn(
                f"{path} names {tag!r}, which is none of our checkpoints but DeepSpeed's, perhaps. A save that becomes "
                f"`latest` has it name ours; {tag!r} stays, and whoever loads it has to give its name",
                stacklevel=2,
            )


def _names(save_dir: Location, tag: str) -> bool:
    """Whether `latest` names this tag; a damaged one names none.

    Raises:
        CorruptCheckpointError: the disk doesn't tell, for now perhaps.
    """
    try:
        return read_latest(save_dir) == tag
    except CorruptCheckpointError as error:
        refused = error.__cause__.__cause__ if error.__cause__ is not None else None
        if isinstance(refused, OSError) and (is_remote(save_dir) or refused.errno in (errno.EIO, errno.ESTALE)):
            raise
        return False


def write_latest(save_dir: Location, tag: str, *, fsync: bool = True) -> None:
    """Have `latest` name a tag, in one atomic step."""
    if is_remote(save_dir):
        remote.write_whole(save_dir / LATEST, tag.encode())
        return
    _put_latest(save_dir, _new_latest(save_dir, tag, fsync), tag, fsync)


def _new_latest(save_dir: Path, tag: str, fsync: bool) -> Path:
    """All that can fail of a full disk: a file that has only to take the name."""
    new = save_dir / f"{_TRASH}{LATEST}-{secrets.token_hex(4)}"
    try:
        with open(new, "x", encoding="utf-8") as file:
            file.write(tag)
            file.flush()
            if fsync:
                os.fsync(file.fileno())
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    return new


def _put_latest(save_dir: Path, new: Path, tag: str, fsync: bool) -> None:
    for left in reversed(range(_TRIES)):
        try:
            os.replace(new, save_dir / LATEST)
            break
        except FileNotFoundError:  # another run's save has just taken it for a dead save's
            if not left or not save_dir.is_dir():
                raise
            new = _new_latest(save_dir, tag, fsync)
    _sync_directory(save_dir, fsync)


# ----------------------------------------------------------------------------------------------------- commit


def staging_directory(save_dir: Location, tag: str, token: str) -> Location:
    """Where a save gathers its files: hidden, beside the tag, and on the same file system.

    Lightning takes whatever has `hpc_ckpt_` in its name for a checkpoint of SLURM's, hidden or not.
    """
    if is_remote(save_dir):
        return save_dir / tag  # see [Note: the commit where nothing can be renamed]
    return save_dir / f"{_STAGING}{tag.replace('hpc_ckpt_', 'hpc-ckpt-')}-{token}"


class Staging:
    """Rank 0's hold on the place where a save gathers its files: see [Note: what is stale].

    Args:
        path: as `staging_directory` gives it.
        save_id: of the save.
    """

    def __init__(self, path: Location, save_id: str) -> None:
        self._path = path
        self._save_id = save_id
        self._fd: int | None = None
        if is_remote(path):
            require_replaceable(path)
        else:
            self._fd = _locked(path)
            try:
                path.mkdir(exist_ok=True)
            except BaseException:
                self.release()
                raise

    def release(self) -> None:
        """Let go; a second time does nothing."""
        fd, self._fd = self._fd, None
        if fd is None or is_remote(self._path):
            return
        try:
            with suppress(OSError):  # the next save tries again
                _lock_of(self._path).unlink()
        finally:
            with suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_UN)  # a process that was forked meanwhile has the descriptor too
            os.close(fd)

    def abandon(self) -> None:
        """Take away whatever the save has written, and let go. What resists is left: the ranks have still to meet."""
        try:
            if is_remote(self._path):
                remote.remove_uncommitted(self._path, self._save_id)
            else:
                shutil.rmtree(self._path, ignore_errors=True)
        except Exception as error:  # a store's own kinds too: perhaps just what the save fails for
            with suppress(UserWarning):  # as an error (python -W error) it would have the other ranks wait
                warnings.warn(f"what was written under {self._path} couldn't be removed: {error}", stacklevel=2)
        finally:
            self.release()


def commit(
    staging: Location,
    save_dir: Location,
    tag: str,
    *,
    update_latest: bool = True,
    fsync: bool = True,
    files: Collection[str] = (),
) -> None:
    """Give a complete staging directory its name: see [Note: the commit, step by step].

    Args:
        staging: with all files in it, each already durable, the manifest last.
        save_dir: its parent.
        tag: the name.
        update_latest: have `latest` name it.
        fsync: make each step durable before the next.
        files: the names of all the files; behind a URL, others under the tag go.

    Raises:
        CheckpointWriteError: under the tag's name there is something that is no checkpoint; it isn't deleted.
        OSError: the file system refuses.
    """
    validate_tag(tag, hidden=not update_latest)
    if is_remote(save_dir):
        if update_latest:
            write_latest(save_dir, tag)
        remote.remove_what_nothing_names(save_dir / tag, files)
        return
    assert not is_remote(staging)
    _sync_directory(staging, fsync)
    latest = _new_latest(save_dir, tag, fsync) if update_latest else None  # a full disk refuses it, or nothing
    try:
        _take_name(staging, save_dir, tag, fsync)
    except BaseException:
        if latest is not None:
            latest.unlink(missing_ok=True)
        raise
    if latest is not None:
        _put_latest(save_dir, latest, tag, fsync)
        _remove_replaced(save_dir, tag)
    _remove(staging)


def _take_name(staging: Path, save_dir: Path, tag: str, fsync: bool) -> None:
    target = save_dir / tag
    if not os.path.lexists(target):
        os.rename(staging, target)
    else:
        require_replaceable(target)
        if not kernel.exchange(staging, target):
            _replace_without_exchange(staging, save_dir, tag, fsync)
    _sync_directory(save_dir, fsync)


def require_replaceable(target: Location) -> None:
    """A directory goes only if it is a checkpoint of ours, whole or torn: not if it is somebody's source code."""
    if target.is_symlink() or not target.is_dir():
        return
    foreign = [name for name in sorted(names_in(target)) if name != MANIFEST_NAME and not is_ours(name)]
    if foreign and not (target / MANIFEST_NAME).is_file():
        raise CheckpointWriteError(
            f"{target} exists and is not a checkpoint (it holds {foreign[0]!r}); "
            "it was left as it is. Save under another name, or remove it"
        )


def _replace_without_exchange(staging: Path, save_dir: Path, tag: str, fsync: bool) -> None:
    """The second table of [Note: the commit, step by step]."""
    target, token = save_dir / tag, secrets.token_hex(4)
    second = f"{tag}.replaced-{token}"
    with _aside(save_dir, tag) as hidden:
        _copy_by_links(target, hidden / tag, fsync)
        os.rename(hidden / tag, save_dir / second)
    _sync_directory(save_dir, fsync)
    was_latest = _names(save_dir, tag)
    if was_latest:
        write_latest(save_dir, second, fsync=fsync)
    trash = save_dir / f"{_TRASH}{token}"
    os.rename(target, trash)
    try:
        os.rename(staging, target)
    except BaseException:
        os.rename(trash, target)
        raise
    _sync_directory(save_dir, fsync)
    if was_latest:
        write_latest(save_dir, tag, fsync=fsync)
    remove_tag(save_dir, second)
    _remove(trash)


def _remove_replaced(save_dir: Path, tag: str) -> None:
    """Remove the copies of a replaced tag that killed saves have left, now that `latest` names the new one."""
    for name in names_in(save_dir):
        if _REPLACED.fullmatch(name.removeprefix(tag)):
            remove_tag(save_dir, name)


@contextmanager
def _aside(save_dir: Path, tag: str) -> Iterator[Path]:
    """A hidden directory that no other run's save takes away while something is made in it; it goes in the end."""
    token = secrets.token_hex(8)
    path = staging_directory(save_dir, tag, token)
    assert not is_remote(path)
    staging = Staging(path, token)
    try:
        yield path
    finally:
        staging.abandon()


def _copy_by_links(source: Path, copy: Path, fsync: bool) -> None:
    if source.is_dir() and not source.is_symlink():
        copy.mkdir()
        for name in os.listdir(source):
            _copy_by_links(source / name, copy / name, fsync)
        _sync_directory(copy, fsync)
    elif not link(source, copy):
        shutil.copy2(source, copy, follow_symlinks=False)
        if fsync and not copy.is_symlink():
            _sync(copy)


# ------------------------------------------------------------------------------------------------------- tags


@dataclass(frozen=True, slots=True)
class TagInfo:
    """What lies in the save directory under one name.

    Attributes:
        name: the tag.
        path: its directory.
        manifest: if it has one that can be believed.
        problem: what is wrong with it; empty for a complete one.
        modified: when its directory last changed, in seconds since the epoch.
    """

    name: str
    path: Location
    manifest: Manifest | None
    problem: str
    modified: float

    @property
    def step(self) -> int:
        """Of training; -1 where nothing says."""
        return self.manifest.step if self.manifest else -1

    @property
    def created(self) -> str:
        """When it was made, as its manifest says it; empty where nothing says."""
        return self.manifest.created if self.manifest else ""

    @property
    def resumable(self) -> bool:
        """Whether it holds more than weights."""
        return self.manifest is not None and bool(self.manifest.optimizers)

    @property
    def complete(self) -> bool:
        """Whether every file is there with its size and header."""
        return not self.problem


def list_tags(save_dir: Location, without: Collection[str] = ()) -> list[TagInfo]:
    """Everything that is a checkpoint or looks like one, the newest first: by the time when it was made.

    Not by its step: a run that went back to an earlier one has the newer checkpoints.

    A directory with neither a manifest nor a shard is somebody else's and is left out. So are the names in `without`,
    which aren't looked at.
    """
    names = [name for name in names_in(save_dir) if name not in without]
    tags = [_inspect(save_dir, name) for name in names if looks_like_tag(save_dir / name)]
    return sorted(tags, key=lambda tag: (tag.created, tag.step, tag.modified, tag.name), reverse=True)


def looks_like_tag(path: Location) -> bool:
    """Whether a directory is a checkpoint, or what is left of one."""
    try:
        validate_tag(path.name)
        return path.is_dir() and any(name == MANIFEST_NAME or is_shard_name(name) for name in names_in(path))
    except (InvalidTagError, OSError):
        return False


def _inspect(save_dir: Location, name: str) -> TagInfo:
    path = save_dir / name
    manifest, problem = None, ""
    try:
        check_link(path)
        manifest = read_manifest(path)
        require_sound(path, manifest, "sizes")
    except ZeroError as error:
        problem = str(error)
    try:
        modified = (path / MANIFEST_NAME if is_remote(path) and manifest else path).stat().st_mtime
    except OSError as error:  # removed under our eyes
        modified, problem = 0.0, str(error)
    return TagInfo(name, path, manifest, problem, modified)


def check_link(path: Location) -> None:
    """A tag may be a link to another (Lightning's `save_last="link"`), and to nothing outside of the save directory.

    Raises:
        CorruptCheckpointError: it leads out.
    """
    if not is_remote(path) and path.is_symlink():
        target = Path(os.path.realpath(path))
        if target.parent != Path(os.path.realpath(path.parent)):
            raise CorruptCheckpointError(
                f"{path} is a link that leaves the save directory, to {target}; it isn't followed"
            )


def link_tag(target: Path, link: Path) -> None:
    """Have a link name a tag beside it, whatever had the link's name before: a link, a file or a tag.

    Where there are no links, it is a copy, by hard links if possible.
    """
    with _aside(link.parent, link.name) as hidden:
        new = hidden / link.name
        try:
            os.symlink(os.path.relpath(target, link.parent), new)
        except OSError:
            _copy_by_links(target, new, fsync=True)
        if link.is_dir() and not link.is_symlink():
            os.rename(link, hidden / f"{link.name}.old")
        os.replace(new, link)


def copy_tag(source: Path, copy: Path) -> None:
    """Have a second tag hold what one beside it holds, by hard links where there can be some; it isn't `latest`.

    It takes no room, and each outlives the other. What had its name before is replaced as by a save.
    """
    with _aside(copy.parent, copy.name) as hidden:
        _copy_by_links(source, hidden / copy.name, fsync=True)
        commit(hidden / copy.name, copy.parent, copy.name, update_latest=False)


def remove_tag(save_dir: Location, tag: str) -> None:
    """Remove a tag. If `latest` names it, `latest` names the newest other complete one first, or goes.

    One of weights alone is never named.

    A tag that isn't there is no error. A crash in between leaves either the tag or some trash.

    Raises:
        CorruptCheckpointError: what `latest` names can't be read, for now perhaps.
    """
    path = save_dir / validate_tag(tag, hidden=True)
    if not (is_remote(path) or os.path.lexists(path)):
        return
    if _names(save_dir, tag):
        others = [other for other in list_tags(save_dir, without=(tag,)) if other.complete and other.resumable]
        # A link leads to this tag, or to one of the others, and nowhere when that one is removed
        others = [other for other in others if not other.path.is_symlink()]
        if others:
            write_latest(save_dir, others[0].name)
        else:
            remove_file(save_dir / LATEST)
            _sync_directory(save_dir, True)
    if is_remote(save_dir):
        remote.remove_what_nothing_names(save_dir / tag, ())
        return
    assert not is_remote(path)
    trash = save_dir / f"{_TRASH}{secrets.token_hex(4)}"
    try:
        os.rename(path, trash)
    except FileNotFoundError:
        return
    _remove(trash)


def clean_leftovers(save_dir: Location) -> None:
    """Remove what dead saves left behind: see [Note: what is stale]. Whatever resists is left for the next time."""
    try:
        if is_remote(save_dir):
            remote.remove_stale(save_dir, _IDLE_SECONDS)
            return
        names = names_in(save_dir)
        for name in names:
            if name.startswith(_TRASH):
                _remove(save_dir / name)
        locks = {_STAGING + name.removeprefix(_LOCK) for name in names if name.startswith(_LOCK)}
        for name in locks.union(name for name in names if name.startswith(_STAGING)):
            _remove_if_dead(save_dir / name)
    except Exception as error:  # a store's own kinds too: nothing that a save has to fail for
        warnings.warn(f"what dead saves have left in {save_dir} couldn't be removed: {error}", stacklevel=2)


def _lock_of(staging: Path) -> Path:
    return staging.with_name(_LOCK + staging.name.removeprefix(_STAGING))


def _open_lock(staging: Path, flags: int = 0) -> int:
    # O_RDWR: NFS locks nothing else. O_NONBLOCK: a pipe of that name would wait, and every save with it
    return os.open(_lock_of(staging), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | flags, 0o666)


def _remove_if_dead(staging: Path) -> None:
    """Remove a dead save's staging directory, and its lock; either may be there alone."""
    fd = None
    try:
        with suppress(FileNotFoundError):
            fd = _open_lock(staging)
        if fd is not None:
            dead = _lock(fd)
            if dead is None:
                parts = [_lock_of(staging), staging, *(staging / name for name in names_in(staging))]
                dead = time.time() - max(map(_changed, parts)) > _IDLE_SECONDS
            if not dead or not _is_at(fd, _lock_of(staging)):  # or another has removed it, and a third made it again
                return
        trash = staging.with_name(f"{_TRASH}{secrets.token_hex(4)}")
        with suppress(FileNotFoundError):
            os.rename(staging, trash)
        _remove(trash)
        if fd is not None:
            _lock_of(staging).unlink(missing_ok=True)
    except OSError:
        return
    finally:
        if fd is not None:
            os.close(fd)


def _changed(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except FileNotFoundError:
        return 0.0


def _locked(staging: Path) -> int:
    """Make a staging directory's lock, and give the descriptor that holds it: see [Note: what is stale]."""
    if not os.path.lexists(staging.parent):
        staging.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(_TRIES):
        fd = _open_lock(staging, os.O_CREAT)
        if _lock(fd) is not False and _is_at(fd, _lock_of(staging)):
            return fd
        os.close(fd)
        time.sleep(0.01)  # whoever holds it is removing it
    raise CheckpointWriteError(f"the lock of {staging} was taken away each of the {_TRIES} times that it was made")


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except OSError:
        return False


def _lock(fd: int) -> bool | None:
    """Lock for as long as the descriptor is open. False: another has it. None: the file system knows no locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _remove(path: Path) -> None:
    """Remove something that no name leads to any more. What resists is left: the next save tries again."""
    if path.is_symlink() or not path.is_dir():  # rmtree would open a pipe, and wait for ever
        with suppress(OSError):
            path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def real_path(path: Location) -> str:
    """Where a tag lies that may be a link to another."""
    return str(path) if is_remote(path) else os.path.realpath(path)


def _sync_directory(path: Location, fsync: bool) -> None:
    """Make the names in a directory durable: a rename is not, before this. Some file systems know no such thing."""
    if fsync and not is_remote(path):
        try:
            _sync(path)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP):
                raise


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
