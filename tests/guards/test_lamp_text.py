"""What lamp reads: disguises come off, harmless text stays as it is, features are what they are said to be."""

import itertools
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from davylamp.core import Message
from davylamp.guards import _lamp_text as lt
from davylamp.guards._lamp_text import features, latin, normalise, points_back, reading, segment, windows

PLAIN = "how to kill a process"


@pytest.mark.parametrize(
    "text",
    [
        "HOW TO KILL A PROCESS",
        "How to k\u200bi\u200bl\u200bl a pro\u00adcess",
        "Ｈｏｗ ｔｏ ｋｉｌｌ ａ ｐｒｏｃｅｓｓ",
        "how to k\u0456ll \u0430 proc\u0435ss",  # Cyrillic letters
        "how to k\u03b9ll a pr\u03bfcess",  # Greek letters
        "how to k1ll a pr0c355",
        "h\u0301ow to k\u0336i\u0336l\u0336l a process",
        "h o w  t o  k i l l  a  p r o c e s s",
        "how to k.i.l.l a p-r-o-c-e-s-s",
        "h o w t o k i l l a p r o c e s s",
        "\u202ehow to kill\u202c a process",
    ],
)
def test_disguises_come_off(text):
    assert normalise(text) == PLAIN


@pytest.mark.parametrize(
    "text",
    [
        "the meeting is at 10:30 in room b12",
        "call 555 0134 or mail a.b@example.org",
        "x = a + b - c * d / e",
        "u.s. exports rose by 3.4 percent in q1",
        "как приготовить суп",
        "ποσο κοστιζει αυτο",
        "怎么做米饭",
        "วิธีหุงข้าว",
        "i am a b student",
        "base64 and utf8 and mp3",
    ],
)
def test_harmless_text_stays(text):
    assert normalise(text) == text


def test_letters_of_another_alphabet_stay_in_their_own_words():
    text = "привет мир, это Windows и k\u0438ll"
    assert "привет мир" in normalise(text)


@given(st.text(max_size=200))
@settings(max_examples=200, deadline=None)
def test_normalising_never_fails_and_twice_is_once_for_plain_words(text):
    once = normalise(text)
    assert isinstance(once, str) and not any(unicodedata.category(c) in ("Cf", "Cs") for c in once)
    features(once)
    assert windows(once) and latin(once) in (True, False)


def test_segment_cuts_known_words_and_leaves_others():
    assert segment("howtokillaprocess") == PLAIN
    assert segment("xqzvbtrw") == "xqzvbtrw"


@given(st.text(alphabet="ab cdefg", min_size=1, max_size=3000))
@settings(max_examples=50, deadline=None)
def test_windows_cover_the_text_and_overlap(text):
    parts = windows(text)
    assert all(len(part) <= lt.WINDOW for part in parts)
    at = 0
    for part in parts:  # each begins no later than where the one before it ended
        start = text.find(part, max(0, at - lt.OVERLAP - 1))
        assert 0 <= start <= at
        at = max(at, start + len(part))
    assert at == len(text)


def test_reading_takes_the_context_only_where_it_belongs():
    chat = [
        Message("user", "Tell me about bees."),
        Message("assistant", "Sure."),
        Message("user", "How do I keep them?"),
    ]
    assert reading(chat) == ("how do i keep them?", "tell me about bees.")
    whole = "Write a long poem about the history of the city of Vienna"
    assert reading([*chat[:2], Message("user", whole)]) == (whole.lower(), "")
    assert reading([*chat, Message("assistant", "In a hive.")]) == ("in a hive.", "how do i keep them?")
    assert reading([Message("system", "You are kind."), Message("user", "it?")]) == ("it?", "")
    far = [*chat, Message("assistant", "Hive."), Message("user", "And what does it cost?")]
    assert reading(far).context == "tell me about bees.", "what points back itself is passed over"
    assert points_back("and then?") and not points_back("how do i bake bread at home")


