"""Judge models behind `megarubric.judging.types.TierBackend`: a vLLM engine, an OpenAI-compatible URL, replay."""
