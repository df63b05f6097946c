"""A page in a real browser: what its scripts and network did, what it shows, and what it looks like."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


def browse(
    page: Path, folder: Path, *options: str, size: tuple[int, int] = (1100, 1400)
) -> subprocess.CompletedProcess:
    """Open a file in headless Chromium with a profile of its own."""
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}",
        f"--window-size={size[0]},{size[1]}", "--hide-scrollbars", "--enable-logging=stderr", "--v=0", *options,
        page.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
