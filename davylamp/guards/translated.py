"""A judge that sees the reply in English: the conversation's last message is translated by a model before another judge looks at it.
Source: arXiv:2310.06474, section 2.2 (responses are translated to English, then judged). Translation can launder or create harm: the
original stays in the rows, and `judge bench` measures judge and translator as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from davylamp.core import Case, InputError, Message, TargetError, Verdict, guard
from davylamp.core.judges import load_judge
from davylamp.models.retry import patiently
from davylamp.models.targets import load_target
from davylamp.models.translation import ASK, asking


@guard(
    version=1,
    source="arXiv:2310.06474",
    licence="Apache-2.0",
    stage="evaluation",
    threats=("harmful-compliance", "distribution-shift"),
    measures="unsafe",
    systems=("32",),
)
def translated(*, judge: str, translator: str, invalid: float = 0.0, max_tokens: int = 1024) -> Translated:
    """Another judge's verdict on the reply in English; `nonresponsive`, with the value `invalid`, if nobody can make sense of it.

    judge: its options are parted by `;`, as in `translated:judge=llm_judge:model=openai/NAME;rubric=harm,translator=openai/NAME`.
    translator: a target that is asked to translate, at temperature 0; one language model can be both. A case whose `meta.language` is
    `en` is not translated.  max_tokens: how long a translation may get.  invalid: the value of a reply that is empty or comes back
    empty from translation; it stays in the denominator, as in the paper.

    Raises TargetError if the translator fails: never a judgement of the untranslated text.
    """
    if not 0 <= invalid <= 1:
        raise InputError(f"invalid must be in [0, 1], got {invalid}")
    return Translated(judge, translator, invalid, max_tokens)


class Translated:
    """The guard itself; it measures what its judge measures. Equal texts are translated once."""

    def __init__(self, judge: str, translator: str, invalid: float, max_tokens: int):
        self.judge, self.translator = load_judge(judge.replace(";", ",")), load_target(translator)
        self.measures, self.invalid, self.max_tokens = self.judge.measures, invalid, max_tokens
        self.identity: Mapping[str, Any] = {
            "judge": dict(self.judge.identity),
            "translator": dict(self.translator.identity),
            "prompt": ASK,
        }
        self.seen: dict[str, str] = {}

    async def __call__(self, messages: Sequence[Message], case: Case | None = None) -> Verdict:
        reply = messages[-1]
        if not reply.text.strip():
            return Verdict(self.invalid, label="nonresponsive", why="empty reply")
        english = case is not None and case.meta.get("language") == "en"
        text = reply.text if english else await self._english(reply.text)
        if not text.strip():
            return Verdict(self.invalid, label="nonresponsive", why="nothing came back from the translation")
        verdict = await self.judge((*messages[:-1], Message(reply.role, text, finish=reply.finish)), case)
        if verdict.label == "nonresponsive":
            return Verdict(self.invalid, label="nonresponsive", why=verdict.why)
        return verdict

    async def _english(self, text: str) -> str:
        if text not in self.seen:
            asked = (asking(text),)
            said = await patiently(
                lambda: self.translator(asked, temperature=0.0, max_tokens=self.max_tokens), who="the translator"
            )
            if said.finish == "length":
                raise TargetError(f"the translation was cut off at {self.max_tokens} tokens: raise max_tokens")
            self.seen[text] = said.text
        return self.seen[text]

    async def close(self) -> None:
        await self.judge.close()
        close = getattr(self.translator, "close", None)
        if close is not None:
            await close()
