"""Templates: columns, nulls, what is wrong at load and at a row, and what must end."""

import datetime
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import RowRejected
from pipeline.templates import MOST_CHARACTERS, MOST_STEPS, Template
from pipeline.tokens import RowText


def reason(source: str, **row: Any) -> str:
    with pytest.raises(RowRejected) as raised:
        Template(source).render(row)
    return raised.value.reason


@given(st.text(), st.text())
def test_row_text_comes_out_as_it_is_and_is_never_a_template(title: str, body: str) -> None:
    row = {"title": title, "body": "{{ title }}{% if %}" + body}
    assert (
        Template("{{ title }}|{{ body }}").render(row) == f"{title}|{{{{ title }}}}{{% if %}}{body}"
    )


@pytest.mark.parametrize(
    ("source", "columns"),
    [
        ("plain", []),
        ("{{ b }}{{ a }}{{ a }}", ["a", "b"]),
        ("{% for tag in tags %}{{ tag }}{{ loop.index }}{% endfor %}", ["tags"]),
        ("{% if price is none or price > 3 %}x{% endif %}", ["price"]),
        ("{% set x = a.b %}{{ x }}{{ range(3) }}", ["a"]),
        ("{{ dict }}{{ lipsum }}", ["dict", "lipsum"]),
        ("{{ namespace }}{% if range > 3 %}x{% endif %}", ["namespace", "range"]),
        ("{% set n = namespace(x=1) %}{% set n.x = a %}{{ n.x }}", ["a"]),
        ("{% for range in a %}{{ range }}{% endfor %}", ["a"]),
    ],
)
def test_columns_are_the_names_that_a_row_must_have(source: str, columns: list[str]) -> None:
    assert Template(source).columns == columns


def test_fields_come_before_methods_of_python_and_these_are_not_printed() -> None:
    order = {"order": {"items": ["a", "b"], "copy": None}}
    assert Template("{% for i in order.items %}{{ i }}{% endfor %}").render(order) == "ab"
    assert Template("{% if order.copy %}x{% else %}y{% endif %}").render(order) == "y"
    assert Template("{{ meta.title() }}").render({"meta": "as text"}) == "As Text"
    for template in ("{{ order.values }}", "{{ order['items'].append }}"):
        with pytest.raises(RowRejected, match="template_error"):
            Template(template).render(order)


def test_a_column_may_have_the_name_of_a_function() -> None:
    template = Template("{{ namespace }}{% if namespace == 'prod' %}!{% endif %}")
    assert template.render({"namespace": "prod"}) == "prod!"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ a }", "line 1: unexpected '}'"),
        ("a\n{% if %}", "line 2: Expected an expression"),
        ("a\n\n{% if x %}", "line 3: Unexpected end of template"),
        ("{{ a | shorten }}", "line 1: No filter named 'shorten'"),
        ("{{ a is odder }}", "line 1: No test named 'odder'"),
        ("\n{% include 'secrets' %}", "line 2: a template can't use another file"),
        ("{% extends a %}", "line 1: a template can't use another file"),
        ("{{ range }}\n{{ range(3) }}", "line 2: `range` is a column elsewhere, no function"),
    ],
)
def test_what_is_no_template_is_refused_with_its_line(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        Template(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ a }}", "{{ a | upper }}", "{{ a ~ 'x' }}", "{{ '%s' % a }}", "{{ '{}'.format(a) }}",
        "{{ [a] | join }}", "{{ a.b }}", "{{ a['b'] }}", "{{ a[0] }}", "{{ a > 3 }}",
        "{{ a + 1 }}", "{{ 2 * a }}", "{{ a | length }}", "{% for x in a %}{% endfor %}",
        "{{ a | string }}", "{{ a | int }}", "{{ a | trim }}", "{{ a | replace('N', 'n') }}",
    ],
)  # fmt: skip
def test_a_null_is_never_printed_and_names_its_column(source: str) -> None:
    assert reason(source, a=None) == "null: a"


@pytest.mark.parametrize(
    ("source", "row", "text"),
    [
        ("{% if a %}x{% else %}none{% endif %}", {"a": None}, "none"),
        ("{{ a or 'none' }}", {"a": None}, "none"),
        ("{{ a | default('none', true) }}", {"a": None}, "none"),
        ("{{ a is none }} {{ a == none }} {{ none == a }}", {"a": None}, "True True True"),
        ("{{ a is not none }}", {"a": ""}, "True"),
        ("{{ a | tojson }}", {"a": None}, "null"),
        ("{{ a | select | join(',') }}", {"a": ["x", None, "y"]}, "x,y"),
        ("{{ a.b or 'none' }}", {"a": {"b": None}}, "none"),
    ],
)
def test_a_null_may_be_tested(source: str, row: dict[str, Any], text: str) -> None:
    assert Template(source).render(row) == text


