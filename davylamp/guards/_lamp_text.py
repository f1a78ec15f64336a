"""What `lamp` reads: a text with its disguises taken off, and that text as hashed features, by numpy alone.

Disguises: capitals, zero-width and other format characters, full-width forms, stacked accents, letters of another alphabet that look
Latin, l e t t e r s  set apart, digits for letters (only where a known word comes out). Source: this repository.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from davylamp.core import Message
from davylamp.guards._lamp_own import FOLDER

if TYPE_CHECKING:
    from numpy.typing import NDArray

LOOKALIKE = str.maketrans(
    "авеёкмнорстухіїјѕԁԛԝһӏьԍзαβεηικμνορτυχγωϲⅼ",
    "abeekmhopctyxiijsdqwhlbg3abenikuvoptuxywcl",
)
FOREIGN = re.compile(r"[\u0370-\u03ff\u0400-\u052f]")
LATIN = re.compile(r"[a-z]")
HAN = re.compile(r"[\u3400-\u9fff]")
MIXED = re.compile(r"[a-z\u0370-\u03ff\u0400-\u052f]+")
SPACED = re.compile(r"(?<!\w)(?:[^\W_](?: {1,6}|[._*\-/|])){3,}[^\W_](?!\w)")
WIDE = re.compile(r" {2,}")  # between letters set apart, where a word ends
GAP = re.compile(r"[ ._*\-/|]")
LEET = re.compile(r"\b(?=[a-z@$0134578]*[a-z])(?=[a-z@$0134578]*[@$0134578])[a-z@$0134578]{2,}\b")
LEETS = ("@4310$57", "aaeiosst")  # 8 stays: it is b as often as eight
BESIDE = re.compile(r"[@$0134578](?:(?=[a-z])|(?<=[a-z].))")  # what a word for LEET must hold
STRETCHED = re.compile(r"([a-z])\1{2,}")
TRIPLES = tuple(3 * letter for letter in "abcdefghijklmnopqrstuvwxyz")
WORD = re.compile(r"[^\W_]+")

POINTERS = frozenset(
    "it its one ones that this these those them they their him his her hers he she there same some so more else any".split()  # noqa: SIM905
)
SHORT = 14  # words of a message that may lean on the one before it

BITS = 16
BUCKETS = 1 << BITS
PRIME = np.uint64(0x9E3779B97F4A7C15)  # odd, so that it has an inverse modulo 2**64
LONGEST = 1024  # characters of which features are made at a time
WINDOW = 400  # characters of a window of the hashed head: those of a window of the gateway
OVERLAP = 100
GRAMS = (3, 4, 5)
REACH = 4  # words apart that a pair may be
_SIDES = tuple(np.uint64(x) for x in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0xD6E8FEB86659FD93, 0xA0761D6478BD642F))


def _powers() -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    inverse = np.uint64(pow(int(PRIME), -1, 1 << 64))
    with np.errstate(over="ignore"):
        up = np.cumprod(np.full(LONGEST + 8, PRIME, dtype=np.uint64), dtype=np.uint64)
        down = np.cumprod(np.full(LONGEST + 8, inverse, dtype=np.uint64), dtype=np.uint64)
    return up, down


UP, DOWN = _powers()


@cache
def vocabulary() -> frozenset[str]:
    """The words of the own templates: what a run of single letters may be cut into, and what digits may spell."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.txt"))).casefold()
    return frozenset(word for word in WORD.findall(text) if word.isascii() and (len(word) > 2 or word in COMMON))


COMMON = frozenset("a i am an as at be by do go he how if in is it me my no of on or so to up us we you".split())  # noqa: SIM905


def normalise(text: str) -> str:
    """The text as both heads read it.

    >>> normalise("H\u200bow to K1LL a pr\u043ecess"), normalise("k i l l  m y  b o s s")
    ('how to kill a process', 'kill my boss')
    """
    if not text.isascii():
        text = unicodedata.normalize("NFKD", text)
        text = "".join(c for c in text if not ("\u0300" <= c <= "\u036f" or unicodedata.category(c) in _UNSEEN))
        text = unicodedata.normalize("NFKC", text).casefold()
        if FOREIGN.search(text):
            text = _latin(text)
    else:
        text = text.lower()
    # Most texts have none of what follows. What tells so is cheaper than the expressions themselves.
    if not text.isascii() or [*map(len, text.translate(BLANK).split())].count(1) > 3:
        text = SPACED.sub(_joined, text)
    if BESIDE.search(text):
        text = LEET.sub(_spelt, text)
    for triple in TRIPLES:
        if triple in text:
            return STRETCHED.sub(r"\1\1", text)
    return text


