"""Pictures as rows hold them: a path or a data URL, opened, checked and turned into pixels. Needs Pillow and numpy; no torch.

A message names its pictures in `media`, and its text holds one `<image>` for each, at the place where the picture stands.
Source: arXiv:2410.07571 (text, typographic, neutral and blank pictures as arms of one probe).
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from davylamp.core.errors import InputError, NeedsError

if TYPE_CHECKING:
    from numpy.random import Generator

    from davylamp.core.nouns import Message

PLACEHOLDER = "<image>"
MOST_PIXELS = 50_000_000
MODES = ("RGB", "L")  # others need a decision that is the user's: what an alpha channel or an ink stands for


def open_picture(ref: str) -> Any:
    """A PIL picture in RGB from a path or a `data:image/…;base64,` URL.

    Raises InputError, with the path, for one that is missing, corrupt, empty, larger than 50 megapixels, or in CMYK or with alpha; and for
    an address on the network: nothing is fetched.

    >>> open_picture("none.png")
    Traceback (most recent call last):
    davylamp.core.errors.InputError: none.png: there is no such file
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise NeedsError("pictures need Pillow: pip install 'davylamp[hf]'") from None
    where = f"{ref[:30]}…" if ref.startswith("data:") else ref
    source: Any
    if ref.startswith("data:"):
        head, comma, body = ref.partition(",")
        if not (comma and head.startswith("data:image/") and head.endswith(";base64")):
            raise InputError(f"{where}: a data URL of a picture begins with data:image/TYPE;base64,")
        try:
            source = io.BytesIO(base64.b64decode(body, validate=True))
        except (binascii.Error, ValueError):
            raise InputError(f"{where}: its base64 cannot be read") from None
    elif "://" in ref:
        raise InputError(f"{where}: pictures are read from local files; save it first")
    else:
        path = Path(ref)
        if not path.is_file():
            raise InputError(f"{where}: there is no such file")
        if path.stat().st_size == 0:
            raise InputError(f"{where}: the file is empty")
        source = path
    try:
        with Image.open(source) as opened:
            width, height = opened.size  # from the header: nothing is decoded yet
            if width * height > MOST_PIXELS:
                raise InputError(f"{where}: {width} x {height} pixels are more than 50 million. Make it smaller")
            if width * height == 0:
                raise InputError(f"{where}: it has no pixels")
            if opened.mode not in MODES or "transparency" in opened.info:
                what = "CMYK" if opened.mode == "CMYK" else f"mode {opened.mode}, or an alpha channel"
                raise InputError(f"{where}: it is in {what}. Convert it to RGB")
            opened.load()
            return opened.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as problem:
        if isinstance(problem, InputError):
            raise
        raise InputError(f"{where}: it cannot be read as a picture ({type(problem).__name__})") from None


def pixels(ref: str, size: int) -> Any:
    """(3, size, size) float32 in [-1, 1]: the picture, scaled to a square."""
    import numpy as np

    picture = open_picture(ref)
    if picture.size != (size, size):
        picture = picture.resize((size, size))
    return np.asarray(picture, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1.0


def data_url(array: Any) -> str:
    """A picture as a PNG in a data URL. array: (height, width, 3) uint8.

    >>> import numpy as np
    >>> pixels(data_url(np.full((2, 2, 3), 255, dtype=np.uint8)), 2).tolist()[0]
    [[1.0, 1.0], [1.0, 1.0]]
    """
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(array).save(out, format="PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode("ascii")


def blank(size: int = 16) -> str:
    """A grey picture."""
    import numpy as np

    return data_url(np.full((size, size, 3), 128, dtype=np.uint8))


def neutral(rng: Generator, size: int = 16) -> str:
    """A picture of noise that shows nothing."""
    return data_url(rng.integers(0, 256, size=(size, size, 3), dtype="uint8"))


def typographic(text: str, size: int = 336) -> str:
    """The text as a picture, black on white, wrapped to the width (as FigStep's prompts are, arXiv:2311.05608)."""
    import textwrap

    import numpy as np
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (size, size), "white")
    wide = max(4, size // 7)  # characters of the built-in font, 6 pixels each
    ImageDraw.Draw(picture).multiline_text((size // 32, size // 32), "\n".join(textwrap.wrap(text, wide)), fill="black")
    return data_url(np.asarray(picture))


def problem_of(messages: Sequence[Message]) -> str:
    """Why the pictures of a conversation cannot be used, in one sentence; empty if they can, or if there are none.

    >>> from davylamp.core.nouns import Message
    >>> problem_of([Message("user", "what is this ?", media=("none.png",))])
    'the text has 0 placeholders <image> and the row 1 picture'
    """
    marks = sum(message.text.count(PLACEHOLDER) for message in messages)
    refs = [ref for message in messages for ref in message.media]
    if marks != len(refs):
        return (
            f"the text has {marks} placeholders {PLACEHOLDER} and the row {len(refs)} picture{'s' * (len(refs) != 1)}"
        )
    for ref in refs:
        try:
            open_picture(ref)
        except InputError as problem:
            return str(problem)
    return ""
