"""Feed a million hostile inputs to everything that reads what others wrote.

    python tests/hostile/fuzz.py --inputs 1000000        # atheris, a process per target; about half an hour
    python tests/hostile/fuzz.py --inputs 2000 --engine random --only jsonl store

Each input must give a valid result or the one clear error of its reader. Anything else (another exception, more than
`SECONDS` for one input, more memory than `MEMORY`) ends its target's process, is printed with the bytes that did it,
and makes the exit code 1. With the atheris engine the bytes come from libFuzzer, guided by coverage of the package;
without atheris from a seeded generator that mutates the same examples. How bytes become a file, a conversation or a
directory is in `hostile_targets.py`; many targets give structure to them, since random bytes seldom get past a parser.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "tokens")]
SECONDS = 20  # for one input; one that takes longer is taken for a hang
MEMORY = 8 << 30  # bytes of address space of a process; torch and pyarrow alone reserve about five
# of all inputs, how many parts go to each target; slow ones get few
SHARES = {
    "jsonl": 280, "layouts": 130, "gz": 35, "parquet": 35, "render": 100, "template": 10, "overrides": 3,
    "method": 15, "manifest": 30, "compare": 2, "export": 12, "store": 120, "model": 80, "adapter": 40, "page": 160,
}  # fmt: skip


def main() -> int:
    options = parser().parse_args()
    if options.child:
        return child(options.child, options.inputs, options.seed, options.engine, Path(options.work))
    engine = options.engine or ("atheris" if has_atheris() else "random")
    chosen = {name: SHARES[name] for name in options.only or SHARES}
    total, failed, lines = 0, [], []
    for name, share in chosen.items():
        number = -(-options.inputs * share // sum(chosen.values()))
        with tempfile.TemporaryDirectory(prefix="hostile-", dir=memory_folder()) as work:
            command = [sys.executable, __file__, "--child", name, "--inputs", str(number), "--seed", str(options.seed),
                       "--engine", engine, "--work", work]  # fmt: skip
            started = time.monotonic()
            finished = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
            )
            told = Path(work, "tally.json")
            tally = json.loads(told.read_text()) if told.exists() else {"inputs": 0, "valid": 0, "refused": 0}
        total += tally["inputs"]
        line = (
            f"{name:<10} {tally['inputs']:>8} inputs  {tally['valid']:>8} valid  {tally['refused']:>8} refused  "
            f"{time.monotonic() - started:6.0f} s"
        )
        if finished.returncode or tally["inputs"] < number:
            failed.append(name)
            line += f"  FAILED ({finished.returncode})\n" + finished.stdout[-6000:]
        print(line, flush=True)
        lines.append(line)
    print(
        f"{total} inputs, engine {engine}, seed {options.seed}: "
        + ("FAILED: " + ", ".join(failed) if failed else "all well")
    )
    return 1 if failed else 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description="Feed hostile inputs to the readers.")
    made.add_argument("--inputs", type=int, default=int(os.environ.get("TRIM_FUZZ_INPUTS", "1000000")))
    made.add_argument("--seed", type=int, default=1)
    made.add_argument("--engine", choices=("atheris", "random"))
    made.add_argument("--only", nargs="+", choices=SHARES)
    made.add_argument("--child", choices=SHARES, help=argparse.SUPPRESS)
    made.add_argument("--work", help=argparse.SUPPRESS)
    return made


def has_atheris() -> bool:
    try:
        import atheris  # noqa: F401
    except ImportError:
        return False
    return True


def memory_folder() -> str | None:
    """A folder in memory, where the system has one."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def child(name: str, inputs: int, seed: int, engine: str, work: Path) -> int:
    """Run one target in this process, which is bounded in memory and in the time of each input."""
    if engine == "atheris":
        import atheris

        with atheris.instrument_imports(include=["trim_lightning"]):
            import hostile_targets as targets
    else:
        import hostile_targets as targets

    logging.disable(logging.CRITICAL)
    task = targets.TARGETS[name](work)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    tally = {"inputs": 0, "valid": 0, "refused": 0}

    def write_tally() -> None:
        (work / "tally.json").write_text(json.dumps(tally))

    def one(data: bytes) -> None:
        tally["inputs"] += 1
        signal.alarm(SECONDS)
        try:
            tally["valid" if task(data) else "refused"] += 1
        except BaseException:
            traceback.print_exc()
            print(f"input {tally['inputs']} of {name}: {data!r}", flush=True)
            write_tally()
            os._exit(3)
        finally:
            signal.alarm(0)
        if tally["inputs"] >= inputs:
            write_tally()
            os._exit(0)

    def hang(number: int, frame: object) -> None:
        raise TimeoutError(f"one input took more than {SECONDS} s")

    signal.signal(signal.SIGALRM, hang)
    examples = targets.EXAMPLES[name]()
    if engine == "random":
        generator = random.Random(seed)
        while True:
            one(mutated(generator, examples))
    corpus = work / "corpus"
    corpus.mkdir()
    for place, example in enumerate(examples):
        (corpus / f"example-{place}").write_bytes(example)
    (work / "words").write_text("".join(f'"{escaped(word)}"\n' for word in targets.WORDS))
    atheris.Setup(
        [sys.argv[0], f"-seed={seed}", f"-runs={2 * inputs}", "-max_len=4096", "-timeout=60", "-rss_limit_mb=0",
         "-verbosity=0", "-handle_alrm=0", "-handle_int=0", f"-dict={work / 'words'}", str(corpus)],
        one,
    )  # fmt: skip
    atheris.Fuzz()
    return 3  # the count above ends the process; to come here is a fault


def escaped(word: bytes) -> str:
    """A word as libFuzzer's dictionaries write it."""
    return "".join(chr(byte) if 32 < byte < 127 and byte not in b'"\\' else f"\\x{byte:02x}" for byte in word)


def mutated(generator: random.Random, examples: list[bytes]) -> bytes:
    """An example with some bytes changed, cut out, doubled, or a word put in; now and then noise."""
    import hostile_targets as targets

    if generator.random() < 0.05:
        return generator.randbytes(generator.randrange(200))
    data = bytearray(generator.choice(examples))
    for _ in range(generator.choice((1, 1, 2, 4, 12))):
        place = generator.randrange(len(data) + 1)
        kind = generator.randrange(5)
        if kind == 0 and data:
            data[place % len(data)] = generator.randrange(256)
        elif kind == 1:
            data[place:place] = generator.choice(targets.WORDS)
        elif kind == 2:
            del data[place : place + generator.randrange(1, 20)]
        elif kind == 3:
            other = generator.choice(examples)
            start = generator.randrange(len(other) + 1)
            data[place:place] = other[start : start + generator.randrange(1, 40)]
        elif data:
            data[place % len(data)] ^= 1 << generator.randrange(8)
    return bytes(data[:65536])


if __name__ == "__main__":
    sys.exit(main())