_kept = lru_cache(256)(normalise)  # a request is read when it comes and again with each window of its reply
KEPT_LENGTH = 2000  # characters up to which it is remembered


class Reading(NamedTuple):
    """What is judged: a text, and what was said before it where that is part of its meaning."""

    text: str
    context: str = ""


def reading(messages: Sequence[Message]) -> Reading:
    """The last message, normalised; before a reply its request, before a message that points back ("how do I make one?") the last that
    does not.

    >>> reading([Message("user", "Bees?"), Message("assistant", "Yes?"), Message("user", "How do I keep THEM?")])
    Reading(text='how do i keep them?', context='bees?')
    """
    last = messages[-1]
    text = _read_once(last.text) if last.role == "user" else normalise(last.text)
    asked = [message.text for message in messages[:-1] if message.role == "user" and message.text.strip()]
    if not asked or (last.role != "assistant" and not points_back(text)):
        return Reading(text)
    if last.role == "assistant":
        return Reading(text, _read_once(asked[-1]))
    earlier = [_read_once(said) for said in asked[-4:]]
    return Reading(text, next((said for said in reversed(earlier) if not points_back(said)), earlier[-1]))


def _read_once(said: str) -> str:
    return normalise(said) if len(said) > KEPT_LENGTH else _kept(said)


def points_back(text: str) -> bool:
    """Whether a message leans on what was said before: three words or fewer, or a short one with a word such as `it` or `one`.

    >>> points_back("how do i make one?"), points_back("how do i make a cake?")
    (True, False)
    """
    words = WORD.findall(text)
    return len(words) <= 3 or (len(words) <= SHORT and not POINTERS.isdisjoint(words))


_UNSEEN = frozenset(("Cf", "Cs"))  # format characters and lone surrogates


def _latin(text: str) -> str:
    """Lookalikes become Latin: everywhere in a text that is mostly Latin, else only in words that mix alphabets."""
    if len(LATIN.findall(text)) > len(FOREIGN.findall(text)):
        return text.translate(LOOKALIKE)
    return MIXED.sub(lambda m: m[0].translate(LOOKALIKE) if LATIN.search(m[0]) and FOREIGN.search(m[0]) else m[0], text)


def _joined(found: re.Match[str]) -> str:
    return " ".join(segment(GAP.sub("", part)) for part in WIDE.split(found[0]))


def segment(run: str) -> str:
    """A run of letters cut into known words with as few letters left over as can be; the run itself if that covers little of it.

    >>> segment("howtokillaperson")
    'how to kill a person'
    """
    if run in vocabulary() or len(run) > 200:
        return run
    best: list[tuple[float, int]] = [(0.0, 0)]  # (cost of the first i letters, where their last word starts)
    for end in range(1, len(run) + 1):
        options = [(best[end - 1][0] + 4.0, end - 1)]
        options += [
            (best[start][0] + 1.0, start) for start in range(max(0, end - 16), end) if run[start:end] in vocabulary()
        ]
        best.append(min(options))
    if best[-1][0] > 0.8 * len(run):
        return run
    words, end = [], len(run)
    while end:
        start = best[end][1]
        words.append(run[start:end])
        end = start
    return " ".join(reversed(words))


def _spelt(found: re.Match[str]) -> str:
    word = found[0].translate(str.maketrans(*LEETS))
    return word if word in vocabulary() else found[0].replace("1", "l") if _l(found[0]) else found[0]


def _l(word: str) -> bool:
    return word.replace("1", "l") in vocabulary()


def latin(text: str) -> bool:
    """Whether at least half of the letters of a normalised text are Latin: only such texts does the encoder read."""
    return text.isascii() or 2 * len(LATIN.findall(text)) >= sum(map(str.isalpha, text))


def readable(text: str) -> bool:
    """Whether a normalised text is mostly in a script of which lamp knows anything: Latin or Chinese."""
    return latin(text) or 2 * len(HAN.findall(text)) >= sum(map(str.isalpha, text))


def windows(text: str) -> list[str]:
    """Overlapping pieces of a long text, cut between words where there is a space near; a short text is one piece."""
    if len(text) <= WINDOW:
        return [text]
    out, start = [], 0
    while start < len(text):
        end = min(len(text), start + WINDOW)
        if end < len(text) and (space := text.rfind(" ", end - 24, end)) > start:
            end = space
        out.append(text[start:end])
        if end == len(text):
            break
        start = max(start + 1, end - OVERLAP)
    return out


