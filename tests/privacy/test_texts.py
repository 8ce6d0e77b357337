"""What may be shown to others: texts without keys, without this machine's paths, without the user's name."""

from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from trim_lightning.privacy import keys
from trim_lightning.privacy import paths as privacy
from trim_lightning.privacy.keys import LogFormatter, hide_keys
from trim_lightning.privacy.local import read_local, with_local, write_local
from trim_lightning.privacy.paths import run_name, shareable, shareable_command, told_apart

HOME, USER = "/home/canary user", "canaryuser"


@pytest.fixture(autouse=True)
def somebody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A user with a home directory that has a blank in its name."""
    monkeypatch.setenv("HOME", HOME)
    monkeypatch.setattr(privacy, "user_name", lambda: USER)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("text", "shared"),
    [
        (f"{HOME}/x", ".../x"),
        (f"{HOME}", "~"),
        (f"{HOME}/canaryuser", ".../user"),
        ("~/data/x", ".../x"),
        (f"file://{HOME}/x", ".../x"),
        ("/mnt/disk/pool.jsonl", ".../pool.jsonl"),
        ("/data/My Files/pool.jsonl", ".../pool.jsonl"),
        ("/data/parts/*.parquet", ".../*.parquet"),
        (f"pool.path={HOME}", "pool.path=~"),
        (f"{HOME}/a.jsonl line 3: not JSON", ".../a.jsonl line 3: not JSON"),
        (f"warning: {HOME}/b/a.jsonl: old", "warning: .../a.jsonl: old"),
        ("see /mnt/disk/a.jsonl, /mnt/disk/b.jsonl", "see .../a.jsonl, .../b.jsonl"),
        # what looks like a path, and is none
        ("and/or, 1/2, a/b", "and/or, 1/2, a/b"),
        ("/think", "/think"),
        ("owner/name", "owner/name"),
        (f"{USER}/name", f"{USER}/name"),  # of the Hub
        ("bundled:smollm2_135m", "bundled:smollm2_135m"),
        ("s3://bucket/folder/x", "s3://bucket/folder/x"),
        ("https://host/a/b", "https://host/a/b"),
        ("../pool/a.jsonl", "../pool/a.jsonl"),
    ],
)
def test_paths_go_by_their_names(text: str, shared: str) -> None:
    assert shareable({"values": [text]}) == {"values": [shared]}
    assert shareable(shareable(text)) == shareable(text)


def test_a_path_below_the_working_directory_is_relative(tmp_path: Path) -> None:
    assert shareable(str(tmp_path / "runs" / USER / "a")) == "runs/user/a"
    assert shareable(str(tmp_path)) == "."
    (tmp_path / USER).mkdir()
    assert shareable(f"{USER}/") == "user/"  # it is there, so it is a path


def test_a_working_directory_above_the_home_shows_no_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    home = tmp_path / "people" / "jo"
    monkeypatch.setenv("HOME", str(home))
    assert shareable(str(home / "a" / "pool.jsonl")) == ".../pool.jsonl"
    assert shareable(str(tmp_path / "shared" / "pool.jsonl")) == "shared/pool.jsonl"
    monkeypatch.setattr(os, "getcwd", lambda: "/")
    assert shareable("/mnt/disk/pool.jsonl") == ".../pool.jsonl"


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("https://ann:pass@host/x", "https://***@host/x"),
        ("https://tok@host/x", "https://***@host/x"),
        ("https://host/x?token=abc&page=2", "https://host/x?token=***&page=2"),
        ("s3://b/x?X-Amz-Signature=abcd", "s3://b/x?X-Amz-Signature=***"),
        ("logger.api_key=abcd", "logger.api_key=***"),
        ("{api_key=abcd,b=2}", "{api_key=***,b=2}"),
        ("password='abcd'", "password='***'"),
        ("secret_access_key=abcd my-token=abcd", "secret_access_key=*** my-token=***"),
        ("broken=1 mytoken=abcd", "broken=1 mytoken=abcd"),
        ("use hf_abcdefghijABCDEFGHIJ now", "use *** now"),
        ("AKIAABCDEFGHIJKLMNOP", "***"),
        ("github_pat_11ABCDEFG0_abcdefghijklmnop", "***"),
        ("glpat-abcdefghijABCDEFGHIJ", "***"),
        (f"AIza{'b' * 35}", "***"),
        # settings of ours with such words in their names
        ("selection.tokens=1000", "selection.tokens=1000"),
        ("scoring.tokens_per_batch=512", "scoring.tokens_per_batch=512"),
        ("pooler.token_weight=idf", "pooler.token_weight=idf"),
        ("evaluation.max_new_tokens=4", "evaluation.max_new_tokens=4"),
        ("report.examples=10@20", "report.examples=10@20"),
    ],
)
def test_keys_are_known_by_where_they_stand_and_by_their_looks(text: str, hidden: str) -> None:
    assert hide_keys(text) == hidden
    assert hide_keys(hidden) == hidden


@pytest.mark.parametrize(
    "name",
    [
        "MY_SECRET", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "PGPASSWORD", "api_key", "GH_TOKEN", "NPM_AUTHTOKEN",
        "MYAPIKEY", "MYSQL_PWD", "GITHUB_PAT",
    ],
)  # fmt: skip
def test_values_of_variables_that_are_named_like_keys(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "canary value")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "parallel")
    monkeypatch.setenv("KEY", "short")
    assert hide_keys("a canary value b, parallel, short") == "a *** b, parallel, short"


@pytest.mark.parametrize("piece", ["-", "a.b-", "api_key", "token=", "://", "?sig", "sk-", "/a", "a/", "file://"])
def test_a_long_text_takes_no_longer_than_its_length(piece: str) -> None:
    """A million characters; in a time that grows with the square they would take hours."""
    text = piece * (1_000_000 // len(piece))
    assert len(hide_keys(text)) <= len(text) + len("***")
    assert shareable(f"see {text}").startswith("see ")


def test_a_variable_that_names_a_file_is_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else every path below it would be hidden, in ``local.json`` too, which is there to keep it."""
    monkeypatch.setenv("SECRETS_FOLDER", str(tmp_path))
    monkeypatch.setenv("MY_SECRET", f"{tmp_path}/0123456789+")  # a key may begin with a slash
    assert hide_keys(f"{tmp_path}/pool.jsonl") == f"{tmp_path}/pool.jsonl"
    assert hide_keys(f"sent {tmp_path}/0123456789+") == "sent ***"


