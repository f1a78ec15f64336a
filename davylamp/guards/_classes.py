"""Sequence classifiers as guards: the highest probability among the labels that mean unsafe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from davylamp.core.errors import InputError, UnknownNameError
from davylamp.core.needs import need
from davylamp.core.nouns import Case, Message, Verdict
from davylamp.core.taxonomy import crosswalk, taxonomy
from davylamp.data.guard_format import Format, judged_role, render

OVERLAP = 0.25
SAFE_LABELS = ("safe", "benign", "neutral", "non-toxic", "not toxic", "normal", "harmless", "ok", "label_0")


class Classifier:
    """The guard itself. names: labels in the order of the model's outputs.  unsafe: those that count; value = the highest of them."""

    measures = "unsafe"

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        identity: Mapping[str, Any],
        form: Format,
        labels: Sequence[str] = (),
        *,
        to: str = "",
        too_long: str = "windows",
    ):
        from davylamp.models.batching import MicroBatcher

        self.model, self.tokenizer, self.form, self.too_long = model, tokenizer, form, too_long
        self.names = [str(model.config.id2label[i]) for i in range(model.config.num_labels)]
        known = [n for n in taxonomy(form.taxonomy).nodes if n.kind == "hazard"] if form.taxonomy else []
        if form.taxonomy and not any(name in taxonomy(form.taxonomy).spellings for name in self.names):
            if len(known) != len(self.names):
                raise InputError(
                    f"{identity.get('name')} has {len(self.names)} labels, {form.title} has {len(known)}: it is another model"
                )
            self.names = [item.id for item in known]  # a configuration without names: the source's order
        self.unsafe = self._chosen(labels)
        self.sigmoid = (form.activation or model.config.problem_type or "") in ("sigmoid", "multi_label_classification")
        self.to = taxonomy(to).name if to else ""
        self.identity: Mapping[str, Any] = {
            "model": dict(identity),
            "format": {"name": form.name, "version": form.version, "sha256": form.sha256},
            "unsafe": self.unsafe,
        }
        self._batcher = MicroBatcher(self._batch, size=len)

    @classmethod
    def load(cls, spec: str, form: Format, labels: Sequence[str], *, to: str, too_long: str) -> Classifier:
        if spec.startswith("openai/"):
            raise InputError(
                f"the family {form.name} is a sequence classifier: it runs here only, as hf/<folder or id>"
            )
        need("hf", f"the guard {spec}")
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        from davylamp.models.loading import identity, locate

        source = locate(spec)
        try:
            tokenizer = AutoTokenizer.from_pretrained(source)
            model = AutoModelForSequenceClassification.from_pretrained(source, dtype=torch.float32)
        except (OSError, ValueError, KeyError, ImportError) as problem:
            first = str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
            raise InputError(f"{spec} could not be loaded: {first}. Is it a sequence classifier?") from None
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return cls(model.to(device).eval(), tokenizer, identity(spec, model), form, labels, to=to, too_long=too_long)

    def _chosen(self, labels: Sequence[str]) -> list[str]:
        if labels:
            for name in labels:
                if name not in self.names:
                    raise UnknownNameError("label of the classifier", name, self.names)
            return list(labels)
        if self.form.taxonomy:
            return list(self.names)
        left = [name for name in self.names if name.casefold() not in SAFE_LABELS]
        if len(left) == len(self.names) and len(self.names) > 1:
            raise InputError(f"which labels mean unsafe? It has {', '.join(self.names[:12])}. Say labels=NAME/NAME")
        return left

    async def __call__(self, messages: Sequence[Message], case: Case | None = None) -> Verdict:
        judged_role(messages)
        if not messages[-1].text.strip():
            return Verdict(None, label="nonresponsive", why="empty text")
        rows = [await self._batcher.submit(ids) for ids in self._ids(messages)]
        highest = {name: max(row[i] for row in rows) for i, name in enumerate(self.names) if name in self.unsafe}
        if any(value != value for value in highest.values()):
            return Verdict(None, label="unreadable", why="the classifier gave NaN")
        top = max(highest, key=lambda name: highest[name])
        value = min(1.0, max(0.0, highest[top]))
        flagged = [name for name in sorted(highest, key=lambda name: -highest[name]) if highest[name] > 0.5]
        return Verdict(value, "unsafe" if value > 0.5 else "safe", self._nodes(flagged), f"highest: {top} {value:.2g}")

    def _nodes(self, names: Sequence[str]) -> tuple[str, ...]:
        if not self.form.taxonomy:
            return ()
        paths = [taxonomy(self.form.taxonomy).find(name).path for name in names]
        if not self.to:
            return tuple(paths)
        return tuple(dict.fromkeys(crosswalk(path, to=self.to)[0][0] for path in paths))

    def _ids(self, messages: Sequence[Message]) -> list[list[int]]:
        """Token ids, in overlapping windows of the last message where it is longer than the model takes."""
        room = min(
            getattr(self.model.config, "max_position_embeddings", None) or 2**31,
            self.tokenizer.model_max_length or 2**31,
        )
        whole = list(self.tokenizer(render(self.form, None, messages))["input_ids"])
        if len(whole) <= room:
            return [whole]
        if self.too_long == "error":
            raise InputError(
                f"the classifier takes {room} tokens and the text has {len(whole)}: shorten it, or too_long=windows"
            )
        last = messages[-1]
        earlier = list(messages[:-1])
        while True:
            spent = len(self.tokenizer(render(self.form, None, [*earlier, Message(last.role, "x")]))["input_ids"])
            size = room - spent - 4
            if size >= min(32, room // 4) or not earlier:
                break
            earlier.pop(0)
        if size < 2:
            raise InputError(f"the classifier takes {room} tokens, and the format alone has {spent}")
        words = self.tokenizer(last.text, add_special_tokens=False)["input_ids"]
        step = max(1, int(size * (1 - OVERLAP)))
        parts = [
            Message(last.role, str(self.tokenizer.decode(words[start : start + size])))
            for start in range(0, max(1, len(words) - int(size * OVERLAP)), step)
        ]
        return [list(self.tokenizer(render(self.form, None, [*earlier, part]))["input_ids"])[:room] for part in parts]

    def _batch(self, rows: list[list[int]]) -> list[list[float]]:
        import torch

        pad = self.tokenizer.pad_token_id
        out: list[list[float]] = []
        with torch.inference_mode():
            # without a padding token rows of unequal length go one by one: a classifier reads its last token
            groups = [rows] if pad is not None or len({len(row) for row in rows}) == 1 else [[row] for row in rows]
            for group in groups:
                longest = max(len(row) for row in group)
                ids = torch.tensor([row + [pad or 0] * (longest - len(row)) for row in group], device=self.model.device)
                mask = torch.tensor(
                    [[1] * len(row) + [0] * (longest - len(row)) for row in group], device=self.model.device
                )
                logits = self.model(input_ids=ids, attention_mask=mask).logits.float()
                out += (logits.sigmoid() if self.sigmoid else logits.softmax(-1)).tolist()
        return out

    async def close(self) -> None:
        await self._batcher.close()
