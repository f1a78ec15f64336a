"""Capability: every question is worked out again from its text by another route; balance, determinism, and the judge's two errors."""

import asyncio
import calendar
import itertools
import re
import string
from collections import Counter
from datetime import datetime
from types import SimpleNamespace

import pytest

from davylamp.core.errors import InputError
from davylamp.core.evaluate import evaluate, load_suite
from davylamp.core.judges import load_judge
from davylamp.core.nouns import Message
from davylamp.suites.capability import AREAS, CAPITALS, KINDS, N_FACTS, NUMBERS, SYMBOLS, TOWNS, WORDS, capability

NUMBER = r"(\d+)"
LATIN = {"sodium": "natrium", "potassium": "kalium", "iron": "ferrum", "copper": "cuprum", "silver": "argentum", "tin": "stannum",
         "gold": "aurum", "mercury": "hydrargyrum", "lead": "plumbum"}  # fmt: skip
COUNTED = {"hexagon": 6, "octagon": 8, "spider": 4 + 4, "insect": 3 + 3, "right angle": 360 // 4, "two days": 24 + 24,
           "five minutes": 5 * 60, "alphabet": len(string.ascii_lowercase), "violin": len("GDAE"), "chessboard": 8**2,
           "piano": 52 + 36, "football": 1 + 10, "two metres": 2 * 100, "kilogram": 10**3, "April": calendar.monthrange(2023, 4)[1],
           "cube": 3 * 2, "three centuries": 3 * 100, "solar system": 4 + 4, "boil": 373 - 273,
           "Second World War": 1939 + 6, "on the Moon": 1957 + 12}  # fmt: skip


def numbers(text):
    return [int(found) for found in re.findall(NUMBER, text)]


def sharing(text):
    friends, things = numbers(text)
    while things >= friends:
        things -= friends
    return things


def remainder(text):
    left, divisor = numbers(text)
    return next(rest for rest in range(divisor) if any(times * divisor + rest == left for times in range(left + 1)))


def bus(text):
    on_board, off, on = numbers(text)
    seats = ["old"] * on_board
    del seats[:off]
    return len(seats + ["new"] * on)


def ages(text):
    born = 2000 - numbers(text)[0]
    younger, later = numbers(text)[1:]
    return 2000 + later - (born + younger)


def change(text):
    pen, book, pens, paid = numbers(text)
    return paid - sum([pen] * pens + [book])


def walk(ring, start, steps):
    turning = itertools.cycle(ring)
    while next(turning) != start:
        pass
    return [next(turning) for _ in range(steps)][-1]


def weekday(text):
    return walk(calendar.day_name, re.search(r"is (\w+)\.", text)[1], numbers(text)[0])


def month(text):
    return walk(list(calendar.month_name)[1:], re.search(r"after (\w+)\?", text)[1], numbers(text)[0])


