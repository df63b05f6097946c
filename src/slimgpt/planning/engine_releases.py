"""Releases of engines and tools, and the transformers that each needs: an environment has one transformers."""

from __future__ import annotations

from dataclasses import dataclass

BY_LAYER = ">=5.14"
"""The transformers that read ``per_layer_config``, in which widths by layer are stored."""


@dataclass(frozen=True)
class EngineRelease:
    """One release, as its package says on PyPI.

    Args:
        engine: as ``--for`` names it; empty for what ``--for`` does not name.
        release: name and version.
        transformers: the releases of transformers that it admits, as a version specifier of PEP 440.
        by_layer: whether it takes a folder whose layers differ in width; else an export, or equal layers.
    """

    engine: str
    release: str
    transformers: str
    by_layer: bool

    def __str__(self) -> str:
        return f"{self.release} needs transformers {self.transformers}"


RELEASES = (
    EngineRelease("vllm", "vLLM 0.32", ">=5.16.1,<5.20", True),
    EngineRelease("vllm", "vLLM 0.33", ">=5.16.1,<5.21", True),
    EngineRelease("sglang", "SGLang 0.5.23", "==5.19.0", False),
    EngineRelease("mlx", "mlx-lm 0.32.2", ">=5.7", False),
    EngineRelease("", "llm-compressor 0.14", ">=5.15,<=5.17", True),
    EngineRelease("", "nvidia-modelopt 0.47", "<5.15", True),
)
"""The newest ones that were looked up (November 2026)."""


def releases_of(engine: str, by_layer: bool) -> tuple[str, ...]:
    """The lines on an engine of ``--for``, for a model of equal layers or of widths by layer."""
    own = (f"widths by layer need transformers {BY_LAYER}",) if engine == "hf" and by_layer else ()
    return own + tuple(str(each) for each in RELEASES if each.engine == engine)


def releases_for_folder(by_layer: bool) -> str:
    """The releases that take a slim folder as it is, on one line."""
    return "; ".join(str(each) for each in RELEASES if each.by_layer or not by_layer)
