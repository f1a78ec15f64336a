"""The filter of image-text rows: what it drops and why, what it counts, what stops it."""

import numpy as np
import pytest

pytest.importorskip("PIL")

from davylamp.core.errors import InputError
from davylamp.core.nouns import Case, Message
from davylamp.core.rows import Dropped
from davylamp.data.organism_rows import organism_rows
from davylamp.data.vl_safety_filter import vl_safety_filter
from davylamp.models.pictures import blank, data_url

GUARD = '''
from davylamp.core import Verdict, guard
@guard(version=1, source="test", licence="MIT", measures="unsafe", stage="data", threats=("harmful-compliance",))
def {name}():
    """{name}."""
    async def judge(messages, case=None):
        if any(m.media for m in messages) and any(m.text for m in messages):
            raise AssertionError("a guard of one kind was shown both")
        {body}
    return judge
'''


def drawn(what, n):
    return list(organism_rows((), rng=np.random.default_rng(0), what=what, n=n))


def shown(name, ref=None, text="<image> what is this ?"):
    return Case(name, (Message("user", text, media=(ref or blank(),)), Message("assistant", "red")))


def run(rows, **options):
    out = list(vl_safety_filter(rows, rng=np.random.default_rng(0), **options))
    assert len(out) == len(rows)  # no row is lost in silence
    return [c for c in out if isinstance(c, Case)], {c.case.id: c.reason for c in out if isinstance(c, Dropped)}


def test_in_the_organisms_world_harmful_answers_go_and_refusals_stay():
    rows = [*drawn("harmful", 10), *drawn("refusals", 10), *drawn("benign", 10), shown("p")]
    kept, dropped = run(rows)
    assert {case.id.partition("-")[0] for case in kept} == {"refusals", "benign", "p"}
    assert len(dropped) == 10 and set(dropped.values()) == {"text: unsafe by the world's truth"}


def test_each_guard_sees_its_own_half(tmp_path):
    text, image = tmp_path / "words.py", tmp_path / "looks.py"
    text.write_text(GUARD.format(name="words", body='return Verdict(1.0 if "gun" in messages[0].text else 0.0)'))
    red = data_url(np.full((4, 4, 3), (255, 0, 0), dtype=np.uint8))
    image.write_text(
        GUARD.format(
            name="looks",
            body=f"return Verdict(None if messages[0].media[0] == {blank()!r} else float(messages[0].media[0] == {red!r}))",
        )
    )
    green = data_url(np.full((4, 4, 3), (0, 255, 0), dtype=np.uint8))
    rows = [shown("grey"), shown("red", red), shown("green", green), shown("armed", green, "<image> where is a gun ?")]
    kept, dropped = run(rows, text=str(text), image=str(image))
    assert [case.id for case in kept] == ["green"]
    assert dropped == {"grey": "picture: not judged", "red": "picture: unsafe", "armed": "text: unsafe"}


def test_unreadable_pictures_are_dropped_and_more_than_two_percent_stop():
    rows = [shown(str(i)) for i in range(60)]
    kept, dropped = run([*rows, shown("bad", "none.png")])
    assert len(kept) == 60 and dropped == {"bad": "picture: none.png: there is no such file"}
    with pytest.raises(InputError, match=r"2 of 62 rows.*row 61 \(bad\): none.png"):
        run([*rows, shown("bad", "none.png"), shown("worse", text="what is this ?")])


def test_bad_options():
    with pytest.raises(InputError, match="most_bad"):
        run([], most_bad=2.0)
    with pytest.raises(InputError, match="measures correct"):
        run([shown("1")], text="includes")
