"""Text of growing completions: whole characters only, nothing of a stop string, and together exactly the text."""

from __future__ import annotations

import pytest

from cookbook.backend.deployment.stops import DeltaText, StopWatch, TextStream, cut_at_stop
from cookbook.backend.deployment.tokenizer import TextModel
from tests.tiny_model import make_tiny_model

TEXT = "na\u00efve \u20ac 5 \U0001f600 done"
END = 259


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    return TextModel(make_tiny_model(tmp_path_factory.mktemp("tiny")))


def test_pieces_are_whole_characters_and_together_the_text(text: TextModel) -> None:
    stream = TextStream(text.decode)
    pieces = [stream.push([byte]) for byte in TEXT.encode()]
    assert "".join(pieces) == stream.text == TEXT
    assert "\ufffd" not in stream.text
    assert pieces[2:4] == ["", "\u00ef"]  # the two bytes of one character


def test_bytes_that_never_become_a_character_come_at_the_end(text: TextModel) -> None:
    stream = TextStream(text.decode)
    assert [stream.push([ord("a")]), stream.push([0xE2]), stream.finish()] == ["a", "", "\ufffd"]


@pytest.mark.parametrize("tokens", [[0xFF, 0x41, 0xE2, 0x82, 0x42, 0xC3], list(range(120, 264)), [256, 0x41, 258, 260]])
def test_any_bytes_read_the_same_one_by_one_and_at_once(text: TextModel, tokens: list[int]) -> None:
    stream = TextStream(text.decode)
    pieces = [stream.push([token]) for token in tokens] + [stream.finish()]
    assert "".join(pieces) == text.decode(tokens)


def test_a_stop_string_is_seen_with_its_last_token_and_not_before(text: TextModel) -> None:
    watch = StopWatch(text.decode, ["\n\n", "END"])
    tokens = list(b"one\ntwo ENx END rest")
    seen = [watch(tokens[:count]) for count in range(1, len(tokens) + 1)]
    assert seen.index(True) == b"one\ntwo ENx END rest".index(b"END") + 2


def test_a_watch_may_be_asked_after_several_tokens(text: TextModel) -> None:
    watch = StopWatch(text.decode, ["stop"])
    assert not watch(list(b"do not st"))
    assert watch(list(b"do not stop here"))


def test_deltas_hold_back_what_may_become_a_stop_string(text: TextModel) -> None:
    deltas = DeltaText(text.decode, ["</a>"], frozenset({END}))
    assert [deltas.push(byte) for byte in b"x</b</a"] == ["x", "", "", "</b", "", "", ""]
    assert deltas.push(ord(">")) == ""
    assert deltas.finish("x</b") == ""


def test_deltas_leave_out_the_end_token_and_finish_with_the_rest(text: TextModel) -> None:
    deltas = DeltaText(text.decode, ["##"], frozenset({END}))
    assert [deltas.push(token) for token in [*b"ab#", END]] == ["a", "b", "", ""]
    assert deltas.finish("ab#") == "#"


def test_the_first_of_several_stop_strings_cuts() -> None:
    assert cut_at_stop("one two three", ["three", "two"]) == ("one ", True)
    assert cut_at_stop("one two three", ["four"]) == ("one two three", False)
