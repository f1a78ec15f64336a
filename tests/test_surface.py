"""The public surface is `davylamp.core`'s, exactly, and every public thing is documented."""

import inspect

import davylamp.core as core


def test_all_is_the_module():
    public = {name for name, value in vars(core).items() if not name.startswith("_") and not inspect.ismodule(value)}
    assert public == set(core.__all__) and sorted(core.__all__, key=str) == list(core.__all__)


def test_everything_public_is_documented():
    for name in core.__all__:
        assert (getattr(core, name).__doc__ or "").strip(), name
