"""Text as the checks see it: words, sentences, paragraphs, and a form of text in which disguises have fallen off.

Sentences. IFEval counts them with NLTK's trained Punkt model, whose data needs a download. The splitter here is rules:
a run of . ! ? (or their CJK forms) ends a sentence when white space or the end follows, unless a single point stands
after an abbreviation or an initial. As with Punkt, "2." at the head of a list item is a sentence. It differs from Punkt
after abbreviations that Punkt learned or did not learn ("No. 9", "i.e. <title>") and after some list numbers, where
Punkt goes by how often it has seen the next word in lower case; and it knows Chinese and Japanese marks.
"""

from __future__ import annotations

import functools
import re
import unicodedata

WORD = re.compile(r"\w+")

_TERMINATOR = re.compile(r"(?<![.!?])([.!?]+|[。！？]+)([\"'”’»)\]*_]*)(?=\s|$)|[。！？]+[”’」』）]*", re.MULTILINE)
_ALWAYS_SHORT = """
    mr mrs ms dr prof st rev hon capt cpt col gen lt maj sgt gov sen rep pres messrs mme mlle
    e.g i.e cf vs viz approx fig figs nos vol vols ch sec pp ed eds ibid ca dept univ assn mt ft ave blvd rd
    jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thur thurs fri sat sun
"""
# These often end a sentence as well; a capital letter after them starts a new one.
_OFTEN_LAST = "etc inc ltd co corp jr sr al bros est a.m p.m u.s u.k u.n d.c ph.d m.d b.a m.a b.c a.d"
_ABBREVIATIONS = frozenset(_ALWAYS_SHORT.split())
_MAY_END = frozenset(_OFTEN_LAST.split())
_LAST_TOKEN = re.compile(r"\S+\Z")


def count_words(text: str) -> int:
    """Runs of word characters, as IFEval counts them. Text without spaces (Chinese) is one word a run: use characters
    there (`length_constraints:number_characters`)."""
    return len(WORD.findall(text))


def sentences(text: str) -> list[str]:
    """The sentences of a text, stripped, none empty."""
    out: list[str] = []
    start = 0
    for match in _TERMINATOR.finditer(text):
        if match.start() < start or not _ends_sentence(text, start, match):
            continue
        piece = text[start : match.end()].strip()
        if piece:
            out.append(piece)
        start = match.end()
    rest = text[start:].strip()
    if rest:
        out.append(rest)
    return out


def _ends_sentence(text: str, start: int, match: re.Match[str]) -> bool:
    mark = match[1] or ""
    if not mark.startswith(".") or match[0][0] in "。！？":
        return True
    following = text[match.end() : match.end() + 40].lstrip()
    if not following:
        return True
    if len(mark) > 1:  # an ellipsis goes on before a lower-case letter
        return not following[0].islower()
    token_match = _LAST_TOKEN.search(text, max(start, match.start() - 40), match.start())
    token = token_match[0].lstrip("\"'“‘(«[*_") if token_match else ""
    name = token.lower()
    if name in _MAY_END:
        return following[0].isupper()
    if token.isdigit():  # "1. Do not" is an item, "(1. do not" goes on
        return not following[0].islower()
    if name == "no":  # "No. 9", but "He said no. We left."
        return not following[0].isdigit()
    # a single capital is an initial ("J. Austen")
    return not (name in _ABBREVIATIONS or (len(token) == 1 and token.isupper() and token != "I"))


# --- words as the Penn Treebank has them ------------------------------------------------------------------------------

_APART = re.compile(
    r"""\.{2,}|--|[\u2012-\u2015]|[;@#$%&?!*"“”«»„‘’\[\](){}<>]|[:,](?!\d)|`+|(?<=[^'\s])'(?=\s|\Z)"""
    r"""|(?<!\w)'(?!(?:re|ve|ll|m|t|s|d|n)\b)(?=\w)|(?<=[^.\s])\.(?=["')\]]*(?:\s|\Z))""",
    re.IGNORECASE,
)
_CLITIC = re.compile(r"(?i)(?<=[^'\s])(n't|'(?:s|m|d|ll|re|ve))\Z")
_JOINED = re.compile(
    r"(?i)\A(?:(can)(not)|(gim)(me)|(gon)(na)|(got)(ta)|(lem)(me)|(wan)(na)|('t)(is)|('t)(was)|(d)('ye))\Z"
)


def treebank_words(text: str) -> list[str]:
    """Words and signs as NLTK's word tokenizer splits them, near enough to count capital words as IFEval does:
    contractions are two words, hyphenated and slashed words one, "A,B" three."""
    out: list[str] = []
    for token in _APART.sub(lambda m: f" {m[0]} ", text).split():
        if joined := _JOINED.match(token):
            out += [part for part in joined.groups() if part]
        elif clitic := _CLITIC.search(token):
            out += [token[: clitic.start()], clitic[0]]
        else:
            out.append(token)
    return out


# --- text without disguises -------------------------------------------------------------------------------------------

# Letters of other scripts that look like Latin ones, after case folding and compatibility decomposition.
_CONFUSABLE = str.maketrans(
    {
        **dict(zip("аеорсухіјѕһԁԛԝьѵгкмнтвзпч", "aeopcyxijshdqwbvrkmhtb3nu")),  # Cyrillic
        **dict(zip("αβγδεικνορτυχωηκμ", "abydeiknoptuxwnku")),  # Greek
        **dict(zip("ɑɡıłøđħŋƅɩʟʀɪɴʏʜɢʙᴀᴄᴅᴇᴊᴋᴍᴏᴘꜱᴛᴜᴠᴡᴢ", "agilodhnbilrinyhgbacdejkmopstuvwz")),  # Latin extensions
        **dict.fromkeys("“”„«»″＂", '"'),
        **dict.fromkeys("‘’‚´′ʼ＇", "'"),
        **dict.fromkeys("‐‑‒–—―−", "-"),
        "…": "...",
    }
)
_LEET = str.maketrans("013457@$", "oieastas")
_LEET_TOKEN = re.compile(r"[a-z0-9@$]*[a-z][a-z0-9@$]*")
_SPACED_LETTERS = re.compile(r"(?<!\w)\w(?:[ .·_-]\w(?!\w)){3,}")
_TAG = re.compile(r"</?[a-z][a-z0-9]{0,15}(?: [^<>\n]{0,60})?/?>", re.IGNORECASE)
_MARKUP = re.compile(r"[*_~`#|\\]+")
_INVISIBLE = ("Cf", "Mn", "Me", "Cc", "Co")


@functools.lru_cache(256)  # several detectors look at one response
def undisguised(text: str, limit: int = 100_000) -> str:
    """The first `limit` characters as a reader hears them: lower case; no zero-width or combining characters, markup,
    look-alike letters of other scripts, digits for letters, or l e t t e r s s p a c e d out; plain quotes and dashes.

    Lines stay lines, blank ones go, other white space is single spaces. For matching only.
    """
    text = unicodedata.normalize("NFKD", text[:limit])
    text = "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in _INVISIBLE)
    text = unicodedata.normalize("NFKC", text).casefold().translate(_CONFUSABLE)
    text = _MARKUP.sub("", _TAG.sub("", text))
    text = _SPACED_LETTERS.sub(lambda m: re.sub(r"[ .·_-]", "", m[0]), text)
    text = _LEET_TOKEN.sub(lambda m: m[0] if m[0].isalpha() else m[0].translate(_LEET), text)
    lines = (" ".join(line.split()) for line in text.split("\n"))
    return "\n".join(line for line in lines if line)
