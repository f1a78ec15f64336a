"""Pictures for an hf target: a conversation with media as tokens and pixels, by the checkpoint's own image processor.

Source: transformers' LLaVA (arXiv:2310.03744): `<image>` stands as often in the prompt as the tower has patches. Differs: none.
Other architectures lay out their pictures in other ways and are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from davylamp.core.errors import InputError, TargetError
from davylamp.core.nouns import Message
from davylamp.models import pictures
from davylamp.models.loading import locate

#: prompt tokens, and the pixels of each picture: (3, height, width) float32
Shown = tuple[list[int], list[Any]]


class Eyes:
    """What reads the pictures of one model. source: its folder or hub id, where `preprocessor_config.json` is.

    Raises InputError for a model that is no LLaVA, and for one without an image processor: pixels scaled in another way than in training
    are read as something else, and nothing would say so.
    """

    def __init__(self, model: Any, tokenizer: Any, source: str):
        if getattr(model.config, "model_type", "") != "llava":
            raise InputError(f"{source} takes text only, got a message with media. Pictures need a LLaVA model")
        from transformers import AutoImageProcessor

        folder = locate(source)
        if Path(folder).is_dir() and not (Path(folder) / "preprocessor_config.json").is_file():
            raise InputError(
                f"{source} has no preprocessor_config.json, which says how its pictures are scaled. Add it"
            )
        try:
            self.processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        except (OSError, ValueError, KeyError, ImportError) as problem:
            raise InputError(f"the image processor of {source} cannot be loaded ({type(problem).__name__})") from None
        self.tokenizer, self.token = tokenizer, int(model.config.image_token_id)
        self.each, self.size = int(model.config.image_seq_length), int(model.config.vision_config.image_size)

    def encode(self, messages: Sequence[Message]) -> Shown:
        """The prompt with room for its pictures, and their pixels.

        A turn without a mark `<image>` shows its pictures before its text. Raises InputError for another number of marks than of pictures,
        for pictures that cannot be used, and for a chat template that drops them.
        """
        marked = [_marked(message) for message in messages]
        why = pictures.problem_of(marked)
        if why:
            raise InputError(why)
        refs = [ref for message in marked for ref in message.media]
        for turns in ([{"role": m.role, "content": m.text} for m in marked], [_parts(m) for m in marked]):
            try:
                text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            except jinja2.exceptions.TemplateError as problem:
                refused: Exception | None = problem
                continue
            refused = None
            ids = list(self.tokenizer(str(text), add_special_tokens=False)["input_ids"])
            if ids.count(self.token) == len(refs):
                return [i for t in ids for i in ([t] * self.each if t == self.token else [t])], [
                    self._pixels(ref) for ref in refs
                ]
        if refused is not None:
            raise TargetError(f"the chat template refused the conversation: {refused}")
        raise InputError(f"the chat template does not write one {pictures.PLACEHOLDER} for each picture")

    def _pixels(self, ref: str) -> Any:
        made = np.asarray(self.processor(pictures.open_picture(ref), return_tensors="np")["pixel_values"][0])
        if made.shape != (3, self.size, self.size):
            raise InputError(
                f"the image processor makes pictures of shape {made.shape}, and the model takes (3, {self.size}, {self.size})"
            )
        return made.astype(np.float32)


def _marked(message: Message) -> Message:
    """With a mark for each picture, in front, where the text has none."""
    if not message.media or pictures.PLACEHOLDER in message.text:
        return message
    return replace(message, text=" ".join([*[pictures.PLACEHOLDER] * len(message.media), message.text]))


def _parts(message: Message) -> dict[str, Any]:
    """The turn as a list of pictures and texts, the form that templates of vision-language models loop over.

    >>> _parts(Message("user", "<image> what is this ?", media=("a.png",)))["content"]
    [{'type': 'image'}, {'type': 'text', 'text': 'what is this ?'}]
    """
    parts: list[dict[str, str]] = []
    for number, text in enumerate(message.text.split(pictures.PLACEHOLDER)):
        parts += [{"type": "image"}] if number else []
        parts += [{"type": "text", "text": text.strip()}] if text.strip() else []
    return {"role": message.role, "content": parts}
