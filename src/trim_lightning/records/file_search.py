"""Which files a path stands for: itself, those of a folder or a glob, or each of a list; and which split each is of."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trim_lightning.errors import UserError, suggest
from trim_lightning.records.record_file import check_file

PACKED = (".gz", ".zst", ".zstd", ".xz", ".bz2")
JSON_SUFFIXES = (".jsonl", ".json", ".ndjson", ".jsonlines", ".jl")
SUFFIXES = {
    "jsonl": JSON_SUFFIXES,
    "parquet": (".parquet",),
    "file": (*JSON_SUFFIXES, ".csv", ".tsv", ".parquet", ".arrow"),
}
FORMATS = {"jsonl": "JSON lines", "parquet": "Parquet files", "file": "files of records"}
SPLITS = ("train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation", "holdout")
# what libraries keep beside the records
_NOTES = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json", "metadata.json",
          "license", "licence", "notice")  # fmt: skip
_NOTE_SUFFIXES = (".md", ".rst", ".py", ".lock", ".crc", ".sha256", ".md5")
_SHARD = re.compile(r"(.+?)-\d{5}-of-\d{5}\b")


@dataclass(frozen=True)
class FoundFiles:
    """The files of an input, in the order in which they are read.

    Attributes:
        files: At least one.
        names: What messages call each, without what they share.
        name: What manifests call the input.
        remarks: What the user should know of how they were chosen.
    """

    files: tuple[Path, ...]
    names: tuple[str, ...]
    name: str
    remarks: tuple[str, ...] = ()


def label_of(given: Any, what: str) -> str:
    """A path, or a list of them, in the user's words."""
    return f"{what}.path={given if isinstance(given, str) else '[' + ','.join(given) + ']'}"


def find_files(given: Any, kind: str, split: str | None, what: str) -> FoundFiles:
    """The files that a path or a list of paths stands for.

    Args:
        given: Files, folders and globs.
        kind: The source: ``file``, ``jsonl`` or ``parquet``; of a folder only its files are read.
        split: The split to read; None if there is to be one only.
        what: ``pool`` or ``target``, for messages.

    Raises:
        UserError: if there is no such file, or a folder holds several splits and none is named.
    """
    label = label_of(given, what)
    paths = [given] if isinstance(given, str) else list(given)
    found: list[tuple[Path, str]] = []
    remarks: list[str] = []
    chosen = True  # by name
    for path in paths:
        more, folder = _files_of(path, kind, label, what, remarks)
        chosen = chosen and not folder
        found += more
    found = list(dict.fromkeys(found))
    splits = {path: split_of(path, name) for path, name in found}
    found = _of_one_split(found, splits, split, chosen, label, what, remarks)
    formats = sorted({format_suffix(path) for path, _ in found} & set(SUFFIXES["file"]))
    if not chosen and len({"json" if suffix in JSON_SUFFIXES else suffix for suffix in formats}) > 1:
        remarks.append(f"files of several formats were read: {', '.join(formats)}")
    name = Path(paths[0]).name + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
    return FoundFiles(tuple(path for path, _ in found), tuple(name for _, name in found), name, tuple(remarks))


def _files_of(given: str, kind: str, label: str, what: str, remarks: list[str]) -> tuple[list[tuple[Path, str]], bool]:
    """The files of one path with their names, and whether it is a folder."""
    path = Path(os.path.expanduser(given))
    if path.is_dir():
        files, unread = _in_folder(path, kind)
        readable = kind != "file" and any(format_suffix(Path(name)) in SUFFIXES["file"] for name in unread)
        advice = f"{what}=file reads more formats" if readable else "a glob reads files whatever their names"
        named = f"{names_of(unread)}; {advice}"
        if not files:
            raise UserError(
                f"{label} is a directory that holds no {FORMATS[kind]}: name a file, or a directory or glob of them"
                f"{f' (it holds {named})' if unread else ''}"
            )
        if unread:
            remarks.append(f"{len(unread)} files of the folder are not read: {named}")
        return [(file, str(file.relative_to(path))) for file in files], True
    if path.exists() or not glob.has_magic(given):
        check_file(path, label)
        return [(path, path.name)], False
    files = sorted(Path(found) for found in glob.glob(str(path), recursive=True) if Path(found).is_file())
    if not files:
        raise UserError(f"{label} holds no {FORMATS[kind]}: name a file, or a directory or glob of them")
    return [(file, file.name) for file in files], False