def minutes(text):
    begin, end = (datetime.strptime(clock, "%H:%M") for clock in re.findall(r"\d\d:\d\d", text))
    return int((end - begin).total_seconds() // 60)


def days(text):
    first, last = (datetime.strptime(day, "%d %B %Y") for day in re.findall(r"\d+ [A-Z]\w+ \d{4}", text))
    return last.toordinal() - first.toordinal()


def earliest(text):
    given = re.findall(r"\d{4}-\d\d-\d\d", text)
    assert len(set(given)) == 4
    return sorted(given, key=lambda day: [int(part) for part in day.split("-")])[0]


def quoted(text):
    return re.findall(r'"(\w+)"', text)


def alphabet(text):
    first, *others = sorted(re.search(r": (.*)\?", text)[1].split(", "))
    assert len(others) == 4 and first not in others
    return first


def reading(text):
    """A table of the passage, then the question is looked up in it."""
    rows = re.findall(r"(\w+) works as a (\w+) in ([\w ]+) and has had a (\w+) since (\d+)\.", text)
    assert len(rows) == 3 and all(len(set(column)) == 3 for column in zip(*rows, strict=True))
    asked = text.rpartition(". ")[2]
    (who, _, home, pet, year), *rest = [row for row in rows if row[0] in asked or row[1] in asked]
    assert not rest, "the question names one person"
    if "before" in asked:
        return re.search(rf"Before {who} came to {home}, {who} lived in ([\w ]+)\.", text)[1]
    for word, answer in (("Who", who), ("Where", home), ("animal", pet), ("year", year)):
        if word in asked:
            return answer


def fits(text, hints, people, rank):
    """Who stands at the rank in the only order that fits the hints."""
    orders = [
        order for order in itertools.permutations(people) if all(order.index(a) < order.index(b) for a, b in hints)
    ]
    assert len(orders) == 1, "the hints leave one order"
    return orders[0][rank]


def order(text):
    hints = re.findall(r"(\w+) is taller than (\w+)\.", text)
    ranks = ("tallest", "second tallest", "second shortest", "shortest")
    return fits(
        text, hints, {name for hint in hints for name in hint}, ranks.index(re.search("the ([a-z ]+) of the", text)[1])
    )


def elimination(text):
    people = re.match(r"(\w+), (\w+), (\w+) each", text).groups()
    animals = re.search(r"a (\w+), a (\w+), a (\w+),", text).groups()
    barred = [(a, b) for a, b, _ in re.findall(r"(\w+) owns neither the (\w+) nor the (\w+)", text)]
    barred += [(a, c) for a, _, c in re.findall(r"(\w+) owns neither the (\w+) nor the (\w+)", text)]
    barred += re.findall(r"(\w+) does not own the (\w+)", text)
    assert len(barred) == 3
    worlds = [dict(zip(people, way, strict=True)) for way in itertools.permutations(animals)]
    worlds = [world for world in worlds if all(world[who] != animal for who, animal in barred)]
    assert len(worlds) == 1, "the hints leave one world"
    return worlds[0][re.search(r"does (\w+) own\?", text)[1]]


def turning(text):
    way = {"east": 1, "north": 1j, "west": -1, "south": -1j}
    at = way[re.search(r"faces (\w+)", text)[1]]
    for turn in re.findall(r"\b(left|right)\b", text):
        at *= 1j if turn == "left" else -1j
    return next(name for name, point in way.items() if point == at)


def queue(text):
    size, front = numbers(text)
    return list(reversed(range(1, size + 1))).index(front) + 1


def options(text):
    found = dict(re.findall(r"\n([A-D])\) (.*)", text))
    assert list(found) == list("ABCD") and len(set(found.values())) == 4
    return found


def only(found, right):
    letters = [letter for letter, option in found.items() if right(option)]
    assert len(letters) == 1, "one option is right"
    return letters[0]


def is_of_kind(text):
    asked = re.search(r"these is ([\w ]+)\?", text)[1]
    return only(options(text), lambda option: option in KINDS[asked])


def divisible(text):
    divisor = numbers(text)[0]
    return only(options(text), lambda option: int(option) in range(0, 10_000, divisor))


def largest(text):
    found = options(text)
    return only(found, lambda option: all(int(option) >= int(other) for other in found.values()))


def number(text):
    return next(value for word, value in COUNTED.items() if word in text)


SOLVE = {
    "sum": lambda text: sum(numbers(text)),
    "difference": lambda text: len(range(*reversed(numbers(text)))),
    "product": lambda text: sum([numbers(text)[0]] * numbers(text)[1]),
    "quotient": lambda text: next(q for q in range(1000) if q * numbers(text)[1] == numbers(text)[0]),
    "remainder": remainder,
    "precedence": lambda text: eval(re.fullmatch(r"What is ([\d+* ]+)\?", text)[1]),
    "packs": lambda text: sum([numbers(text)[1]] * numbers(text)[0]) - numbers(text)[2],
    "distance": lambda text: sum([numbers(text)[0]] * numbers(text)[1]),
    "bus": bus,
    "sharing": sharing,
    "ages": ages,
    "change": change,
    "weekday": weekday,
    "month": month,
    "minutes": minutes,
    "days": days,
    "earliest": earliest,
    "backwards": lambda text: "".join(reversed(quoted(text)[0])),
    "count": lambda text: Counter(quoted(text)[1])[quoted(text)[0]],
    "letter": lambda text: dict(enumerate(quoted(text)[0], 1))[numbers(text)[0]],
    "length": lambda text: sum(Counter(quoted(text)[0]).values()),
    "alphabet": alphabet,
    "initials": lambda text: "".join(re.findall(r"\b([a-z])", text.partition(": ")[2])),
    **dict.fromkeys(("who", "where", "before", "pet", "year"), reading),
    "capital": lambda text: next(city for land, city in CAPITALS if land in text),
    "symbol": lambda text: next(symbol for element, symbol in SYMBOLS if element in text),
    "number": number,
    "order": order,
    "elimination": elimination,
    "turning": turning,
    "queue": queue,
    "kind": is_of_kind,
    "divisible": divisible,
    "largest": largest,
}


def body(case):
    """The question without the sentence that asks for the form of the reply."""
    return case.messages[0].text.partition("Reply with only the ")[0].rstrip()


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_every_answer_comes_out_by_another_route(seed):
    cases = capability(n=8 * N_FACTS, seed=seed).cases
    assert {case.meta["kind"] for case in cases} == set(SOLVE)
    for case in cases:
        assert str(SOLVE[case.meta["kind"]](body(case))) == case.answer[0], case


def test_facts_are_sound_and_no_spelling_hits_two_of_them():
    for element, symbol in SYMBOLS:  # a symbol is letters of the (Latin) name in order, the first letter first
        name = iter(LATIN.get(element, element))
        assert symbol[0].lower() == LATIN.get(element, element)[0] and all(letter in name for letter in symbol.lower())
    for table in (CAPITALS, SYMBOLS):
        for column in zip(*table, strict=True):
            assert len({word.casefold() for word in column}) == len(table)
    assert len(COUNTED) == len(NUMBERS) and all(sum(word in text for word in COUNTED) >= 1 for text, _ in NUMBERS)
    members = [word for kind in KINDS.values() for word in kind]
    assert len(set(members)) == len(members)
    assert len(set(WORDS)) == len(WORDS) and min(map(len, WORDS)) >= 5
    assert not [(a, b) for a, b in itertools.permutations(TOWNS, 2) if b.endswith(" " + a)]


def test_n_and_seed_fix_the_cases_and_a_smaller_n_is_the_beginning():
    whole = capability(n=120, seed=3)
    assert [case.json() for case in whole.cases] == [case.json() for case in capability(n=120, seed=3).cases]
    assert capability(n=37, seed=3).cases == whole.cases[:37]
    others = {case.messages[0].text for case in capability(n=120, seed=4).cases}
    assert sum(case.messages[0].text in others for case in whole.cases) < 60


@pytest.mark.parametrize(("n", "least", "most"), [(40, 5, 5), (120, 15, 15), (43, 5, 6), (3, 0, 1)])
def test_areas_are_balanced(n, least, most):
    cases = capability(n=n).cases
    counts = Counter(case.category.removeprefix("capability/") for case in cases)
    assert len(cases) == n and all(least <= counts[area] <= most for area in AREAS)
    assert len({case.messages[0].text for case in cases}) == len({case.id for case in cases}) == n


def test_right_letters_are_spread():
    letters = Counter(
        case.answer[0] for case in capability(n=8 * N_FACTS).cases if case.category == "capability/choice"
    )
    assert set(letters) == set("ABCD") and min(letters.values()) >= N_FACTS // 8


@pytest.mark.parametrize("options", [{"n": 0}, {"n": -1}, {"n": 8 * N_FACTS + 1}, {"seed": -1}])
def test_options_out_of_range(options):
    with pytest.raises(InputError, match="of capability must be"):
        capability(**options)


def accuracy(tmp_path, reply, n=120):
    """The overall estimate for a target that answers a case by `reply(case)`."""
    loaded = load_suite("capability", {"n": str(n)})
    told = {case.messages[0].text: reply(case) for case in loaded.suite.cases}

    async def ask(messages, *, seed=0, **settings):
        return Message("assistant", told[messages[-1].text])

    class Target(SimpleNamespace):
        __call__ = staticmethod(ask)

    target = Target(name="mock", identity={"name": "mock", "told": sorted(told.values())})
    _, record = asyncio.run(evaluate(loaded, target, load_judge(loaded.suite.judge), runs=tmp_path, quiet=True))
    assert record.status == "finished"
    return next(estimate for estimate in record.estimates if estimate.category is None)


@pytest.mark.parametrize(
    "form",
    [
        "{}",
        "The answer is {}.",
        "**{}**",
        "First I think of 4 and A and Paris.\n\nAnswer: {}",
        '"{}"',
        " {}\n",
        "<b>x</b> = {}!",
    ],
)
def test_a_right_reply_counts_in_every_usual_form(tmp_path, form):
    found = accuracy(tmp_path, lambda case: form.format(case.answer[-1]))
    assert found.value == 1.0 and found.n == 120 and found.higher_is_better


@pytest.mark.parametrize(
    ("reply", "most"),
    [
        (lambda case: "I do not know.", 0.0),
        (lambda case: case.messages[0].text, 0.0),  # repeats the prompt
        (
            lambda case: f"It is not {case.answer[0]} but something else.",
            0.0,
        ),  # the answer on the way, another at the end
        (lambda case: "A", 0.06),  # one letter for everything: a quarter of one area in eight
    ],
)
def test_a_wrong_reply_does_not(tmp_path, reply, most):
    found = accuracy(tmp_path, reply)
    assert found.value <= most and found.n == 120


def test_an_answer_one_off_is_wrong(tmp_path):
    """Every number plus one, every word another word: nothing is right by chance of spelling."""

    def off(case):
        answer = case.answer[-1] if case.meta["kind"] in ("year",) else case.answer[0]
        digits = answer.replace(",", "")
        return str(int(digits) + 1) if digits.isdigit() else "x" + answer

    assert accuracy(tmp_path, off).value == 0.0


def test_an_empty_reply_is_unscored(tmp_path):
    found = accuracy(tmp_path, lambda case: "", n=16)
    assert found.value is None and found.unscored == 16
