"""News for prompts about what happened after a model was trained: a dated corpus on disk, or a search server of Tavily's form.

Source: arXiv:2501.17132, section 3.2 (live search in the generator); the search API's public documentation. The day is always given, never
read from the clock, so that a suite can be made again. Articles are untrusted text: they are cited in a prompt, never followed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Protocol

from davylamp.core.errors import InputError, TargetError
from davylamp.core.rows import canonical, digest, read_objects
from davylamp.models.retrieval import BM25, nearest

CHARACTERS = 4  # of a token, about; the limit on context is one of size, not of price
MAX_TOKENS = 8000  # of context, as published


@dataclass(frozen=True, slots=True)
class Article:
    """One piece of news. day: when it came out."""

    title: str
    text: str
    day: date
    url: str = ""


class Search(Protocol):
    """`async (query, *, day, k) -> articles`, none later than `day`. `identity`: what its answers depend on, plain types."""

    @property
    def identity(self) -> Mapping[str, Any]: ...

    async def __call__(self, query: str, *, day: date, k: int = 3) -> list[Article]: ...


def query_of(text: str) -> str:
    """What is searched for: the text, where "news" alone means the latest.

    >>> query_of(" News "), query_of("privacy")
    ('latest news', 'privacy')
    """
    text = " ".join(text.split())
    if not text:
        raise InputError("a search needs a query, got an empty one")
    return "latest news" if text.casefold() == "news" else text


def parse_day(text: Any, where: str) -> date:
    """A day written as 2026-11-25; a time behind it is dropped. Raises InputError."""
    try:
        return date.fromisoformat(str(text)[:10])
    except ValueError:
        raise InputError(f"{where}: a day is written like 2026-11-25, got {str(text)[:40]!r}") from None


class LocalNews:
    """A corpus: one object a line with `date`, `title` and `text`, and perhaps `url`. Best matches first, the newest first among equals.

    A query that matches nothing gives the newest articles of the days up to `day`.
    """

    def __init__(self, articles: Sequence[Article]):
        self.articles = sorted(articles, key=lambda article: article.day, reverse=True)
        self._index = BM25([f"{article.title} {article.text}" for article in self.articles])
        rows = [[a.title, a.text, a.day.isoformat(), a.url] for a in self.articles]
        self.identity: Mapping[str, Any] = {"search": "local", "articles": len(rows), "sha256": digest(rows)}

    @classmethod
    def read(cls, path: Path) -> LocalNews:
        """Raises InputError with the line for an article without text, title or a proper date, and for a file without any."""
        articles = []
        for number, row in read_objects(path):
            where = f"{path.name} line {number}"
            for field in ("title", "text"):
                if not isinstance(row.get(field), str) or not row[field].strip():
                    raise InputError(f"{where}: {field} must be text, got {row.get(field)!r:.40}")
            articles.append(
                Article(row["title"], row["text"], parse_day(row.get("date"), where), str(row.get("url") or ""))
            )
        if not articles:
            raise InputError(f"{path.name} holds no news")
        return cls(articles)

    async def __call__(self, query: str, *, day: date, k: int = 3) -> list[Article]:
        known = [i for i, article in enumerate(self.articles) if article.day <= day]
        if not known:
            return []
        asked = query_of(query)
        found = [] if asked == "latest news" else nearest(self._index, asked, k, among=known, least=0.0)
        return [self.articles[i] for i in (found or known[:k])]


class TavilyNews:
    """A search server: POST `url` with query, search_depth advanced, topic news and max_results; results with title, content, url, date.

    The key is read from the environment variable `key_env` and stands in no identity and no error. Results later than the day are left
    out; those without a date count as of that day. Raises TargetError where the server is down or its answer has no results.
    """

    def __init__(self, url: str, *, key_env: str = "TAVILY_API_KEY"):
        if not url.startswith(("http://", "https://")):
            raise InputError(f"the address of a search server starts with http:// or https://, got {url!r}")
        self.url, self.key_env = url, key_env
        self.identity: Mapping[str, Any] = {"search": "tavily", "url": url}
        self._session: Any = None

    async def __call__(self, query: str, *, day: date, k: int = 3) -> list[Article]:
        from davylamp.models.openai import post_json, session
        from davylamp.models.retry import patiently

        if self._session is None:
            self._session = session()
        http, key = self._session, os.environ.get(self.key_env, "").strip()
        body = {"query": query_of(query), "search_depth": "advanced", "topic": "news", "max_results": k,
                "end_date": day.isoformat()}  # fmt: skip
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        answer = await patiently(
            lambda: post_json(http, self.url, body, headers, who="the search server"), who="search"
        )
        results = answer.get("results")
        if not isinstance(results, list):
            raise TargetError(f"the search server gave no results: {canonical(answer)[:80]}")
        out = []
        for row in results:
            if isinstance(row, Mapping) and str(row.get("content") or "").strip():
                when = _lenient_day(row.get("published_date"), day)
                if when <= day:
                    out.append(
                        Article(str(row.get("title") or ""), str(row["content"]), when, str(row.get("url") or ""))
                    )
        return out[:k]

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None


def _lenient_day(text: Any, otherwise: date) -> date:
    """A server's date in ISO or mail form; `otherwise` for none or an odd one."""
    from email.utils import parsedate_to_datetime

    for read in (date.fromisoformat, lambda t: parsedate_to_datetime(t).date()):
        try:
            return read(str(text)[:10] if read is date.fromisoformat else str(text))
        except (ValueError, TypeError):
            continue
    return otherwise


def load_search(spec: str) -> Search:
    """`FILE.jsonl` (a corpus), `tavily` or `tavily@URL`, or `python/FILE.py:NAME` (a search of one's own)."""
    if spec.endswith(".jsonl"):
        return LocalNews.read(Path(spec))
    if spec == "tavily" or spec.startswith("tavily@"):
        return TavilyNews(spec.partition("@")[2] or "https://api.tavily.com/search")
    if spec.startswith("python/"):
        from davylamp.models.targets import PythonTarget

        path, _, name = spec.removeprefix("python/").rpartition(":")
        own = PythonTarget(Path(path), name)
        search = own.function

        class Own:
            identity: Mapping[str, Any] = own.identity

            async def __call__(self, query: str, *, day: date, k: int = 3) -> list[Article]:
                return list(await search(query_of(query), day=day, k=k))

        return Own()
    raise InputError(f"a search is FILE.jsonl, tavily, tavily@URL or python/FILE.py:NAME, got {spec!r}")


def context(articles: Sequence[Article], *, max_tokens: int = MAX_TOKENS) -> str:
    """The articles as dated text of at most so many tokens (of four characters); the last one is cut, later ones are left out.

    >>> print(context([Article("Rain", "It  rains.", date(2026, 1, 2))]))
    [2026-01-02] Rain. It rains.
    """
    room, out = max_tokens * CHARACTERS, []
    for article in articles:
        line = f"[{article.day.isoformat()}] {_flat(article.title)}. {_flat(article.text)}"
        if room <= 0:
            break
        out.append(line[:room])
        room -= len(line) + 1
    return "\n".join(out)


def _flat(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()
