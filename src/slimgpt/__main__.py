"""``slimgpt`` and ``python -m slimgpt``."""

from __future__ import annotations

import logging
import os
import signal


def main() -> None:
    """Entry point of the ``slimgpt`` command: Ctrl-C ends it quietly while the imports below go on, too."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)  # until a command begins, which has files to clear away
    # Bars of libraries beside ours; those of downloads from the hub are not meant by it.
    os.environ.setdefault("TQDM_DISABLE", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it, and it misses a kernel
    from slimgpt.cli import main as run

    run()


def _leave(*_: object) -> None:
    os.write(2, b"interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    main()
