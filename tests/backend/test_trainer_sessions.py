"""Older epochs are fenced off, silent sessions found, and ids that are gone told from ids that never were."""

from __future__ import annotations

import pytest

from cookbook.backend.trainer.sessions import SILENCE_S, Gone, NotFound, Registry


def run(epoch: int, name: str = "run-1") -> dict[str, str]:
    return {"cookbook_run": name, "cookbook_epoch": str(epoch)}


def test_higher_epoch_supersedes_the_older_sessions_of_its_run_only() -> None:
    registry = Registry()
    old, _ = registry.open_session(run(1), 0.0)
    other, _ = registry.open_session(run(1, "run-2"), 0.0)
    plain, _ = registry.open_session({}, 0.0)
    same_epoch, superseded = registry.open_session(run(1), 0.0)
    assert superseded == []
    assert registry.open_session(run(2), 0.0)[1] == [old, same_epoch]
    for session_id in (other, plain):
        registry.heard(session_id, 1.0)


def test_lower_epoch_is_refused_even_after_the_newer_session_has_gone() -> None:
    registry = Registry()
    newer, _ = registry.open_session(run(3), 0.0)
    registry.close_session(newer)
    with pytest.raises(Gone, match="run run-1 is owned by epoch 3, this session is of epoch 2"):
        registry.open_session(run(2), 0.0)


def test_epoch_must_be_a_number() -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        Registry().open_session({"cookbook_run": "r", "cookbook_epoch": "two"}, 0.0)


def test_silence_closes_a_session_and_any_sign_of_life_keeps_it() -> None:
    registry = Registry()
    silent, _ = registry.open_session({}, 0.0)
    beating, _ = registry.open_session({}, 0.0)
    working, _ = registry.open_session({}, 0.0)
    model = registry.open_model(working, 0, 0.0)
    registry.heard(beating, 100.0)
    registry.heard_of_model(model, 100.0)
    assert registry.silent_sessions(SILENCE_S) == []
    assert registry.silent_sessions(SILENCE_S + 1) == [silent]


def test_closed_session_takes_its_models_with_it() -> None:
    registry = Registry()
    session, _ = registry.open_session({}, 0.0)
    model = registry.open_model(session, 0, 0.0)
    assert registry.close_session(session) == [model]
    for refused in (lambda: registry.heard(session, 1.0), lambda: registry.heard_of_model(model, 1.0)):
        with pytest.raises(Gone, match="its weights are gone"):
            refused()


def test_model_number_asked_for_again_is_the_same_model() -> None:
    registry = Registry()
    session, _ = registry.open_session({}, 0.0)
    first = registry.open_model(session, 0, 0.0)
    assert registry.open_model(session, 0, 0.0) == first
    assert registry.open_model(session, 1, 0.0) != first


def test_unload_can_be_repeated_and_ends_the_model() -> None:
    registry = Registry()
    session, _ = registry.open_session({}, 0.0)
    model = registry.open_model(session, 0, 0.0)
    assert registry.unload_model(model, 1.0) == registry.unload_model(model, 2.0) == session
    with pytest.raises(Gone):
        registry.heard_of_model(model, 3.0)


def test_ids_of_an_earlier_process_are_gone_and_foreign_ones_unknown() -> None:
    earlier, later = Registry(), Registry()
    session, _ = earlier.open_session({}, 0.0)
    model = earlier.open_model(session, 0, 0.0)
    with pytest.raises(Gone):
        later.heard_of_model(model, 0.0)
    with pytest.raises(Gone):
        later.heard(session, 0.0)
    with pytest.raises(NotFound, match="there is no model no-such"):
        later.heard_of_model("no-such", 0.0)
