"""BM25 beside a dense form and bm25s, embeddings, near-duplicates, and dated news."""

import asyncio
import math
from datetime import date

import numpy as np
import pytest

from davylamp.core import InputError, TargetError
from davylamp.models.news import Article, LocalNews, TavilyNews, context, load_search, parse_day, query_of
from davylamp.models.retrieval import BM25, Embedded, nearest, words_of

TEXTS = [
    "The red fox runs over the red hill",
    "A quiet river under the hill",
    "foxes and rivers, rivers and foxes",
    "Nothing to see here",
    "the the the the",
    "",
]
QUERIES = ("red fox", "the river", "rivers foxes rivers", "unknown words", "")


def dense(texts, query, k1=1.5, b=0.75):
    """Equation 3.15 of Robertson and Zaragoza 2009, word by word, with Lucene's idf."""
    docs = [words_of(text) for text in texts]
    mean = sum(map(len, docs)) / len(docs)
    out = []
    for doc in docs:
        score = 0.0
        for word in words_of(query):
            n = sum(word in other for other in docs)
            tf = doc.count(word)
            idf = math.log(1 + (len(docs) - n + 0.5) / (n + 0.5))
            score += idf * tf * (k1 + 1) / (tf + k1 * (1 - b + b * len(doc) / mean)) if tf else 0.0
        out.append(score)
    return out


@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize("how", [{}, {"k1": 0.9, "b": 0.4}, {"k1": 2.0, "b": 0.0}])
def test_against_the_dense_form(query, how):
    assert BM25(TEXTS, **how).scores(query) == pytest.approx(dense(TEXTS, query, **how))


def test_against_bm25s():
    bm25s = pytest.importorskip("bm25s")
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(30)]
    texts = [" ".join(words[i] for i in rng.integers(30, size=rng.integers(3, 20))) for _ in range(50)]
    theirs = bm25s.BM25(k1=1.5, b=0.75, method="lucene")
    theirs.index([words_of(text) for text in texts], show_progress=False)
    for _ in range(5):
        query = " ".join({words[i] for i in rng.integers(30, size=4)})
        # Lucene leaves out the constant factor k1 + 1, which changes no order
        assert BM25(texts).scores(query) == pytest.approx(2.5 * theirs.get_scores(words_of(query)), abs=1e-4)


def test_nearest_leaves_out_near_duplicates_and_what_is_not_asked_for():
    texts = ["a red fox on a hill", "A red fox on a  hill", "a red hen", "blue"]
    index = BM25(texts)
    assert nearest(index, "red fox", 5, least=0.0) == [0, 2]
    assert nearest(index, "red", 5, among=[3, 2]) == [2, 3]
    with pytest.raises(InputError, match="k must"):
        nearest(index, "red", 0)
    assert list(BM25([]).scores("red")) == []


def test_embeddings_of_any_kind():
    def letters(texts):
        return np.array([[text.count(c) for c in "abc"] for text in texts])

    index = Embedded(["aaa", "b", "ac"], letters)
    assert index.scores("a") == pytest.approx([1.0, 0.0, math.sqrt(0.5)])
    with pytest.raises(InputError, match="rows"):
        Embedded(["a"], lambda texts: np.zeros(3))
    with pytest.raises(InputError, match="finite"):
        Embedded(["a"], lambda texts: np.array([[np.nan]]))
    with pytest.raises(InputError, match="k1"):
        BM25(["a"], k1=-1)


NEWS = [
    Article("Storm at sea", "Ships wait in the harbour.", date(2026, 1, 5), "http://a"),
    Article("Storm again", "Ships wait once more.", date(2026, 3, 5)),
    Article("Elections", "People vote.", date(2026, 2, 1)),
]


def found(search, query, day, k=3):
    return [article.title for article in asyncio.run(search(query, day=day, k=k))]


def test_local_news_knows_no_later_day():
    search = LocalNews(NEWS)
    assert found(search, "storm ships", date(2026, 6, 1)) == ["Storm again", "Storm at sea"]
    assert found(search, "storm ships", date(2026, 2, 15)) == ["Storm at sea"]
    assert found(search, "news", date(2026, 2, 15), k=1) == ["Elections"]
    assert found(search, "no such word", date(2026, 2, 15), k=1) == ["Elections"], "the latest where nothing fits"
    assert found(search, "storm", date(2025, 1, 1)) == []
    assert query_of("news") == "latest news"
    with pytest.raises(InputError, match="empty"):
        query_of("  ")


def test_bad_news_files(tmp_path):
    path = tmp_path / "news.jsonl"
    for line, match in (
        ('{"title": "a", "date": "2026-01-01"}', "line 1: text"),
        ('{"title": "a", "text": "b", "date": "yesterday"}', "line 1: a day"),
        ("", "holds no news"),
    ):
        path.write_text(line)
        with pytest.raises(InputError, match=match):
            LocalNews.read(path)
    path.write_text('{"title": "a", "text": "b", "date": "2026-01-01T10:00:00"}\n')
    assert load_search(str(path)).identity["articles"] == 1
    with pytest.raises(InputError, match="a search is"):
        load_search("somewhere")
    with pytest.raises(InputError, match="2026"):
        parse_day("25.11.2026", "day")


def test_context_is_bounded():
    text = context([Article("t", "x" * 100, date(2026, 1, 1)), Article("u", "y", date(2026, 1, 1))], max_tokens=10)
    assert len(text) == 40 and "[2026-01-01] t." in text


def test_a_search_server(server, monkeypatch):
    from aiohttp import web

    monkeypatch.setenv("TAVILY_API_KEY", "secret-key")
    results = [
        {"title": "Old", "content": "c", "url": "u", "published_date": "Mon, 05 Jan 2026 10:00:00 GMT"},
        {"title": "Later", "content": "c", "published_date": "2027-01-01"},
        {"title": "Undated", "content": "c"},
        {"title": "Empty", "content": " "},
        "no object",
    ]
    server.answer = lambda body, number: web.json_response({"results": results})
    search = TavilyNews(server.url + "/search")

    async def go(spec):
        try:
            return await spec("news", day=date(2026, 6, 1), k=3)
        finally:
            await spec.close()

    assert [(one.title, one.day) for one in asyncio.run(go(search))] == [
        ("Old", date(2026, 1, 5)),
        ("Undated", date(2026, 6, 1)),
    ]
    body = server.asked[0]
    assert (body["query"], body["search_depth"], body["end_date"]) == ("latest news", "advanced", "2026-06-01")
    assert "secret" not in str(search.identity)
    server.answer = lambda body, number: web.json_response({"detail": "no"})
    with pytest.raises(TargetError, match="no results"):
        asyncio.run(go(load_search(f"tavily@{server.url}/search")))
