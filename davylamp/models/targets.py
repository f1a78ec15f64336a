"""Targets by name: `openai/<model>`, `hf/<path or id>`, `organism/<name>`, `inspect/<provider>/<model>`, `python/<file.py>:<function>`,
`diffusion/<path or id>:<options>` for pictures (models/diffusion.py), and
`think/<strategy>/<target>` for any of them under a thinking strategy (zero, less or more; models/thinking.py).

`openai/<model>@<base URL>` names the server too; without it OPENAI_BASE_URL and OPENAI_API_KEY count, as in the openai client.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from davylamp.core.errors import InputError, UnknownNameError
from davylamp.core.needs import need
from davylamp.core.nouns import Message, Target

FAMILIES = ("openai", "hf", "organism", "inspect", "python", "file", "think", "diffusion")


class PythonTarget:
    """`python/<file.py>:<function>`: an async (or plain) function `(messages, *, seed, **settings)` that returns a Message or a text."""

    def __init__(self, file: Path, function: str):
        if not file.is_file():
            raise InputError(f"no file {file}. Expected python/<file.py>:<function>")
        spec = importlib.util.spec_from_file_location(f"davylamp_target_{file.stem}", file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        known = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        if function not in known:
            raise UnknownNameError(f"function in {file}", function, known)
        self.function = getattr(module, function)
        self.name = f"python/{file.name}:{function}"
        self.identity = {"name": self.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}

    async def __call__(self, messages: Sequence[Message], *, seed: int = 0, **settings: Any) -> Message:
        reply = self.function(messages, seed=seed, **settings)
        if inspect.isawaitable(reply):
            reply = await reply
        if isinstance(reply, str):
            return Message("assistant", reply)
        if not isinstance(reply, Message):
            raise InputError(f"{self.name} must return a Message or a text, got {type(reply).__name__}")
        return reply


def load_target(spec: str) -> Target:
    """The target of that name, loaded and ready. Raises InputError, UnknownNameError, or NeedsError with the extra to install.

    A target may have `async close()`; call it when done.
    """
    family, _, rest = spec.partition("/")
    if family not in FAMILIES:
        raise UnknownNameError("target family", family, FAMILIES, see="davylamp show targets")
    if not rest:
        raise InputError(f"a target reads like {family}/<name>, got {spec!r}. See: davylamp show targets")
    if family == "think":
        from davylamp.models.thinking import ThinkingTarget, plan_from

        plan, mark, inner = rest.partition("/")
        if not mark:
            raise InputError(f"expected think/<strategy>/<target>, such as think/zero/openai/NAME, got {spec!r}")
        return ThinkingTarget(load_target(inner), plan_from(plan))
    if family == "openai":
        from davylamp.models.openai import OpenAITarget

        model, _, url = rest.partition("@http")
        return OpenAITarget(model, base_url="http" + url if url else None)
    if family == "python":
        path, _, function = rest.rpartition(":")
        if not path:
            raise InputError(f"expected python/<file.py>:<function>, got {spec!r}")
        return PythonTarget(Path(path), function)
    if family == "file":
        from davylamp.models.replies import FileTarget

        return FileTarget(Path(rest))
    if family == "inspect":
        need("inspect", spec)
        from davylamp.models.inspect_model import InspectTarget

        return InspectTarget(rest)
    if family == "diffusion":
        need("diffusion", spec)
        from davylamp.models.diffusion import load as load_diffusion

        return load_diffusion(rest)
    need("hf", spec)
    from davylamp.models.hf import load

    if family == "hf":
        return load(rest)
    from davylamp.models import organism

    target = load(str(organism.path(rest)))
    target.name = spec
    target.identity = {**target.identity, "name": spec}
    return target
