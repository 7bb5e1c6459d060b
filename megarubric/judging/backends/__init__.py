"""Judge models behind `megarubric.judging.types.TierBackend`: a vLLM engine, an OpenAI-compatible URL, replay."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megarubric.errors import BadInput
from megarubric.judging.backends.engine import EngineBackend, TierEngine
from megarubric.judging.backends.openai import OpenAIBackend, OpenAISettings, first_model

_WHOLE_FILE = 256 << 20  # larger weight files are sampled
_SAMPLES, _SAMPLE_BYTES = 64, 64 << 10


def backend_for_engine(
    engine: TierEngine,
    model_dir: str | Path,
    *,
    identity: str | Callable[[], str] | None = None,
    max_prompt_tokens: int | None = None,
) -> EngineBackend:
    """A judge on a running engine that serves `model_dir`.

    `identity` is needed for an engine whose weights change (the policy as its own judge): a callable that names the
    version it serves. Raises BadInput when the directory has no usable tokenizer.
    """
    directory = Path(model_dir)
    name = identity if identity is not None else f"model:{directory.name}@{fingerprint(directory)[:16]}"
    return EngineBackend(engine, load_tokenizer(directory), name, max_prompt_tokens)


def backend_for_url(url: str, model: str | None = None, concurrency: int = 16) -> OpenAIBackend:
    """A judge behind an OpenAI-compatible `url`; without `model` the server's first one is taken. Raises BadInput."""
    return OpenAIBackend(OpenAISettings(url=url, model=model or first_model(url), concurrency=concurrency))


def load_tokenizer(directory: Path) -> Any:
    """The fast tokenizer of a Hugging Face directory. Raises BadInput."""
    from tokenizers import Tokenizer

    path = directory / "tokenizer.json"
    if path.is_file():
        try:
            return Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception on a bad file
            raise BadInput(path, None, f"cannot be read as a tokenizer: {error}") from error
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(directory))
    except (OSError, ValueError) as error:
        raise BadInput(directory, None, f"has no tokenizer that can be loaded: {error}") from error


def fingerprint(directory: Path) -> str:
    """SHA-256 hex digest that tells one model directory from another: its JSON files and weights.

    Weight files above 256 MiB are sampled at 64 even places (training moves nearly every weight), so a 60 GB model
    costs seconds, not minutes.
    """
    digest = hashlib.sha256()
    files = [p for p in directory.glob("*") if p.suffix in (".json", ".safetensors", ".model", ".txt", ".jinja")]
    if not files:
        raise BadInput(directory, None, "is not a Hugging Face model directory")
    for path in sorted(files):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as f:
            if size <= _WHOLE_FILE:
                digest.update(hashlib.file_digest(f, "sha256").digest())
                continue
            for i in range(_SAMPLES):
                f.seek((size - _SAMPLE_BYTES) * i // (_SAMPLES - 1))
                digest.update(f.read(_SAMPLE_BYTES))
    return digest.hexdigest()
