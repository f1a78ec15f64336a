"""What one message costs through `lamp`, beside the plain way to do the same: scikit-learn for the hashed head, transformers for the other.

Texts: davylamp's own test sentences (about 60 characters), and the same joined to about 1,000. Peers in the same process, in turn, each
asked one text at a time: HashingVectorizer (words 1-2 and characters 3-5, as the hashed head reads) + LogisticRegression; the tokenizer and
BertModel of transformers in float32 + a linear head. Times are CPU milliseconds of one thread, the middle of all texts, best of the rounds,
so that other work on the machine counts little. A ratio x_over_y is x's time over y's.

    python benchmarks/lamp.py [--texts 200] [--rounds 5] [--json]
"""

import argparse
import asyncio
import json
import os
import statistics
import time
import warnings

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np

from davylamp.core import Message
from davylamp.guards._lamp_own import own_rows
from davylamp.guards.lamp import find_encoder, lamp


def middle(call, texts, rounds):
    """Milliseconds of one call: the middle over the texts, best of the rounds, after one round to warm up."""
    for text in texts[:20]:
        call(text)
    best = []
    for _ in range(rounds):
        times = []
        for text in texts:
            start = time.thread_time_ns()
            call(text)
            times.append((time.thread_time_ns() - start) / 1e6)
        best.append(statistics.median(times))
    return min(best)


def guard_call(guard):
    """The guard as a caller awaits it, event loop included but started once."""
    loop = asyncio.new_event_loop()

    def call(text):
        return loop.run_until_complete(guard([Message("user", text)]))

    return call


def sklearn_call(cases):
    from sklearn.feature_extraction.text import HashingVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline, make_union

    words = HashingVectorizer(n_features=2**16, ngram_range=(1, 2), alternate_sign=False)
    grams = HashingVectorizer(n_features=2**16, analyzer="char_wb", ngram_range=(3, 5), alternate_sign=False)
    model = make_pipeline(make_union(words, grams), LogisticRegression(max_iter=200))
    model.fit([case.messages[-1].text for case in cases], [case.answer for case in cases])
    return lambda text: model.predict_proba([text])[0, 1]


def transformers_call(folder):
    import torch
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    torch.set_num_threads(1)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    head = torch.nn.Linear(model.config.hidden_size, 1)

    def call(text):
        with torch.inference_mode():
            inputs = tokenizer(text, truncation=True, max_length=128, return_tensors="pt")
            hidden = model(**inputs).last_hidden_state
            return float(head(hidden.mean(1)))

    return call


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--encoder", default="auto", help="folder of an all-MiniLM-L6-v2")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    rng = np.random.default_rng(0)
    cases = [case for case in own_rows(rng=rng, scale=0.3) if len(case.messages) == 1 and case.meta["language"] == "en"]
    short = [cases[i].messages[-1].text for i in rng.permutation(len(cases))[: args.texts]]
    long = [" ".join(short[(i + j) % len(short)] + "." for j in range(17))[:1000] for i in range(len(short) // 4)]
    figures = {}
    hashed = guard_call(lamp(encoder="hashed"))
    peer = sklearn_call(cases)
    for name, texts in (("short", short), ("long", long)):
        ours, theirs = middle(hashed, texts, args.rounds), middle(peer, texts, args.rounds)
        figures |= {f"hashed_{name}_p50_ms": ours, f"sklearn_{name}_p50_ms": theirs}
        figures[f"sklearn_over_hashed_{name}"] = theirs / ours
    folder = find_encoder(args.encoder)
    if folder is not None:
        int8, plain = lamp(encoder=str(folder)), lamp(encoder=str(folder), precision="float")
        peer = transformers_call(folder)
        for name, texts in (("short", short), ("long", long)):
            quick = middle(lambda text: int8.batch([[Message("user", text)]]), texts, args.rounds)
            exact = middle(lambda text: plain.batch([[Message("user", text)]]), texts, args.rounds)
            theirs = middle(peer, texts, args.rounds)
            figures |= {f"encoder_{name}_p50_ms": quick, f"transformers_{name}_p50_ms": theirs}
            figures[f"transformers_over_encoder_{name}"] = theirs / quick
            figures[f"float_over_int8_{name}"] = exact / quick
    figures = {name: round(value, 4) for name, value in figures.items()}
    print(json.dumps({"figures": figures}) if args.json else "\n".join(f"| {n} | {v:g} |" for n, v in figures.items()))


if __name__ == "__main__":
    main()
