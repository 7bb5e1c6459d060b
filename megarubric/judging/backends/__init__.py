"""Judge models behind `megarubric.judging.types.TierBackend`: a vLLM engine, an OpenAI-compatible URL."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from megarubric.errors import BadInput
from megarubric.judging.backends.engine import EngineBackend, TierEngine
from megarubric.judging.backends.openai import OpenAIBackend, OpenAISettings, first_model
from megarubric.judging.backends.pool import EnginePool

Dtype = Literal["float32", "bfloat16"]
_WHOLE_FILE = 256 << 20  # larger weight files are sampled
_SAMPLES, _SAMPLE_BYTES = 64, 64 << 10


def backend_for_engines(
    engines: Sequence[TierEngine],
    model_dir: str | Path,
    *,
    identity: str | Callable[[], str] | None = None,
    max_prompt_tokens: int | None = None,
    dtype: Dtype | None = None,
    timeout_s: float = 120.0,
) -> EngineBackend:
    """A judge on one or several engines that serve the same `model_dir`; the rest as in `backend_for_engine`.

    `timeout_s` is what the caller gives a call. Of several engines each has less than half of it for its part, so that
    there is time to ask another in the place of one that fails.
    """
    engine = engines[0] if len(engines) == 1 else EnginePool(engines, 0.45 * timeout_s)
    backend = backend_for_engine(engine, model_dir, identity=identity, max_prompt_tokens=max_prompt_tokens, dtype=dtype)
    backend.concurrency *= len(engines)  # so many more calls keep them all busy
    return backend


def backend_for_engine(
    engine: TierEngine,
    model_dir: str | Path,
    *,
    identity: str | Callable[[], str] | None = None,
    max_prompt_tokens: int | None = None,
    dtype: Dtype | None = None,
    schemas: bool = False,
) -> EngineBackend:
    """A judge on a running engine that serves `model_dir` in `dtype` (None: `serving_dtype`).

    `identity` is needed for an engine whose weights change (the policy as its own judge): a callable that names the
    weights it serves. `schemas` as in `EngineBackend`. Raises BadInput when the directory has no usable tokenizer.
    """
    directory = Path(model_dir)
    name = identity if identity is not None else model_identity(directory, dtype or serving_dtype(directory))
    return EngineBackend(engine, load_tokenizer(directory), name, max_prompt_tokens, schemas)


def model_identity(directory: Path, dtype: str) -> str:
    """What names a model directory in caches and calibrations: its own name, what is in it, and the precision it is
    served in, for rounding decides close calls. An empty `dtype` gives what the identities of all precisions begin
    with."""
    return f"model:{directory.resolve().name}@{fingerprint(directory)[:16]}:{dtype}"


def serving_dtype(directory: Path) -> Dtype:
    """The precision a judge is served in when nobody says otherwise: small models in float32, which a CPU is good at.

    Raises BadInput when the directory has no usable config.json.
    """
    return "float32" if _model_config(directory).get("hidden_size", 0) < 1024 else "bfloat16"


def context_length(directory: Path) -> int | None:
    """The tokens a model reads, None when it does not say. Raises BadInput as above."""
    length = _model_config(directory).get("max_position_embeddings")
    return length if isinstance(length, int) else None


def _model_config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    try:
        config = msgspec.json.decode(path.read_bytes())
    except OSError as error:
        raise BadInput(path, None, error.strerror or str(error)) from error
    except msgspec.DecodeError as error:
        raise BadInput(path, None, f"is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise BadInput(path, None, "is not a model configuration")
    return config


def backend_for_url(
    url: str,
    model: str | None = None,
    concurrency: int = 16,
    *,
    timeout_s: float = 120.0,
    max_requests: int = 0,
    max_total_tokens: int = 0,
) -> OpenAIBackend:
    """A judge behind an OpenAI-compatible `url`; without `model` the server's first one is taken. Raises BadInput.

    `timeout_s` is what the caller gives one question, retries and all; the budget is that of `OpenAISettings`.
    """
    return OpenAIBackend(
        OpenAISettings(
            url=url,
            model=model or first_model(url),
            concurrency=concurrency,
            timeout_s=min(60.0, timeout_s / 2),
            deadline_s=0.9 * timeout_s,
            max_requests=max_requests,
            max_tokens_total=max_total_tokens,
        )
    )


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
