"""What a reader sees of a text: characters without a glyph are dropped, look-alikes folded.

A judge model reads every code point; a person does not. Hidden characters carry instructions past the reader (tag
characters), break up words that a detector looks for (zero width, soft hyphen), or reverse what is displayed (bidi
controls). Prompts are rendered from `visible` text, so a judge and a person judge the same thing.
"""

from __future__ import annotations

import re
import unicodedata

# Blank letters: they count as letters and look like space.
_BLANKS = "\u115f\u1160\u3164\uffa0\u2800"
# Format controls, soft hyphen, grapheme joiner, Mongolian separator, bidi embeddings and isolates, invisible operators,
# tag characters, supplementary variation selectors.
_HIDDEN = (
    "\u00ad\u034f\u061c\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\U0001d173-\U0001d17a\U000e0000-\U000e007f\U000e0100-\U000e01ef"
)
_INVISIBLE = re.compile(f"[{_HIDDEN}{_BLANKS}]")
# Where such characters do real work they stay: joiners in Arabic and Indic scripts and between emoji, direction marks
# next to right-to-left letters, the tag sequences of regional flags.
_JOINED = re.compile(
    "(?<=[\u0600-\u08ff\u0900-\u0dff\u1000-\u109f\u1780-\u17ff\u2600-\u27bf\ufe0f\U0001f000-\U0001faff])[\u200c\u200d]"
    "(?=[\u0600-\u08ff\u0900-\u0dff\u1000-\u109f\u1780-\u17ff\u2600-\u27bf\U0001f000-\U0001faff])"
)
_DIRECTED = re.compile("(?<=[\u0590-\u08ff])[\u200e\u200f\u061c]|[\u200e\u200f\u061c](?=[\u0590-\u08ff])")
_FLAG = re.compile("\U0001f3f4[\U000e0020-\U000e007e]{1,6}\U000e007f")
_KEPT = re.compile("|".join(p.pattern for p in (_FLAG, _JOINED, _DIRECTED)))

# Letters of other scripts that look like Latin ones, as NFKC leaves them.
_LOOKALIKE = str.maketrans(
    "аАвВеЕкКмМНоОрРсСтТуУхХіІјЈѕЅԁһԛԝьЬ" + "αΑΒεΕΖΗιΙΚΜνΝοΟρΡτΤυΥΧ",
    "aABBeEkKMMHoOpPcCtTyYxXiIjJsSdhqwbb" + "aABeEZHiIKMvNoOpPtTuYX",
)
_WORD = re.compile(r"[^\W\d_]+")
_LATIN = re.compile("[A-Za-z]")
_NOT_LATIN = re.compile("[\u0370-\u03ff\u0400-\u052f]")


def visible(text: str) -> str:
    """`text` without the characters that no reader sees; blank letters become spaces."""
    if text.isascii():
        return text
    kept = [(m.start(), m.end()) for m in _KEPT.finditer(text)]
    out, last = [], 0
    for start, end in [*kept, (len(text), len(text))]:
        out.append(_INVISIBLE.sub(lambda m: " " if m[0] in _BLANKS else "", text[last:start]))
        out.append(text[start:end])
        last = end
    return "".join(out)


def mixed_script_words(text: str) -> list[str]:
    """Words that mix Latin letters with look-alikes of another script, as no language does."""
    return [
        word
        for word in _WORD.findall(unicodedata.normalize("NFKC", text))
        if _LATIN.search(word)
        and (others := _NOT_LATIN.findall(word))
        and len(word) > 2
        and all(ord(letter) in _LOOKALIKE for letter in others)
    ]


def folded(text: str) -> str:
    """`text` as it looks, in plain letters: visible, NFKC, no overlaid marks, look-alikes in mixed words made Latin."""
    text = unicodedata.normalize("NFKC", visible(text))
    text = re.sub("[\u0334-\u0338\u0305\u0332]", "", text)
    for word in set(mixed_script_words(text)):
        text = text.replace(word, word.translate(_LOOKALIKE))
    return text
