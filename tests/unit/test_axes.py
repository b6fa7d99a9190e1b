"""Axis notation: what each word means, what is refused, and that parsing keeps what was written."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffcr_surgery.axes import TOKEN_WORDS, Axes, parse_axes
from diffcr_surgery.errors import PatternError, SurgeryError


@pytest.mark.parametrize(
    ("pattern", "tokens", "batch"),
    [
        ("b n c", (1,), 0),
        ("n b c", (0,), 1),
        ("n c", (0,), None),
        ("1 n d", (1,), 0),
        ("b m+n d", (1,), 0),
        ("m+n d", (0,), None),
        ("n+m d", (0,), None),
        ("n 1 d", (0,), None),  # only a leading 1 stands for the batch
        ("b 1 n n", (2, 3), 0),
        ("1 1 n n", (2, 3), 0),
        ("b m+n m+n", (1, 2), 0),
        ("1 n-m d", (1,), 0),
        ("1 b n", (2,), 1),  # a named batch comes before a leading 1
        ("b d", (), 0),
        ("b", (), 0),
        ("m d", (), None),  # m alone is a name like any other
        ("-", (), None),
    ],
)
def test_positions_of_tokens_and_batch(pattern: str, tokens: tuple[int, ...], batch: int | None) -> None:
    axes = parse_axes(pattern)
    assert (axes.tokens, axes.batch) == (tokens, batch)


@pytest.mark.parametrize(("written", "plain"), [("b n c", "b n c"), ("  b\tn   c ", "b n c"), ("-", "-"), (" - ", "-")])
def test_written_and_read_back(written: str, plain: str) -> None:
    assert str(parse_axes(written)) == plain
    assert parse_axes(str(parse_axes(written))) == parse_axes(written)


def test_opaque_has_no_axes() -> None:
    assert parse_axes("-") == Axes(())


def test_axes_are_frozen_values() -> None:
    axes = parse_axes("b n c")
    assert hash(axes) == hash(Axes(("b", "n", "c"), (1,), 0))
    with pytest.raises(AttributeError):
        axes.words = ("b",)  # type: ignore[misc]


NAMES = ("c", "d", "head", "h2", "_x", "m", "C")


@given(
    batch=st.sampled_from([(), ("b",), ("1",)]),
    token=st.sampled_from([(), *((word,) * times for word in TOKEN_WORDS for times in (1, 2))]),
    names=st.lists(st.sampled_from(NAMES), unique=True, max_size=3),
    data=st.data(),
)
def test_any_order_of_words_is_kept(batch: tuple[str, ...], token: tuple[str, ...], names: list[str], data: st.DataObject) -> None:
    words = data.draw(st.permutations([*batch, *token, *names]).filter(len))
    axes = parse_axes(" ".join(words))
    assert axes.words == tuple(words)
    assert [words[i] for i in axes.tokens] == list(token)
    if "b" in words:
        assert axes.batch is not None and words[axes.batch] == "b"
    else:
        assert axes.batch == (0 if words[0] == "1" else None)


@pytest.mark.parametrize(
    ("pattern", "complaint"),
    [
        ("b n 2", "'2' is no axis word"),
        ("b n 11", "'11' is no axis word"),
        ("b n -", "'-' is no axis word"),
        ("- -", "'-' is no axis word"),
        ("b k+n c", r"'k\+n' is no axis word"),
        ("b n+n", r"'n\+n' is no axis word"),
        ("b n, c", "'n,' is no axis word"),
        ("b n (h d)", r"'\(h' is no axis word"),
        ("b n ...", r"'\.\.\.' is no axis word"),
        ("b n ö", "'ö' is no axis word"),
        ("b b n", "'b' stands twice"),
        ("b n c c", "'c' stands twice"),
        ("b n m+n", "mixes"),
        ("m+n n+m", "mixes"),
        ("", "is empty"),
        (" \n", "is empty"),
    ],
)
def test_malformed_patterns_name_pattern_and_word(pattern: str, complaint: str) -> None:
    with pytest.raises(PatternError, match=complaint) as caught:
        parse_axes(pattern)
    assert repr(pattern) in str(caught.value)
    assert isinstance(caught.value, SurgeryError)


@pytest.mark.parametrize("given_instead", [None, 3, ("b", "n"), ["b", "n"], {"n": 1}], ids=repr)
def test_what_is_no_text_is_refused(given_instead: object) -> None:
    with pytest.raises(PatternError, match="one word an axis"):
        parse_axes(given_instead)  # type: ignore[arg-type]
