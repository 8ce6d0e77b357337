"""A W&B service that is down, slow, wrong, or refuses the key: the run goes on, and its log stays here."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cli.conftest import Outcome, run_process
from tiny_models import build_tiny_model, write_records

pytestmark = pytest.mark.faults

BUCKET = {
    "id": "b", "name": "run", "displayName": "run", "description": None, "config": None, "sweepName": None,
    "historyLineCount": 0, "project": {"id": "p", "name": "trim-lightning", "entity": {"id": "e", "name": "team"}},
}  # fmt: skip
WAIT = 5  # seconds that the run gives the service
FILES = ("scores.parquet", "coreset.jsonl", "adapter/adapter_model.safetensors", "predictions.jsonl")


@dataclass
class Service:
    """A stand-in for the server of W&B.

    Attributes:
        manner: How it answers; see `answer`.
        asked: The operations it was asked for.
    """

    manner: str
    asked: list[str] = field(default_factory=list)
    server: ThreadingHTTPServer | None = None
    over: threading.Event = field(default_factory=threading.Event)

    def answer(self, path: str, body: bytes) -> tuple[int, bytes]:
        """Status and body of an answer."""
        query = str(json.loads(body).get("query", "")) if path == "/graphql" else path
        self.asked.append(query.strip()[:60])
        if self.manner in ("401", "403", "500", "503"):
            return int(self.manner), b'{"errors": [{"message": "no such key"}]}'
        if self.manner == "another page":
            return 200, b"<html>Sign in to the network</html>"
        if self.manner == "silence":
            self.over.wait(120)
            return 200, b"{}"
        if "upsertBucket" in query:
            return 200, json.dumps({"data": {"upsertBucket": {"bucket": BUCKET, "inserted": True}}}).encode()
        if self.manner == "silence later":
            self.over.wait(120)
        if self.manner == "refused later":
            return 401, b"{}"
        if self.manner == "down later" and self.server is not None:
            threading.Thread(target=self.server.shutdown).start()
            return 503, b"{}"
        # answers without what W&B's own process needs make it end with a fault of memory
        return 200, b'{"data": {}}'


@pytest.fixture
def serve() -> Iterator[Callable[[str], tuple[Service, str]]]:
    """``serve(manner)``: a service and its address."""
    services: list[Service] = []

    def start(manner: str) -> tuple[Service, str]:
        service = Service(manner)

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                status, content = service.answer(self.path, body)
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_PUT = do_POST

            def log_message(self, *_: Any) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            def handle_error(self, *_: Any) -> None:
                pass  # a client that has gone

        server = Quiet(("127.0.0.1", 0), Handler)
        if manner == "down":
            server.server_close()
        else:
            service.server = server
            threading.Thread(target=server.serve_forever, daemon=True).start()
        services.append(service)
        return service, f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for service in services:
        service.over.set()
        if service.server is not None:
            service.server.shutdown()
            service.server.server_close()


@dataclass
class Bench:
    """Inputs, and what a run without a tracker makes of them."""

    root: Path
    results: dict[str, bytes] = field(default_factory=dict)

    def run(self, name: str, *more: str, **variables: str) -> tuple[Outcome, Path]:
        """A selection, a training and an evaluation; each has its own store."""
        output = self.root / name
        outcome = run_process(
            Path(sys.executable).with_name("trim-train"), "model=hf", f"model.path={self.root / 'model'}",
            "model.dtype=float32", "trainer=cpu", "pool=jsonl", f"pool.path={self.root / 'pool.jsonl'}", "target=jsonl",
            f"target.path={self.root / 'targets.jsonl'}", "warmup=none", "saliency.num_layers=2", "selection.count=8",
            "train.epochs=1", f"evaluation.path={self.root / 'held.jsonl'}", "evaluation.exact_match=never",
            f"paths.store_dir={self.root / name}-store", f"hydra.run.dir={output}", *more,
            cwd=self.root, timeout=300,
            environment={**os.environ, "OMP_NUM_THREADS": "1", "HOME": str(self.root), **variables},
        )  # fmt: skip
        return outcome, output


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Run once without a tracker."""
    made = Bench(tmp_path_factory.mktemp("tracker"))
    build_tiny_model("llama", made.root / "model")
    write_records(made.root / "pool.jsonl", 40, seed=1)
    write_records(made.root / "targets.jsonl", 4, seed=2, edge_cases=False)
    write_records(made.root / "held.jsonl", 6, seed=3, edge_cases=False)
    outcome, output = made.run("alone", "logger=none")
    assert outcome.code == 0, outcome.err
    for name in FILES:
        file = next(path for path in (output / name, output / "selection" / name) if path.exists())
        made.results[name] = file.read_bytes()
    return made


@pytest.mark.parametrize(
    ("manner", "told"),
    [
        ("down", "logging offline"), ("401", "logging offline"), ("403", "logging offline"),
        ("500", "logging offline"), ("503", "logging offline"), ("another page", "logging offline"),
        ("silence", "logging offline"), ("down later", None), ("refused later", None), ("silence later", None),
        ("answers that crash it", "nothing more goes there"),
    ],
)  # fmt: skip
def test_a_run_goes_on_without_its_tracker(
    bench: Bench,
    serve: Callable[[str], tuple[Service, str]],
    count_fault: Callable[[str, str], None],
    manner: str,
    told: str | None,
) -> None:
    service, address = serve(manner)
    outcome, output = bench.run(
        manner.replace(" ", "-"), "logger=wandb", f"logger.finish_timeout={WAIT}",
        WANDB_BASE_URL=address, WANDB_API_KEY="0123456789" * 4,
    )  # fmt: skip
    count_fault(f"W&B: {manner}", "a whole run")
    assert outcome.code == 0, outcome.err
    assert manner == "down" or service.asked
    if told is not None:
        assert f"{told}" in outcome.out + outcome.err
    assert "0123456789" * 4 not in outcome.out + outcome.err
    for name, wanted in bench.results.items():
        file = next(path for path in (output / name, output / "selection" / name) if path.exists())
        assert file.read_bytes() == wanted, name
    assert [path for path in output.rglob("*.wandb") if path.stat().st_size], "nothing was logged here"