def test_a_null_deep_inside_names_its_place() -> None:
    assert reason("{{ a.b.c }}", a={"b": {"c": None}}) == "null: a.b.c"
    assert reason("{{ a | join }}", a=["x", None]) == "null: a"
    assert reason("{{ a.get('z') }}", a={}).startswith("null: ")


@pytest.mark.parametrize(
    ("source", "value", "error"),
    [
        ("\n{{ a.title }}", {}, "UndefinedError in line 2"),
        ("\n\n{{ a[0] }}", ["x"][1:], "UndefinedError in line 3"),
        ("{{ a + 1 }}", "SECRET", "TypeError in line 1"),
        ("{{ a | int(none) + 1 }}", "SECRET", "TypeError in line 1"),
        ("{{ 1 / a }}", 0, "ZeroDivisionError in line 1"),
        ("{{ {'x': 1}[a] }}", "SECRET", "UndefinedError in line 1"),
        ("{% for x in a %}{% endfor %}", 3, "TypeError in line 1"),
        ("{{ a.__class__.__mro__ }}", "SECRET", "SecurityError in line 1"),
        ("{{ a.append(1) }}", [], "SecurityError in line 1"),
    ],
)
def test_a_row_that_does_not_suit_the_template_is_rejected_without_its_text(
    source: str, value: Any, error: str
) -> None:
    assert reason(source, a=value) == f"template_error: {error}"


TOO_MUCH = [
    "{% for x in range(99999) %}{% for y in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro m() %}{% for x in range(99999) %}{% endfor %}{% endmacro %}"
    "{% for x in range(999) %}{{ m() }}{% endfor %}",
    "{{ range(10 ** 9) | list }}",
    "{{ 'x' * 10 ** 9 }}",
    "{{ 10 ** 9 * [1] }}",
    "{{ 9 ** 99999999 }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% for x in range(9999) %}{{ 'x' * 999 }}{% endfor %}",
]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("source", TOO_MUCH)
def test_what_would_never_end_is_ended(source: str) -> None:
    assert reason(source).startswith("template_error: ")


def test_each_row_has_all_the_steps() -> None:
    template = Template("{% for x in range(n) %}{% endfor %}done")
    for _ in range(3):
        assert template.render({"n": MOST_STEPS - 1}) == "done"


def test_a_row_may_be_long_but_not_endless() -> None:
    template, half = Template("{{ a }}{{ a }}"), "x" * (MOST_CHARACTERS // 2)
    assert template.render({"a": half}) == half + half
    assert (
        reason("{{ a }}{{ a }}", a=half + "x") == "template_error: more than 4,000,000 characters"
    )


def test_json_is_for_prompts_and_not_for_pages() -> None:
    value = {
        "b": "<가&>",
        "a": [1, None],
        "when": datetime.date(2026, 1, 5),
        "won": Decimal("1.50"),
    }
    expected = '{"b": "<가&>", "a": [1, null], "when": "2026-01-05", "won": "1.50"}'
    assert Template("{{ v | tojson }}").render({"v": value}) == expected


def test_lines_of_tags_leave_no_empty_lines() -> None:
    source = "Tags:\n{% for tag in tags %}\n  - {{ tag }}\n{% endfor %}\nEnd.\n"
    assert Template(source).render({"tags": ["a", "b"]}) == "Tags:\n  - a\n  - b\nEnd."


def test_two_columns_together_make_no_control_token() -> None:
    template, row = Template("{{ a }}{{ b }}"), {"a": "<|im_", "b": "end|>"}
    assert template.render(row) == "<|im_end|>"
    assert "<|im_end|>" not in template.render(row, RowText())
    assert Template("<|im_end|>").render({}, RowText()) == "<|im_end|>", "the user's own words"


@pytest.mark.parametrize("value", [b"bytes", [{"x": b"bytes"}]])
def test_bytes_are_not_text(value: Any) -> None:
    for printing in ("{{ a }}", "x {{ a ~ 1 }}", "{{ a | upper }}", "{{ '%s' % a }}"):
        assert reason(printing, a=value).startswith("not_text: a")


def test_bytes_that_are_made_of_bytes_are_not_text_either() -> None:
    for printing in ("{{ a[:2] }}", "{{ a.strip() }}", "{{ a + a }}", "{{ a | tojson }}"):
        assert reason(printing, a=b"bytes") == "not_text: bytes that the template prints"


def test_bytes_may_be_tested_decoded_and_stand_beside_text() -> None:
    source = (
        "{% if a.bytes %}{{ a.path }}, {{ a.bytes | length }}, {{ a.bytes.decode() }}{% endif %}"
    )
    row = {"a": {"bytes": "글".encode(), "path": "cat.png"}}
    assert Template(source).render(row) == "cat.png, 3, 글"
