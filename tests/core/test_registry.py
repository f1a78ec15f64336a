import pytest

from davylamp.core import registry
from davylamp.core.errors import InputError, NeedsError, UnknownNameError
from davylamp.core.registry import Param, coerce, entries, find, read

GOOD = '''
from davylamp.core import Case, Message, Metric, Suite, suite

@suite(version=1, source="x", licence="MIT", stage="evaluation", threats=("bias",){extra})
def mine(*, n: int = 3, arms: tuple[str, ...] = ("a",), rate: float | None = None, loud: bool = False):
    """One line.

    More."""
    return Suite("mine", [Case(str(i), (Message("user", "x"),)) for i in range(n)], "refusal", (Metric("m"),))
'''


def lone(tmp_path, text):
    path = tmp_path / "mine.py"
    path.write_text(text)
    return path


def test_a_lone_file_is_read_without_importing_it(tmp_path):
    entry = find("suite", str(lone(tmp_path, "raise_at_import = 1 / 1\n" + GOOD.format(extra=""))))
    assert (entry.name, entry.summary, [param.name for param in entry.params]) == (
        "mine",
        "One line.",
        ["n", "arms", "rate", "loud"],
    )
    options = entry.options({"n": "2", "arms": "a,b", "rate": "none", "loud": "yes"})
    assert options == {"n": 2, "arms": ("a", "b"), "rate": None, "loud": True}
    assert len(list(entry.load()(**options).cases)) == 2


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (', colour="red"', "no argument of"),
        (", needs=3", "needs must be a str"),
        (", measures=str(1)", "must be literals"),
    ],
)
def test_bad_decorators_say_where(tmp_path, extra, said):
    with pytest.raises(InputError, match=r"mine.py:4|mine.py") as error:
        read(lone(tmp_path, GOOD.format(extra=extra)))
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('stage="evaluation"', 'stage="evalution"', "Did you mean 'evaluation'"),
        ('("bias",)', '("bais",)', "Did you mean 'bias'"),
        ("version=1, ", "", "needs version"),
    ],
)
def test_bad_metadata_is_an_error(tmp_path, old, new, said):
    with pytest.raises(InputError) as error:
        read(lone(tmp_path, GOOD.format(extra="").replace(old, new)))
    assert said in str(error.value)


def test_unknown_names_say_the_nearest(tmp_path):
    with pytest.raises(UnknownNameError, match="Did you mean 'exact'"):
        find("judge", "exakt")
    with pytest.raises(InputError, match="no file"):
        find("suite", "nowhere.py")
    entry = find("suite", str(lone(tmp_path, GOOD.format(extra=""))))
    with pytest.raises(UnknownNameError, match="Did you mean 'arms'"):
        entry.options({"arm": "x"})
    with pytest.raises(InputError, match="option n of mine must be int"):
        entry.options({"n": "many"})


def test_a_file_with_two_needs_the_name(tmp_path):
    path = lone(tmp_path, GOOD.format(extra="") + GOOD.format(extra="").replace("def mine", "def other"))
    with pytest.raises(InputError, match="found: mine, other"):
        find("suite", str(path))
    assert find("suite", f"{path}:other").name == "other"


def test_a_missing_extra_says_what_to_type(tmp_path, monkeypatch):
    from davylamp.core import needs

    monkeypatch.setitem(needs.EXTRAS, "hf", ("no_such_package",))
    entry = find("suite", str(lone(tmp_path, GOOD.format(extra=', needs="hf"'))))
    with pytest.raises(NeedsError, match=r"pip install 'davylamp\[hf\]'"):
        entry.load()


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("3", "int", 3),
        ("0.5", "float", 0.5),
        ("false", "bool", False),
        ("a, b", "tuple[str, ...]", ("a", "b")),
        ("1,2", "tuple[int, ...]", (1, 2)),
        ("b", "Literal['a', 'b']", "b"),
        ("none", "str | None", None),
        ("none", "str", "none"),
    ],
)
def test_coerce(text, kind, value):
    assert coerce(text, Param("x", kind, None), "demo") == value


@pytest.mark.parametrize(
    ("text", "kind"), [("x", "int"), ("maybe", "bool"), ("c", "Literal['a', 'b']"), ("1,x", "tuple[int, ...]")]
)
def test_coerce_refuses(text, kind):
    with pytest.raises(InputError, match="option x of demo"):
        coerce(text, Param("x", kind, None), "demo")


def test_names_are_unique_within_a_kind():
    names = [(entry.kind, entry.name) for entry in entries()]
    assert len(names) == len(set(names))


def test_an_entry_point_adds_a_thing(tmp_path, monkeypatch):
    from davylamp.core import registry

    (tmp_path / "plugin_package.py").write_text(GOOD.format(extra=""))
    folder = tmp_path / "plugin_package-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin-package\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[davylamp.suites]\nmine = plugin_package:mine\n")
    monkeypatch.syspath_prepend(tmp_path)
    registry.plugins.cache_clear()
    try:
        assert find("suite", "mine").module == "plugin_package"
    finally:
        monkeypatch.undo()
        registry.plugins.cache_clear()


def test_a_literal_named_at_the_top_of_the_file_is_checked_like_one_written_out(tmp_path):
    file = tmp_path / "named.py"
    file.write_text(
        'from typing import Literal\nfrom davylamp.core import suite\n\nStyle = Literal["plain", "mixed"]\n\n\n'
        '@suite(version=1, source="x", licence="x", stage="evaluation", threats=())\n'
        'def named(*, style: Style = "plain"):\n    """A suite."""\n'
    )
    entry = find("suite", str(file))
    assert entry.options({"style": "mixed"}) == {"style": "mixed"}
    with pytest.raises(InputError, match="option style of named must be Literal"):
        entry.options({"style": "loud"})


def test_reading_the_marked_functions_alone_finds_what_reading_whole_files_finds(monkeypatch):
    quick = registry.builtin()
    monkeypatch.setattr(registry, "_marked", lambda text: registry.ast.parse(text).body)
    registry.shipped.cache_clear()
    try:
        assert registry.builtin() == quick
    finally:
        monkeypatch.undo()
        registry.shipped.cache_clear()


def test_a_marked_function_inside_a_text_is_text():
    text = 'X = """\n@suite(version=1)\ndef no():\n    pass\n"""\n\n\n@suite(version=1)\ndef yes(\n    *, a: int = 1\n):\n    """Doc."""\n'
    assert [node.name for node in registry._marked(text)] == ["yes"]
