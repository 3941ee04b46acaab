"""Requests against the contract: every breach is named with its field, value and rule."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from closedloop.contract import CategoricalFeature, NumericFeature, read_contract
from closedloop.rules import CUSTOMER_ID_RULE, RefusedRequest, Rules
from closedloop.serving.http.openapi import describe_service
from closedloop.serving.models import load_model
from closedloop.serving.requests import RequestChecker, parse_json
from tests.model_folders import ROWS, pack_row, write_model_folder

GOOD = ROWS[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model_folder(tmp_path_factory.mktemp("model") / "folder")


@pytest.fixture(scope="module")
def checker(folder):
    return RequestChecker(read_contract(folder), range_margin=0.5)


def refuse(checker, body):
    with pytest.raises(RefusedRequest) as refused:
        checker.check(body, "given")
    assert refused.value.status == 400
    return {(breach.field, breach.rule): breach.value for breach in refused.value.breaches}


def test_a_good_request_is_taken_in_the_contracts_order(checker):
    request = checker.check({"features": {"age": 40, "plan": "plus", "visits_30d": None}, "customer_id": "C1"}, "given")
    assert (request.request_id, request.customer_id) == ("given", "C1")
    assert request.values == (None, 40.0, "plus")


def test_a_request_by_customer_carries_no_features(checker):
    request = checker.check({"customer_id": "C1", "request_id": "mine"}, "given")
    assert (request.request_id, request.customer_id, request.values) == ("mine", "C1", None)


@pytest.mark.parametrize(
    ("body", "field", "rule"),
    [
        ([], "", "object"),
        ({}, "customer_id", "customer_id or features is required"),
        ({"customer_id": ""}, "customer_id", CUSTOMER_ID_RULE),
        ({"customer_id": " "}, "customer_id", CUSTOMER_ID_RULE),
        ({"customer_id": True}, "customer_id", CUSTOMER_ID_RULE),
        ({"customer_id": 1.5}, "customer_id", CUSTOMER_ID_RULE),
        ({"customer_id": 2e16}, "customer_id", CUSTOMER_ID_RULE),
        ({"customer_id": "2e+16"}, "customer_id", CUSTOMER_ID_RULE),
        ({"customer_id": "C\n1"}, "customer_id", CUSTOMER_ID_RULE),
        ({"customer_id": ["C1"]}, "customer_id", CUSTOMER_ID_RULE),
        ({"customer_id": "C1", "colour": 1}, "colour", "is not known"),
        ({"customer_id": "C1", "request_id": []}, "request_id", "a text of 1 to 200 printable characters"),
        ({"features": []}, "features", "object"),
        ({"features": GOOD | {"age": None}}, "features.age", "number"),
        ({"features": GOOD | {"age": True}}, "features.age", "number"),
        ({"features": GOOD | {"age": "40"}}, "features.age", "number"),
        ({"features": GOOD | {"age": 10**400}}, "features.age", "from 0 to 111"),
        ({"features": GOOD | {"age": 111.5}}, "features.age", "from 0 to 111"),
        ({"features": GOOD | {"visits_30d": -1}}, "features.visits_30d", "from 0 to 30"),
        ({"features": GOOD | {"visits_30d": {}}}, "features.visits_30d", "number or null"),
        ({"features": GOOD | {"plan": "gold"}}, "features.plan", 'one of "basic", "plus" or null'),
        ({"features": GOOD | {"plan": 1}}, "features.plan", 'one of "basic", "plus" or null'),
        ({"features": GOOD | {"shoe": 1}}, "features.shoe", "is not known"),
        ({"features": {"age": 40, "plan": None}}, "features.visits_30d", "is required; null where it is unknown"),
    ],
)
def test_one_breach_is_named(checker, body, field, rule):
    assert list(refuse(checker, body)) == [(field, rule)]


def test_all_breaches_are_named_at_once(checker):
    found = refuse(checker, {"features": {"age": "x" * 500, "plan": "gold", "shoe": 1}, "request_id": 7})
    assert {field for field, _ in found} == {
        "request_id",
        "features.age",
        "features.plan",
        "features.shoe",
        "features.visits_30d",
    }
    assert max(len(str(value)) for value in found.values()) <= 80


def test_the_limits_themselves_are_allowed(checker):
    for age in (0, 111):
        assert checker.check({"features": GOOD | {"age": age}}, "r").values[1] == age


def test_a_number_that_was_never_negative_stays_so_and_others_may_leave_both_ends():
    def find_range(margin, **seen):
        (feature,) = Rules([NumericFeature(name="a", **seen).model_dump()], margin).features
        return feature.low, feature.high

    assert find_range(0.5, minimum=-10, maximum=10) == (-20, 20)
    assert find_range(1.0, minimum=5, maximum=5) == (4, 6)
    assert find_range(1.0, minimum=0, maximum=10) == (0, 20)
    assert find_range(1.0) == (-3e38, 3e38)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
NEAR = st.fixed_dictionaries(
    {},
    optional={
        "customer_id": JSON,
        "request_id": JSON,
        "features": JSON | st.fixed_dictionaries({}, optional=dict.fromkeys([*GOOD, "x"], JSON)),
    },
)


@given(body=JSON | NEAR)
def test_whatever_comes_is_accepted_or_refused_in_words_that_json_can_hold(checker, body):
    breaches, request = (), None
    try:
        request = checker.check(body, "given")
    except RefusedRequest as refused:
        breaches = refused.breaches
    assert msgspec.json.decode(msgspec.json.encode(breaches)) or request
    if request and request.values is not None:
        assert len(request.values) == 3


def numbered(*values):
    return st.sampled_from([*values, 0, -0.0, 0.5, 1, 17.9, 1e300, 10**30, 2**63, True, None, "", "plus", "x", [], {}])


BODIES = st.builds(
    dict,
    features=st.none()
    | st.builds(dict, visits_30d=numbered(-10, 30, 30.1), age=numbered(40, 0, 111), plan=numbered("plus", "basic")),
    customer_id=st.sampled_from(
        [None, "C1", "C\n1", "", " ", 7, "7.0", " C1", 2**70, 7.0, 7.5, True, "2e+16", "C" * 201, "C" * 200 + " "]
    ),
    request_id=st.sampled_from([None, "mine", "\x00", "", 7, "r" * 201]),
) | st.fixed_dictionaries({}, optional={"customer_id": st.just("C1"), "features": st.just(GOOD), "other": st.just(1)})


def outcome(call):
    """A request, or the words and breaches of a refusal."""
    try:
        return call()
    except RefusedRequest as refused:
        return refused.code, refused.message, sorted(map(repr, refused.breaches))


@given(BODIES)
def test_the_short_way_takes_and_refuses_what_the_rules_do(checker, body):
    line = msgspec.json.encode(body)
    expected = outcome(lambda: checker.check(msgspec.json.decode(line), "given"))
    assert outcome(lambda: checker.read(line, "given")) == expected


CODED = (
    CategoricalFeature(name="level", categories=("0", "1", "1.5", "True", "a")),
    CategoricalFeature(name="old", categories=("1.0", "2"), nullable=False),  # from before codes were normalised
)


@pytest.fixture(scope="module")
def coded(folder):
    return RequestChecker(read_contract(folder).model_copy(update={"features": CODED}), range_margin=0.5)


@pytest.mark.parametrize(
    ("level", "taken"), [(0, "0"), (1.0, "1"), ("1.0", "1"), (" a", "a"), (1.5, "1.5"), (True, "True"), (None, None)]
)
def test_a_category_is_taken_in_each_spelling_of_its_code(coded, level, taken):
    line = msgspec.json.encode({"features": {"level": level, "old": 2}})
    assert coded.read(line, "given").values == (taken, "2")


def test_quotes_show_that_categories_are_text(coded, folder):
    rules = refuse(coded, {"features": {"level": 2, "old": None}})
    assert rules == {
        ("features.level", 'one of "0", "1", "1.5", "True", "a" or null'): 2,
        ("features.old", 'one of "1.0", "2"'): None,
    }
    many = CategoricalFeature(name="many", categories=tuple(map(str, range(23))), nullable=False)
    checker = RequestChecker(read_contract(folder).model_copy(update={"features": (many,)}), 0.5)
    ((_, rule),) = refuse(checker, {"features": {"many": "x"}})
    assert rule.endswith('"18", "19" and 3 more')


def test_the_description_names_the_numbers_that_are_taken_for_categories(coded):
    described = describe_service(coded.contract, range_margin=0.5, batch_items_max=3, with_tokens=False)
    features = described["components"]["schemas"]["Features"]["properties"]
    assert features["level"] == {"enum": ["0", "1", "1.5", "True", "a", 0, 1, 1.5, None]}
    assert features["old"] == {"enum": ["1.0", "2", 2]}


CODES = st.sampled_from(
    [
        None,
        0,
        1,
        2,
        1.0,
        1.5,
        -0.0,
        1e300,
        True,
        False,
        "0",
        "1",
        "1.0",
        "1.00",
        " 1",
        "01",
        "1.5",
        "True",
        "",
        "a ",
        [],
    ]
)


@given(st.builds(dict, features=st.builds(dict, level=CODES, old=CODES)))
def test_the_short_way_reads_codes_as_the_rules_do(coded, body):
    line = msgspec.json.encode(body)
    assert outcome(lambda: coded.read(line, "own")) == outcome(lambda: coded.check(msgspec.json.decode(line), "own"))


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[" * 100_000, b'{"customer_id": "\xff"}', b'{"features": {"age": 1e999}}']
)
def test_what_is_not_json_is_refused_as_such(checker, body):
    with pytest.raises(RefusedRequest) as refused:
        checker.read(body, "given")
    assert (refused.value.code, refused.value.status) == ("invalid_json", 400)


FEATURES = '"features": {"visits_30d": 6, "age": 40, "plan": "plus"'


@pytest.mark.parametrize(
    ("body", "name"),
    [
        (f'{{{FEATURES}, "age": 41}}}}', "age"),
        (f'{{{FEATURES}, "\\u0061ge": 40}}}}', "age"),
        (f"{{{FEATURES}}}, {FEATURES}}}}}", "features"),
        (f'{{{FEATURES}}}, "features": null, "customer_id": "C1"}}', "features"),
        ('{"customer_id": "C1", "customer_id": 7}', "customer_id"),
        ('{"customer_id": null, "customer_id": "C1"}', "customer_id"),
        ('{"customer_id": "a:b", "customer_id": "a\\u003ab\\u0022"}', "customer_id"),
        ('{"customer_id": "a", "customer_id": "a\\"b:"}', "customer_id"),
        ('{"customer_id" : "a", "customer_id":"b"}', "customer_id"),
        ('{"explain": 1, "explain": 2, "customer_id": "C1"}', "explain"),
        ('{"customer_id": "C1", "other": {"x": [{"y": 1, "y": 1}]}}', "y"),
    ],
)
def test_a_name_that_stands_twice_is_refused(checker, body, name):
    """Another reader of the same body, say a proxy or a log, may have seen the other value."""
    for call in (lambda: checker.read(body.encode(), "r"), lambda: parse_json(b"[%b]" % body.encode())):
        code, message, (breach,) = outcome(call)
        assert (code, message) == ("invalid_json", "the body is not JSON")
        assert f'(\\"{name}\\" stands twice in one object)' in breach or f'("{name}" stands twice' in breach


@pytest.mark.parametrize(
    "ids",
    [
        {"customer_id": "urn:shop:7", "request_id": 'a "quoted" one: \\'},
        {"customer_id": None, "request_id": None, "explain": None},
        {"customer_id": 0},
        {"request_id": "2024-01-01T10:00:00"},
    ],
)
@pytest.mark.parametrize("row", [{}, {"features": GOOD}, {"features": None}, {"features": GOOD | {"plan": None}}])
def test_colons_quotes_and_nulls_are_no_repeated_names(checker, ids, row):
    line = msgspec.json.encode(ids | row)
    expected = outcome(lambda: checker.check(ids | row, "r"))
    assert outcome(lambda: checker.read(line, "r")) == expected
    assert parse_json(line) == ids | row


@pytest.mark.parametrize("nullable", [True, False])
def test_a_feature_without_categories_takes_none(folder, nullable):
    """A column that training saw only empty."""
    features = (CategoricalFeature(name="plan", categories=(), nullable=nullable),)
    contract = read_contract(folder).model_copy(update={"features": features})
    checker = RequestChecker(contract, range_margin=0.5)
    for value in (None, "", "plus", 1.0):
        line = msgspec.json.encode({"features": {"plan": value}})
        expected = outcome(lambda: checker.check(msgspec.json.decode(line), "given"))  # noqa: B023
        assert outcome(lambda: checker.read(line, "given")) == expected  # noqa: B023
        assert isinstance(expected, tuple) != (value is None and nullable)


def test_values_are_packed_as_the_graph_takes_them(folder):
    model = load_model(folder, version="1", folder_sha256=None)
    packed = model.pack([(None, 40.0, "plus"), (1.0, 2.0, "gold"), (3.0, None, None)])
    assert packed.dtype == np.float32
    expected = [[math.nan, 40.0, 1.0], [1.0, 2.0, -1.0], [3.0, math.nan, -1.0]]
    np.testing.assert_array_equal(packed, expected)
    for row in ROWS:
        np.testing.assert_array_equal(model.pack([tuple(row.values())]), pack_row(model.contract.features, row))


def test_missing_categories_are_found_for_the_metrics(folder):
    model = load_model(folder, version="1", folder_sha256=None)
    assert model.find_missing([(None, 40.0, "plus"), (1.0, 2.0, "gold")]) is None
    found = model.find_missing([(None, 40.0, "plus"), (1.0, 2.0, None)])
    assert found.tolist() == [[True, False, False], [False, False, True]]