def test_log_lines_and_their_tracebacks_have_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SECRET", "canary-0123")
    try:
        raise RuntimeError("refused canary-0123")
    except RuntimeError:
        import sys

        record = logging.LogRecord("x", logging.ERROR, "f", 1, "sent %s", ("canary-0123",), sys.exc_info())
    text = LogFormatter("%(levelname)s %(message)s").format(record)
    assert text.startswith("ERROR sent ***\nTraceback")
    assert text.endswith("RuntimeError: refused ***")


def test_the_command_keeps_its_words(tmp_path: Path) -> None:
    words = ["trim-select", "pool.path=/data/My Files/a.jsonl", f"paths.output_dir={tmp_path / 'out'}",
             "model.path=owner/name", "+logger.token=abcd", "pool.where={source: [a, b]}"]  # fmt: skip
    assert shareable_command(words) == [
        "trim-select", "pool.path=.../a.jsonl", "paths.output_dir=out", "model.path=owner/name", "+logger.token=***",
        "pool.where={source: [a, b]}",
    ]  # fmt: skip


def test_what_a_manifest_leaves_out_is_kept_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SECRET", "canary-0123")
    config = {"pool": {"path": f"{HOME}/pool.jsonl"}, "tags": ["plain", "/mnt/disk/canary-0123"], "seed": 3}
    write_local(config, tmp_path)
    assert b"canary-0123" not in (tmp_path / "local.json").read_bytes()
    shared = json.loads(json.dumps(shareable(config)))
    back = with_local(shared, read_local(tmp_path))
    assert back == {"pool": {"path": f"{HOME}/pool.jsonl"}, "tags": ["plain", "/mnt/disk/***"], "seed": 3}
    # a manifest that says something else is right
    assert with_local({"pool": {"path": "other"}}, read_local(tmp_path)) == {"pool": {"path": "other"}}


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b'{"config": 3}', b'{"config": {"a": 1}}', b"\xff", b"[" * 99_999]
)
def test_a_damaged_note_counts_as_none(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "local.json").write_bytes(content)
    assert read_local(tmp_path) == {}
    assert read_local(tmp_path / "missing") == {}


