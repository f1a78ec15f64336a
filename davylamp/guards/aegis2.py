"""Aegis 2.0 guard: reads its policy from the prompt, so that a category can be added, changed or left out without training.
Source: arXiv:2501.09004; the prompt is in our words (assets/hf_guard/aegis2.toml). Trained by `davylamp train guard_sft`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from threading import Lock
from typing import Literal

from davylamp.core import InputError, guard
from davylamp.core.needs import need
from davylamp.data.guard_format import Format, load_format
from davylamp.data.guard_policy import Policy, load_policy
from davylamp.guards._ask_guard import LocalModel, RemoteModel, Steps
from davylamp.guards.hf_guard import HFGuard


@guard(
    version=1,
    source="arXiv:2501.09004",
    licence="Apache-2.0",
    stage="deployment",
    threats=("harmful-compliance", "distribution-shift"),
    measures="unsafe",
    systems=("11",),
)
def aegis2(
    *,
    model: str,
    policy: str = "aegis2",
    add: str = "",
    only: tuple[str, ...] = (),
    without: tuple[str, ...] = (),
    family: str = "aegis2",
    to: str = "",
    too_long: Literal["windows", "error"] = "windows",
    logprobs: bool = True,
) -> HFGuard:
    """How unsafe the last message is under a policy given now: P(unsafe) at the decision's token, else 1 or 0 by its text; None if the
    answer is broken JSON, lacks its key, or names a category that was not shown.

    model: `hf/<folder or id>` (a LoRA adapter too), or `openai/NAME@URL`.  policy: a taxonomy or a .toml file.
    add: categories defined on the spot, `name: definition`, parted by `|`, or a .toml file; found ones are custom/NAME.
    only, without: categories by name, code or node, parted by `/` in a spec (write their ids, which hold none).
    family: the format, aegis2 or a .toml file.  to: give categories in this taxonomy by the crosswalk.
    too_long: judge a long text in overlapping windows, or raise.  logprobs: ask a server for them.
    """
    form = load_format(family)
    if "{categories}" not in form.prompt:
        raise InputError(f"aegis2 needs a format that shows a policy, got {family}")
    shown = adapted(load_policy(policy), add=add, only=only, without=without)
    backend = (
        RemoteModel(model, form, logprobs=logprobs) if model.startswith("openai/") else LocalModel.load(model, form)
    )
    return HFGuard(backend, form, shown, to=to, too_long=too_long)


def adapted(policy: Policy, *, add: str = "", only: Sequence[str] = (), without: Sequence[str] = ()) -> Policy:
    """The policy cut to `only`, less `without`, with what `add` defines behind it.

    >>> adapted(load_policy("aegis2"), only=["threat"], add="Gambling: urges to bet | Spoilers: tells how it ends").text("{code} {label}")
    'S11 Threat\\nS12 Gambling\\nS13 Spoilers'
    """
    if only:
        policy = policy.subset(part for item in only for part in item.split("/"))
    if without:
        policy = policy.without(part for item in without for part in item.split("/"))
    if add.endswith(".toml"):
        return policy.extend(*(replace(item, code="") for item in load_policy(add).categories))
    return policy.extend(*(part.strip() for part in add.split("|") if part.strip())) if add else policy


def adapters_on_one_base(base: str, adapters: Mapping[str, str], form: Format | None = None) -> dict[str, HFGuard]:
    """Several tuned guards that share one base in memory: name -> guard, for `Aegis(experts=…)`. Only the adapter is switched (peft), one
    batch at a time.

    base: a folder or hub id.  adapters: name -> folder of a LoRA adapter.  form: their format, by default aegis1.
    """
    need("train", "adapters_on_one_base")
    from peft import PeftModel

    from davylamp.models.loading import identity, load_pair

    if not adapters:
        raise InputError("adapters_on_one_base needs one adapter or more, got none")
    form = form or load_format("aegis1")
    model, tokenizer = load_pair(base)
    (first, path), *rest = adapters.items()
    shared = PeftModel.from_pretrained(model, path, adapter_name=first)
    for name, path in rest:
        shared.load_adapter(path, adapter_name=name)
    shared.eval()
    lock, out = Lock(), {}
    for name, path in adapters.items():
        backend = _Adapter(shared, tokenizer, {**identity(path), "base": base}, form)
        backend.adapter, backend.lock = name, lock
        out[name] = HFGuard(backend, form, load_policy(form.taxonomy) if form.taxonomy else None)
    return out


class _Adapter(LocalModel):
    """A LocalModel that switches its adapter on before each batch; a lock keeps the others off meanwhile."""

    adapter: str
    lock: Lock

    def _batch(self, items: list[tuple[list[int], int]]) -> list[Steps | Exception]:
        with self.lock:
            self.model.set_adapter(self.adapter)
            return super()._batch(items)
