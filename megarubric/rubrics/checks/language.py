"""Language detection: langdetect with its own factory and a fixed seed, so one text always gets one answer."""

from __future__ import annotations

import functools
import threading
from pathlib import Path
from typing import Any

# langdetect's profiles, and "zh" for either Chinese script.
_CODES = """
    af ar bg bn ca cs cy da de el en es et fa fi fr gu he hi hr hu id it ja kn ko lt lv mk ml mr ne nl no pa pl pt ro
    ru sk sl so sq sv sw ta te th tl tr uk ur vi zh zh-cn zh-tw
"""
LANGUAGES = frozenset(_CODES.split())
SEED = 0
MAX_CHARACTERS = 40_000  # langdetect itself reads 10,000, after it has taken out addresses
_LOCK = threading.Lock()  # loading profiles is not safe for threads


@functools.cache
def _factory() -> Any:
    import langdetect
    from langdetect.detector_factory import DetectorFactory

    factory = DetectorFactory()
    profiles = sorted((Path(langdetect.__file__).parent / "profiles").iterdir())  # ties go by order
    factory.load_json_profile([p.read_text(encoding="utf-8") for p in profiles if p.is_file()])
    factory.seed = SEED  # on the instance: other users of langdetect keep their own
    return factory


def detect(text: str) -> str | None:
    """ISO 639-1 code of the language of `text` (`zh-cn` and `zh-tw` for Chinese), or None when there is nothing to
    tell it by (no letters)."""
    from langdetect.lang_detect_exception import LangDetectException

    with _LOCK:
        detector = _factory().create()
    try:
        detector.append(text[:MAX_CHARACTERS])
        found: str = detector.detect()
    except LangDetectException:
        return None
    return found