def test_different_paths_stay_different() -> None:
    same_name = ["/models/v1/checkpoint", "/models/v2/checkpoint"]
    assert told_apart(same_name) == dict(zip(same_name, (".../v1/checkpoint", ".../v2/checkpoint"), strict=True))
    users = ["/home/ann/pool.jsonl", "/home/bob/pool.jsonl"]
    assert told_apart(users) == dict(zip(users, (".../pool.jsonl (1)", ".../pool.jsonl (2)"), strict=True))
    assert told_apart(["/a/b/x.jsonl", "/a/b/y.jsonl", "/a/b/x.jsonl"]) == {
        "/a/b/x.jsonl": ".../x.jsonl", "/a/b/y.jsonl": ".../y.jsonl",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("{cwd}/outputs/select/2026-01-02/03-04-05", "2026-01-02/03-04-05"),
        ("{cwd}/run", "run"),
        ("/data/somebody/run", "run"),
        ("/data/sweep/3", "sweep/3"),
        ("/data/run/selection", "run/selection"),
        (f"/data/{USER}", "run"),
        (f"/home/{USER}/3", "3"),
    ],
)
def test_a_run_is_named_without_its_user(place: str, name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    assert run_name(Path(place.format(cwd=tmp_path))) == name


def test_root_names_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    find: Callable[[], str | None] = privacy.user_name.__wrapped__
    for account, name in (("root", None), ("ann", "ann")):
        for variable in ("LOGNAME", "USER", "LNAME", "USERNAME"):
            monkeypatch.setenv(variable, account)
        assert find() == name


def test_a_record_of_hydra_stays_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SECRET", "canary-0123")
    file = tmp_path / "overrides.yaml"
    file.write_text("- canary-0123\n- a=canary-0123\nb: canary-0123\n".replace("b: ", "- b: "))
    keys.hide_keys_in([file])
    assert yaml.safe_load(file.read_text()) == ["***", "a=***", {"b": "***"}]


def test_a_formatter_that_the_user_chose_writes_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SECRET", "canary-0123")
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # those of pytest would keep the new formatter
    logger = logging.getLogger("somebody.elses")
    written = io.StringIO()
    plain, own, none = (logging.StreamHandler(written) for _ in range(3))
    plain.setFormatter(logging.Formatter("plain %(message)s"))
    own.setFormatter(LogFormatter("own %(message)s"))
    for handler in (plain, own, none):
        logger.addHandler(handler)
    try:
        keys.hide_keys_in_logs()
        keys.hide_keys_in_logs()  # again, as in the next job of a multirun
        logger.error("it is %s\x1b[2J", "canary-0123")
    finally:
        for handler in (plain, own, none):
            logger.removeHandler(handler)
    assert written.getvalue() == "plain it is ***␛[2J\nown it is ***␛[2J\nit is ***␛[2J\n"
    assert type(own.formatter) is LogFormatter


def test_a_stream_hides_keys_however_it_is_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SECRET", "canary-0123")
    written = io.StringIO()
    stream = keys.KeylessStream(written)
    stream.write("one canary-0123\n")
    stream.writelines(["two canary-0123\n", "three\n"])
    assert written.getvalue() == "one ***\ntwo ***\nthree\n"