def features(text: str, *, context: bool = False) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Buckets of the hashed features of a normalised text of at most 1,024 characters: those of words and those of characters.

    context: what was said before the text; its features fall into other buckets than those of the text itself.

    Words: each, neighbours in order, pairs up to four apart in either order. Characters: 3- to 5-grams over words and the spaces between
    them; also single characters and pairs in scripts written without spaces. One entry for each occurrence. A gram's hash is a polynomial
    over code points modulo 2**64, taken from prefix sums.
    """
    keys, n = buckets(text, context=context)
    return keys[:n], keys[n:]


def buckets(text: str, *, context: bool = False, grams: bool = True) -> tuple[NDArray[np.intp], int]:
    """All features of a text in one array, those of words first, and how many these are. grams: with those of characters.

    A gateway pays this for each message, so that calls of numpy are few: where grams and pairs lie was written down once, in the order of
    their ends, and a text of any length reads the first part of these lists.
    """
    text = text[:LONGEST]
    words = text.translate(BLANK).split() if (plain := text.isascii()) else WORD.findall(text)
    if not words:
        return _NONE, 0
    line = f" {' '.join(words)} "[:LONGEST]
    codes = (
        np.frombuffer(line.encode("ascii"), dtype=np.uint8)
        if plain
        else np.frombuffer(line.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    )
    n = codes.size
    prefix = np.empty(n + 1, dtype=np.uint64)
    prefix[0] = 0
    np.multiply(codes, UP[:n], out=prefix[1:])
    np.add.accumulate(prefix[1:], out=prefix[1:])
    spaces = (codes == 32).nonzero()[0]
    start = spaces[:-1] + 1
    w, wide = start.size, _NONE
    pairs = NEAR.size_of(w - 1) if w else 0
    found = GRAM.size_of(n) if grams else 0
    if grams and not plain:
        wide = np.flatnonzero(codes[:-1] >= 0x0E00)  # Thai and what comes after it in the code charts
    here = max(0, 2 * w - 1) + pairs
    keys = np.empty(here + found + 2 * wide.size, dtype=np.uint64)
    word = keys[:w]
    np.subtract(prefix.take(spaces[1:]), prefix.take(start), out=word)
    word *= DOWN.take(start)
    word *= _SIDES[0]
    if w > 1:
        np.add(word[:-1] * _SIDES[1], word[1:] * _SIDES[2], out=keys[w : 2 * w - 1])
        near = keys[2 * w - 1 : here]
        np.add(word.take(NEAR.start[:pairs]), word.take(NEAR.end[:pairs]), out=near)
        near *= _SIDES[3]
    if found:
        part = keys[here : here + found]
        np.subtract(prefix.take(GRAM.end[:found]), prefix.take(GRAM.start[:found]), out=part)
        part *= GRAM.down[:found]
        part += GRAM.size[:found]
    if wide.size:
        one, two = keys[here + found : here + found + wide.size], keys[here + found + wide.size :]
        np.multiply(codes[wide], PRIME, out=one)
        np.subtract(prefix.take(wide + 2), prefix.take(wide), out=two)
        two *= DOWN.take(wide)
        two += np.uint64(2)
    if context:
        keys *= _SIDES[1]
    keys ^= keys >> MIX
    keys *= _SIDES[0]
    keys >>= CUT
    return keys.view(np.intp), here


class _Spans:
    """Spans of given lengths over positions 0 to `most`, in the order of their ends: those of a shorter row are the first ones.

    down: the power of the inverse prime at each start.  size: the span's length.
    """

    def __init__(self, lengths: tuple[int, ...], most: int):
        every = [(end - length, end) for end in range(most + 1) for length in lengths if length <= end]
        self._sizes = [sum(max(0, last + 1 - length) for length in lengths) for last in range(most + 1)]
        self.start = np.array([start for start, _ in every], dtype=np.intp)
        self.end = np.array([end for _, end in every], dtype=np.intp)
        self.down, self.size = DOWN[self.start], (self.end - self.start).astype(np.uint64)

    def size_of(self, last: int) -> int:
        """How many of them end at `last` or before."""
        return self._sizes[last]


_NONE = np.empty(0, dtype=np.intp)
MIX, CUT = np.uint64(29), np.uint64(64 - BITS)  # a key is mixed and cut down to BITS bits
BLANK = str.maketrans({code: " " for code in range(128) if not chr(code).isalnum()})
GRAM = _Spans(GRAMS, LONGEST)
NEAR = _Spans(tuple(range(1, REACH + 1)), LONGEST // 2)