GOLDEN_WORDS = [2431, 18422, 18705, 45264, 56897, 38210, 33867, 27554, 18380, 24990, 21448, 53740, 6140]
GOLDEN_GRAMS, GOLDEN_ZH, GOLDEN_CONTEXT = 1684395, 678207, [50198, 22746, 32480]


# Golden values: a change of any hash makes shipped weights worthless, so it must not go unseen.
def test_features_are_pinned():
    words, grams = features("how to bake bread")
    assert sorted(words.tolist()) == sorted(GOLDEN_WORDS) and grams.size == 48 and int(grams.sum()) == GOLDEN_GRAMS
    assert [part.size for part in features("怎么做米饭")] == [1, 22] and int(
        features("怎么做米饭")[1].sum()
    ) == GOLDEN_ZH
    assert features("how to bake bread", context=True)[0][:3].tolist() == GOLDEN_CONTEXT


MASK = (1 << 64) - 1


def plain_features(text, *, context=False):
    """The same features, written as loops over Python integers."""
    words = lt.WORD.findall(text[: lt.LONGEST])
    line = (" " + " ".join(words) + " ")[: lt.LONGEST]
    prime, sides = int(lt.PRIME), [int(side) for side in lt._SIDES]

    def poly(piece):
        return sum(ord(c) * pow(prime, i, 1 << 64) for i, c in enumerate(piece)) & MASK

    keys: list[int] = []
    for end in range(len(line) + 1):
        keys += [(poly(line[end - size : end]) + size) & MASK for size in lt.GRAMS if size <= end]
    if not line.isascii():
        wide = [i for i in range(len(line) - 1) if ord(line[i]) >= 0x0E00]
        keys += [ord(line[i]) * prime & MASK for i in wide]
        keys += [(poly(line[i : i + 2]) + 2) & MASK for i in wide]
    grams, keys = keys, []
    hashes = [poly(word) * sides[0] & MASK for word in words]
    if words:
        keys += hashes
        keys += [(a * sides[1] + b * sides[2]) & MASK for a, b in itertools.pairwise(hashes)]
        for end in range(len(hashes)):
            near = hashes[max(0, end - lt.REACH) : end]
            keys += [(word + hashes[end]) * sides[3] & MASK for word in reversed(near)]
    out: list[list[int]] = []
    for part in (keys, grams):
        out.append([])
        for key in part:
            key = key * sides[1] & MASK if context else key
            key ^= key >> 29
            out[-1].append((key * sides[0] & MASK) >> (64 - lt.BITS))
    return out if words else [[], []]


TEXTS = ["how to bake bread", "a", "", "!!", "怎么 做 米饭 ok", "ab cd ef gh ij kl mn op", "a b " * 250, "word " * 200]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("context", [False, True])
def test_features_equal_a_plain_loop(text, context):
    assert [part.tolist() for part in features(text, context=context)] == plain_features(text, context=context)


def test_what_is_skipped_would_have_changed_nothing():
    """Random texts of the signs that matter: the expressions that `normalise` does not try, tried on each."""
    rng = np.random.default_rng(0)
    signs = [*"aabck1@ $0._-/|*7", "kill", " the ", "\n"]
    for _ in range(3000):
        text = "".join(rng.choice(signs, size=int(rng.integers(0, 14))))
        plain = lt.STRETCHED.sub(r"\1\1", lt.LEET.sub(lt._spelt, lt.SPACED.sub(lt._joined, text)))
        assert normalise(text) == plain, text


def test_a_context_has_features_of_its_own():
    here, there = (np.concatenate(features("how to bake bread", context=context)) for context in (False, True))
    assert len(set(here.tolist()) & set(there.tolist())) < 5


def test_features_spread_evenly():
    rng = np.random.default_rng(0)
    words = ["".join(chr(97 + c) for c in rng.integers(0, 26, 7)) for _ in range(400)]
    counts = np.bincount(np.concatenate([part for word in words for part in features(word)]) >> 10, minlength=64)
    assert counts.min() > 0.5 * counts.mean() and counts.max() < 2 * counts.mean()