def _in_folder(folder: Path, kind: str) -> tuple[list[Path], list[str]]:
    """The files of records in a folder, and the names of the others but for notes and caches."""
    files, unread = [], []
    saved: dict[Path, list[str] | None] = {}
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if any(part.startswith((".", "__")) for part in parts) or not path.is_file() or path.name.lower() in _NOTES:
            continue
        suffix = format_suffix(path)
        if suffix in SUFFIXES[kind]:
            listed = saved.setdefault(path.parent, _saved_files(path.parent))
            if listed is None or path.name in listed:
                files.append(path)
        elif suffix not in _NOTE_SUFFIXES and not path.name.startswith("_"):
            unread.append(path.name)
    return files, unread


def _saved_files(folder: Path) -> list[str] | None:
    """The files that a folder of ``save_to_disk`` is made of; others there are caches. None for other folders."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return [str(entry["filename"]) for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def format_suffix(path: Path) -> str:
    """The suffix that tells a file's format, that of its packing aside."""
    name = path.name.lower()
    for packed in PACKED:
        name = name.removesuffix(packed)
    return os.path.splitext(name)[1]


def split_of(path: Path, name: str) -> str | None:
    """The split that a file is of, as its name or a folder on the way to it says; None if they say none."""
    if (path.parent.parent / "dataset_dict.json").is_file():
        return path.parent.name
    stem = path.name.partition(".")[0]
    if (shard := _SHARD.match(path.name)) and _word(shard[1]):
        return shard[1]
    if found := _word(stem):
        return stem if stem.lower().startswith(found) and stem.replace("_", "").isalpha() else found
    folders = Path(name).parent.parts
    return next((folder for folder in reversed(folders) if _word(folder)), None)


def _word(text: str) -> str | None:
    return next((word for word in re.findall(r"[a-z]+", text.lower()) if word in SPLITS), None)


def _of_one_split(
    found: Sequence[tuple[Path, str]],
    splits: dict[Path, str | None],
    split: str | None,
    chosen: bool,
    label: str,
    what: str,
    remarks: list[str],
) -> list[tuple[Path, str]]:
    """The files of the split that is asked for, or of the only one."""
    known = sorted({name for name in splits.values() if name is not None})
    rest = [name for path, name in found if splits[path] is None]
    if split is not None:
        if not known:
            raise UserError(
                f"{what}.split={split}: no file name of {label} says of which split it is ({names_of(rest)}); leave "
                f"out {what}.split, or name the files"
            )
        if split not in known:
            raise UserError(f"{what}.split={split}: {label} has the splits {', '.join(known)}{suggest(split, known)}")
        if rest:
            remarks.append(f"{len(rest)} files whose names say no split are not read: {names_of(rest)}")
        return [(path, name) for path, name in found if splits[path] == split]
    several = len(known) + (None in splits.values()) > 1
    if several and known and not chosen:
        besides = f", and files of none ({', '.join(rest[:3])})" if rest else ""
        first = next((name for name in known if _word(name) in ("train", "training")), known[0])
        raise UserError(
            f"{label} holds several splits: {', '.join(known)}{besides}; name one with {what}.split={first}"
        )
    kept = [name for name in known if _word(name) not in ("train", "training")]
    if kept and several:
        remarks.append(f"files of several splits were read: {', '.join(known)}")
    elif kept and not chosen:
        remarks.append(f"the only split was read: {kept[0]}")
    return list(found)


def names_of(files: Iterable[str], most: int = 5) -> str:
    """The first few files, for one line."""
    listed = list(files)
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")
