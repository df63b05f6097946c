"""Files of a model folder that hold no weights and go along with every model made from it."""

from __future__ import annotations

import shutil
from pathlib import Path

SIDE_FILES = (
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
    *("chat_template.json", "chat_template.jinja", "additional_chat_templates/*.jinja"),
    *("LICENSE*", "NOTICE*", "USE_POLICY.md"),
)
"""How a multimodal model takes images, how a chat is written, and the terms of use: needed beside the weights."""


def copy_side_files(origin: str | Path | None, folder: Path) -> None:
    """Copies of a folder's side files, where the new folder has none of that name yet.

    Args:
        origin: the folder of the model that this one was made from; anything else is passed over.
    """
    if not origin or not Path(origin).is_dir():
        return
    for pattern in SIDE_FILES:
        for file in sorted(Path(origin).glob(pattern)):
            copy = folder / file.relative_to(origin)
            if file.is_file() and not copy.exists():
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)
