"""The faults that each endpoint may legally show, as data, with the section of the training API's wire protocol.

What a fault looks like on the wire, and how it is injected: tests/faulty_proxy.py. A legal server recovers: no logical
request meets more than `in_a_row` of them before it is answered.
"""

from __future__ import annotations

from tests.faulty_proxy import Endpoint, Legal

__all__ = ["COMPLETIONS", "LEGAL_FAULTS"]

_JOB = r"/v1/accounts/[^/]+/rlorTrainerJobs/[^/:]+"
_DEPLOYMENTS = r"/v1/accounts/[^/]+/deployments"
_TRAINER = r"/training/v1/rlorTrainerJobs/[^/]+/[^/]+/api/v1"


def _legal(section: str, *names: str, weight: int = 1) -> tuple[Legal, ...]:
    return tuple(Legal(name, section, weight) for name in names)


_CONNECTION = ("reset", "lost", "cut", "hang", "slow")

# 6.2: 408, 429 and 5xx are retried on every call of the control plane and of hot loads; so is what never answers. An
# answer that is lost after the server has acted is what the ids made by the client, and 409, are for (3.1, 3.3).
_CONTROL = _legal("6.2", "408", "429", "500", "502", "503", "504", "504-done", *_CONNECTION)

# 6.1: the two nested loops of a submission; 409 is retried here, and a 400 without a body is a proxy's.
_SUBMIT = (
    *_legal("6.1", "408", "409", "429", "500", "502", "503", "504", "504-done", weight=2),
    *_legal("6.1", "400-empty", *_CONNECTION),
    *_legal("2.5", "twice", weight=2),
)

# 2.4, the table of answers to retrieve_future; 400 three times at most in the life of one future.
_FUTURE = (
    *_legal("2.4", "try-again", "408-try-again", "metadata", "500", "502", "503", "504", weight=5),
    *_legal("2.4", "400", weight=2),
    *_legal("2.4", "429", "400-empty", *_CONNECTION),
)

# 4.4, and 4.2 for what goes wrong inside a stream.
_COMPLETION = (
    *_legal("4.4", "425", "404", "408", "429", "500", "502", "503", "504", "504-done", *_CONNECTION),
    *_legal("4.2", "stream-empty", "stream-error"),
)

# A probe is asked again, whatever it says but 200 (3.1; heartbeats: 1.4). Never 425 on a trainer's endpoints (6.4).
_PROBE = _legal("3.1", "408", "429", "500", "502", "503", "504", *_CONNECTION)


def _control(name: str, method: str, path: str, *more: Legal) -> Endpoint:
    return Endpoint(name, method, path, (*_CONTROL, *more), rate=0.9, in_a_row=2)


def _submit(name: str, key: str | None = None) -> Endpoint:
    return Endpoint(name, "POST", f"{_TRAINER}/{name}", _SUBMIT, rate=0.65, in_a_row=3, key=key)


COMPLETIONS = Endpoint("completions", "POST", r"/inference/v1/completions", _COMPLETION, rate=0.3, in_a_row=3)

LEGAL_FAULTS: tuple[Endpoint, ...] = (
    # provisioning (3.1 to 3.3)
    _control("accounts", "GET", r"/v1/accounts"),
    _control("training shape", "GET", r"/v1/accounts/[^/]+/trainingShapes/[^/]+/versions(/[^/]+)?"),
    _control("trainer create", "POST", r"/v1/accounts/[^/]+/rlorTrainerJobs"),
    _control("trainer list", "GET", r"/v1/accounts/[^/]+/rlorTrainerJobs"),
    _control("trainer get", "GET", _JOB),
    _control("trainer resume", "POST", f"{_JOB}:resume"),
    _control("deployment create", "POST", _DEPLOYMENTS),
    _control("deployment list", "GET", _DEPLOYMENTS),
    _control("deployment get", "GET", f"{_DEPLOYMENTS}/[^/]+"),
    _control("deployment patch", "PATCH", f"{_DEPLOYMENTS}/[^/]+"),
    Endpoint("trainer health", "GET", f"{_TRAINER}/healthz", _PROBE, rate=0.6, in_a_row=3),
    # release
    _control("trainer cancel", "POST", f"{_JOB}:cancel"),
    _control("trainer delete", "DELETE", _JOB),
    _control("deployment delete", "DELETE", f"{_DEPLOYMENTS}/[^/]+"),
    # the trainer's data plane (section 2)
    _submit("create_session", key=""),  # another body each time
    _submit("create_model", key=""),
    _submit("forward"),
    _submit("forward_backward"),
    _submit("optim_step"),
    _submit("save_weights"),
    _submit("load_weights"),
    _submit("save_weights_for_sampler"),
    _submit("unload_model"),
    Endpoint("list_checkpoints", "GET", f"{_TRAINER}/list_checkpoints", _SUBMIT[:-1], rate=0.6, in_a_row=3),
    Endpoint(
        "retrieve_future", "POST", f"{_TRAINER}/retrieve_future", _FUTURE, rate=0.65, in_a_row=3, key="request_id"
    ),
    Endpoint("session_heartbeat", "POST", f"{_TRAINER}/session_heartbeat", _PROBE, rate=0.5, in_a_row=2),
    # checkpoints (3.5)
    _control("checkpoint list", "GET", f"{_JOB}/checkpoints"),
    _control("checkpoint delete", "DELETE", f"{_JOB}/checkpoints/[^/]+"),
    # sampling and weight syncs (3.4, section 4)
    Endpoint("hot load", "POST", r"/hot_load/v1/models/hot_load", _CONTROL, rate=0.5, in_a_row=2, key=""),
    Endpoint("hot load status", "GET", r"/hot_load/v1/models/hot_load", _CONTROL, rate=0.4, in_a_row=2),
    COMPLETIONS,
    # promotion (3.5)
    _control(
        "promote", "POST", r"/v1/accounts/[^/]+/checkpoints/[^/]+:promote", *_legal("3.5", "unfinished", weight=4)
    ),
    _control("operation", "GET", r"/v1/accounts/[^/]+/operations/[^/]+"),
)
"""Every endpoint that the flows use, the janitor's included. Another request is passed on, and counted as "unknown"."""
