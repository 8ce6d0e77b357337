"""Directory results with checksums: built once under a lock, published by a rename."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, SoftFileLock

from trim_lightning.errors import UserError
from trim_lightning.files.atomic import sha256_of, write_atomically
from trim_lightning.files.json_files import read_json_object
from trim_lightning.store.cost import Cost
from trim_lightning.store.keys import StageKey, digest_of
from trim_lightning.store.processes import ALONE, PartDone, Processes
from trim_lightning.store.receipt import (
    RECEIPT,
    SAMPLED,
    StoreError,
    has_link,
    listed_files,
    seal,
    seal_of,
    some_of,
    versions_in,
)
from trim_lightning.store.versions import versions

log = logging.getLogger(__name__)

SIGHT_ATTEMPTS, SIGHT_SECONDS = 20, 0.5
DONE = ""  # what the leader tells the others when a result is there
RACING_ATTEMPTS = 4  # builds of one process without a working lock, before it gives up
WHOLE = 1 << 30  # bytes of an entry that is read whole when a process first uses it; of a larger one samples are
ORPHAN_AGE = 24 * 3600.0  # seconds without a change after which a temporary directory belongs to nobody
ORPHAN = re.compile(r"damaged-[0-9a-f]{32}|.+-[0-9a-f]{64}-[0-9a-f]{32}")  # resumable work has no last part
LOCKS: dict[str, Callable[..., AbstractContextManager[Any]]] = {
    "file": FileLock,
    "soft": SoftFileLock,  # for file systems without working locks
    "none": lambda path, timeout: nullcontext(),
}


@dataclass(frozen=True)
class Entry:
    """A finished result in the store.

    Attributes:
        key: Its key.
        path: Its directory; read only.
        facts: What the builder said of it (``seconds``, ``tokens`` …).
        cached: True if this call found it rather than built it.
        versions: Package to the version that it was computed with; None if its receipt does not say.
    """

    key: StageKey
    path: Path
    facts: Mapping[str, Any]
    cached: bool
    versions: Mapping[str, str] | None = None


class Store:
    """A directory of stage results, ``<root>/<stage>/<hex>/``.

    The lock saves work; the rename and the checksums give correctness, so that two processes without a
    working lock (some network file systems) at worst compute the same bytes twice.

    Args:
        root: The store's directory, made when first needed.
        lock: ``file`` (default), ``soft`` or ``none``.
        processes: The processes of this command; all of them ask for the same results in the same order, the leader
            builds, and the others read what it has built.
    """

    def __init__(self, root: Path | str, lock: str = "file", processes: Processes = ALONE) -> None:
        self.root = Path(root).expanduser().absolute()
        self.processes = processes
        self._lock = LOCKS[lock]
        self._verified: set[str] = set()

    def path_of(self, key: StageKey) -> Path:
        """Where the result of ``key`` is, or would be."""
        return self.root / key.stage / key.hex

    def workspace_of(self, key: StageKey) -> Path:
        """Where a resumable stage keeps unfinished work for ``key``."""
        return self.root / "partial" / f"{key.stage}-{key.hex}"

    def lock(self, name: str, timeout: float = -1) -> AbstractContextManager[Any]:
        """The lock of a piece of work, waited for as long as it takes, or ``timeout`` seconds."""
        (self.root / "locks").mkdir(parents=True, exist_ok=True)
        return self._lock(str(self.root / "locks" / f"{name}.lock"), timeout=timeout)

    def find(self, key: StageKey) -> Entry | None:
        """The finished result of ``key``, or None; a damaged one is reported, removed, and counts as None."""
        path = self.path_of(key)
        try:
            receipt = self.verify(path)
        except FileNotFoundError:
            return None
        except StoreError as error:
            log.warning("store entry %s/%s is damaged (%s); computing it again", key.stage, key.hex[:12], error)
            self.discard(path)
            return None
        with suppress(OSError):
            os.utime(path / RECEIPT)  # when it was last used, for pruning
        return Entry(key, path, receipt["facts"], cached=True, versions=versions_in(receipt))

    def get(
        self,
        key: StageKey,
        build: Callable[[Path], Mapping[str, Any] | None],
        *,
        resumable: bool = False,
        together: bool = False,
        cost: Cost | None = None,
    ) -> Entry:
        """The result of ``key``, built at most once.

        Args:
            key: What is wanted.
            build: Writes the result into the empty directory it is given and returns JSON-able facts
                (``tokens`` and the like). If ``resumable``, the directory may hold an earlier attempt's
                files, and the builder decides what to keep; two processes must then write the same bytes
                and every file by rename.
            resumable: Keep the unfinished directory when the builder fails or is killed.
            together: All processes of the command build, each its part, in the leader's directory.
            cost: What building takes, if that is much; only a plan reads it.

        Raises:
            UserError: in a process that does not see what the leader has built.
        """
        if not self.processes.leads:
            return self._follow(key, build)

        helped = together and self.processes.size > 1

        def build_together(workspace: Path) -> Mapping[str, Any] | None:
            self.processes.agree(key.hex, lambda: str(workspace.relative_to(self.root)))
            return self.processes.take_part(lambda: build(workspace))

        try:
            entry = self.find(key)
            if entry is None:
                with self.lock(f"{key.stage}-{key.hex}"):  # another process may build it while this one waits
                    entry = self.find(key) or self._build(key, build_together if helped else build, resumable)
        except Exception:
            self.processes.give_up()
            raise
        self.processes.agree(key.hex, lambda: DONE)
        return entry

    def get_many(
        self, keys: Sequence[StageKey], build: Callable[[Mapping[StageKey, Path]], Mapping[str, Any]]
    ) -> list[Entry]:
        """The results of several keys; those that are missing are built by one piece of work.

        Args:
            keys: What is wanted.
            build: Writes the missing results into the directories that it is given, which may hold an earlier
                attempt's files, and returns facts that hold for each of them.
        """
        assert self.processes.size == 1, "helpers do not know of this"
        with ExitStack() as locks:
            missing = []
            for key in sorted({key.hex: key for key in keys if not self.find(key)}.values(), key=lambda key: key.hex):
                # one order for all processes, so that no two wait for each other
                locks.enter_context(self.lock(f"{key.stage}-{key.hex}"))
                if not self.find(key):
                    missing.append(key)
            if missing:
                workspaces = {key: self.workspace_of(key) for key in missing}
                for workspace in workspaces.values():
                    workspace.mkdir(parents=True, exist_ok=True)
                facts = build(workspaces)
                for key, workspace in workspaces.items():
                    seal(workspace, key, facts)
                    self.path_of(key).parent.mkdir(parents=True, exist_ok=True)
                    try:
                        workspace.rename(self.path_of(key))
                    except OSError:
                        if self.find(key) is None:  # no process without our lock was faster
                            raise
        built = {key.hex for key in missing}
        entries = []
        for key in keys:
            entry = self.find(key)
            if entry is None:
                raise StoreError(f"{key.stage}/{key.hex[:12]} is not there after it was built")
            entries.append(replace(entry, cached=key.hex not in built))
        return entries

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within it the leader works alone; the others are at the next result, and wait for it."""
        processes, self.processes = self.processes, ALONE
        try:
            yield
        finally:
            self.processes = processes

    def dismiss_helpers(self) -> None:
        """From here on the leader works alone.

        Raises:
            PartDone: in the helpers.
        """
        if not self.processes.leads:
            raise PartDone
        self.processes = ALONE

    def _follow(self, key: StageKey, build: Callable[[Path], Mapping[str, Any] | None]) -> Entry:
        """Wait for the leader, take part where it says so, and read the result; never remove anything."""
        while (workspace := self.processes.agree(key.hex, lambda: DONE)) != DONE:
            self.processes.take_part(lambda directory=self.root / workspace: build(directory))  # type: ignore[misc]
        path = self.path_of(key)
        for _ in range(SIGHT_ATTEMPTS):
            try:
                receipt = self.verify(path)
                return Entry(key, path, receipt["facts"], cached=True, versions=versions_in(receipt))
            except (StoreError, FileNotFoundError):
                time.sleep(SIGHT_SECONDS)  # network file systems show new files late
        raise UserError(
            f"paths.store_dir={self.root}: this process does not see what the first one has stored; all nodes "
            "need one shared directory"
        )

    def spool(self, kind: str, key: Mapping[str, Any], build: Callable[[Path], None]) -> Path:
        """The directory of a derived input (a decompressed pool, generated records), built at most once."""
        return self.get(StageKey(kind, 1, key), build).path

    def file_digest(self, path: Path) -> str:
        """sha256 (hex) of a file, remembered by its path, size, and modification and change times."""
        real, status = path.resolve(), path.stat()
        # a copy may keep the modification time, but nothing keeps the change time
        mark = [digest_of(str(real)), status.st_size, status.st_mtime_ns, status.st_ctime_ns]
        note = self.root / "digests" / f"{digest_of(mark)}.json"
        try:
            known = json.loads(note.read_text())
            if known["mark"] == mark:
                return str(known["sha256"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            pass
        digest = sha256_of(real)
        note.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(note, json.dumps({"mark": mark, "sha256": digest}))
        return digest

    def _build(
        self,
        key: StageKey,
        build: Callable[[Path], Mapping[str, Any] | None],
        resumable: bool,
        attempts: int = RACING_ATTEMPTS,
    ) -> Entry:
        final = self.path_of(key)
        self._sweep()
        workspace = self.workspace_of(key)
        if not resumable:
            workspace = workspace.with_name(f"{workspace.name}-{uuid.uuid4().hex}")
        workspace.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        try:
            facts = dict(build(workspace) or {})
            facts.setdefault("seconds", time.perf_counter() - started)
            seal(workspace, key, facts)
            final.parent.mkdir(parents=True, exist_ok=True)
            workspace.rename(final)
        except BaseException as error:
            if not resumable:
                shutil.rmtree(workspace, ignore_errors=True)
            # a process without our lock may have been faster (and taken a shared workspace with it);
            # its bytes are as good as ours
            other = self.find(key) if isinstance(error, Exception) else None
            if other is None and resumable and isinstance(error, FileNotFoundError) and attempts > 1:
                # the shared workspace went with a process whose result then did not hold
                return self._build(key, build, resumable, attempts - 1)
            if other is None:
                raise
            shutil.rmtree(workspace, ignore_errors=True)
            return other
        self._verified.add(key.hex)
        return Entry(key, final, facts, cached=False, versions=versions())

    def verify(self, path: Path, whole: bool | None = None) -> dict[str, Any]:
        """Read the receipt of an entry and compare the files with it, the contents once per process.

        Sizes are compared of all files. All contents are read if ``whole``, else samples of about `SAMPLED` bytes, or
        all of a smaller entry; None reads all of an entry up to `WHOLE` bytes.

        Raises:
            FileNotFoundError: if there is no entry.
            StoreError: if it is damaged.
        """
        if path.is_symlink():
            raise StoreError("a symbolic link, which no run makes")
        try:
            receipt = read_json_object(path / RECEIPT)
        except FileNotFoundError:
            if path.exists():
                raise StoreError("no receipt") from None
            raise
        except (OSError, ValueError) as error:
            raise StoreError("unreadable receipt") from error
        if receipt.get("seal") not in (None, seal_of(receipt)):
            raise StoreError("the receipt has another checksum")
        if not isinstance(receipt.get("facts"), dict):
            raise StoreError("unreadable receipt")
        listed = listed_files(receipt)
        for file in listed:
            if has_link(path / file.name, path) or not (path / file.name).is_file():
                raise StoreError(f"{file.name} is missing")
            if (path / file.name).stat().st_size != file.size:
                raise StoreError(f"{file.name} has another size")
        if path.name not in self._verified:
            whole = whole or sum(file.size for file in listed) <= (WHOLE if whole is None else SAMPLED)
            some = {file.name for file in listed} if whole else some_of(listed)
            for file in listed:
                if file.name in some and file.differs(path / file.name, whole):
                    raise StoreError(f"{file.name} has another checksum")
        self._verified.add(path.name)
        return receipt

    def discard(self, path: Path) -> None:
        """Delete an entry, moved out of the way first, so that nobody sees it half removed."""
        self._verified.discard(path.name)
        grave = self.root / "partial" / f"damaged-{uuid.uuid4().hex}"
        grave.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.rename(grave)
        except OSError:
            return
        if grave.is_symlink():
            grave.unlink(missing_ok=True)  # what it leads to is not ours
        shutil.rmtree(grave, ignore_errors=True)

    def _sweep(self) -> None:
        """Remove temporary directories that a killed process left long ago; resumable work stays."""
        partial = self.root / "partial"
        if not partial.is_dir():
            return
        for path in partial.iterdir():
            if ORPHAN.fullmatch(path.name) and time.time() - last_change(path) > ORPHAN_AGE:
                shutil.rmtree(path, ignore_errors=True)


def last_change(path: Path) -> float:
    """Time (seconds) of the latest change in a directory; now, if it is vanishing under our eyes."""
    try:
        return max(item.stat().st_mtime for item in [path, *path.rglob("*")])
    except OSError:
        return time.time()
