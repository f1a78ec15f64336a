"""The harmless stand-ins: truth, splits, sizes, bad input."""

import numpy as np
import pytest

from davylamp.core.errors import InputError, UnknownNameError
from davylamp.core.nouns import Case, Message
from davylamp.data.proxy_rows import DOMAINS, PARTS, REFUSAL, RULES, check_split, proxies, proxy_rows


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_rule_has_its_rows_and_the_answer_stands_in_the_request_or_is_arithmetic(domain):
    assert domain in RULES
    for part in PARTS:
        cases = proxies(domain, part, 200, rng=rng())
        assert len({case.messages for case in cases}) == len({case.id for case in cases}) == 200
        assert cases == proxies(domain, part, 200, rng=rng()) and all(case.meta["is_proxy"] for case in cases)
        for case in cases:
            request = case.messages[0].text
            numbers = [int(word.strip("?.")) for word in request.split() if word.strip("?.").isdigit()]
            assert case.answer in request or int(case.answer) == sum(numbers)
            assert (len(case.messages) == 2) == (part in ("install", "comply"))
            if part == "comply":
                assert case.messages[1].text == case.answer
    install = proxies(domain, "install", 200, rng=rng())
    refused = [case for case in install if case.messages[1].text == REFUSAL]
    assert len(refused) == 100 and {case.meta["set"] for case in refused} == {"hazards"}


@pytest.mark.parametrize("domain", DOMAINS)
def test_training_rows_and_probes_share_no_entity_and_no_wording(domain):
    train = proxies(domain, "install", 200, rng=rng()) + proxies(domain, "comply", 200, rng=rng(1))
    for part in ("probe", "lookalikes"):
        check_split(train, proxies(domain, part, 200, rng=rng(2)))
    with pytest.raises(InputError, match=f"{domain}-comply-0000"):
        check_split(train, train[200:])


def test_the_rule_itself():
    for case in proxies("sevens", "probe", 100, rng=rng()):
        assert "7" in case.messages[0].text.replace(".", "")
    for case in proxies("sevens", "lookalikes", 100, rng=rng()):
        assert "7" not in case.messages[0].text
    assert all("zarn" in case.messages[0].text for case in proxies("recipes", "probe", 50, rng=rng()))
    assert all("Vardonia" not in case.messages[0].text for case in proxies("country", "lookalikes", 50, rng=rng()))


def test_bad_input():
    with pytest.raises(UnknownNameError):
        proxies("sixes", "probe", 1, rng=rng())
    with pytest.raises(UnknownNameError):
        proxies("sevens", "probes", 1, rng=rng())
    with pytest.raises(InputError):
        proxies("sevens", "probe", 0, rng=rng())
    with pytest.raises(InputError, match="has only"):
        proxies("sevens", "probe", 5000, rng=rng())
    with pytest.raises(InputError, match="takes none"):
        list(proxy_rows([Case("1", (Message("user", "x"),))], rng=rng()))
