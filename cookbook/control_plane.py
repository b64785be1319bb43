"""The connection to a backend's control plane: the SDK's manager, and over HTTP what the SDK has no method for.

Every call has a deadline. Which trainers a run has is decided in cookbook/provisioning.py.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias, TypeVar

import httpx
from fireworks.training.sdk import DeploymentManager, TrainerJobManager, TrainingShapeProfile

from cookbook import embedded
from cookbook.config import Environment, bypass_proxies
from cookbook.deadlines import Deadline, call_with_deadline
from cookbook.errors import ConfigError, Problem, ProvisioningError
from cookbook.recovery import CONTROL_PLANE_STATUSES, REFUSED_STATUSES

__all__ = ["CALL_TIMEOUT_S", "ControlPlane", "Deployment", "Job", "connect", "insist", "is_refused", "problem_of"]

T = TypeVar("T")
Job: TypeAlias = dict[str, Any]
"""A trainer job as the API describes it: `name`, `state` ("JOB_STATE_..."), `statusMessage`, `trainingConfig`, ..."""
Deployment: TypeAlias = dict[str, Any]
"""A deployment as the API describes it: `name`, `state` ("READY", ...), `baseModel`, `hotLoadTrainerJob`, ..."""

CALL_TIMEOUT_S = 60.0

_LIVE = ("JOB_STATE_PENDING", "JOB_STATE_CREATING", "JOB_STATE_RUNNING", "JOB_STATE_IDLE")
_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 5.0
_HEALTH_TIMEOUT_S = 5.0
_PROBE_TIMEOUT_S = 10.0
_STATUS = re.compile(r"\bHTTP (\d{3})\b")  # as `_refusal` writes it
_ANSWER_TIMEOUT_S = 600.0  # what a run gives a sampling request, too


def connect(backend: str, env: Environment, api_key: str | None = None) -> ControlPlane:
    """Connect to a backend; the embedded one is started when it does not run.

    Args:
        backend: "embedded" or "fireworks".
        env: home of the embedded backend, URL and key of the other.
        api_key: for fireworks, instead of the environment's; the embedded backend makes its own.

    Raises:
        ConfigError: fireworks without a key.
        BackendError: the embedded backend does not start.
    """
    models_dir = env.home / "models"
    if backend == "embedded":
        endpoint = embedded.ensure_running(env.home)
        bypass_proxies("127.0.0.1")  # the SDK's clients would send even loopback requests to a proxy
        return ControlPlane(backend, endpoint.base_url, endpoint.api_key.get_secret_value(), models_dir)
    key = api_key or env.fireworks_api_key
    if key is None:
        raise ConfigError(
            [
                Problem(
                    "FIREWORKS_API_KEY",
                    f"is not set, and backend is {backend!r}.",
                    "Set it, or use backend 'embedded'. Flows (cookbook run, cookbook eval, a worker) also take it "
                    "from the Prefect Secret block fireworks-api-key; other commands do not.",
                )
            ]
        )
    return ControlPlane(backend, env.fireworks_base_url, key, models_dir)


class ControlPlane:
    """A backend's control plane. The key shows in no repr and in no error.

    `jobs` and `deployments` are the SDK's managers, for whatever they can do; their own calls may block for minutes.
    """

    def __init__(self, backend: str, base_url: str, api_key: str, models_dir: Path) -> None:
        self.backend = backend
        self.base_url = base_url
        self.models_dir = models_dir
        self.jobs = TrainerJobManager(api_key=api_key, base_url=base_url)
        self.deployments = DeploymentManager(api_key=api_key, base_url=base_url)
        self._api_key = api_key
        headers = {"X-Api-Key": api_key, "Authorization": f"Bearer {api_key}"}
        self._http = httpx.Client(headers=headers, trust_env=backend != "embedded")

    def __repr__(self) -> str:
        return f"ControlPlane({self.backend!r}, {self.base_url!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()
        self.jobs.close()
        self.deployments.close()

    def job(self, job_id: str, timeout_s: float = CALL_TIMEOUT_S) -> Job | None:
        """A trainer job as the API describes it, or None when there is none of that id."""
        job: Job | None = self.call(f"looking at trainer {job_id}", lambda: self.jobs.try_get(job_id), timeout_s)
        return job

    def list_jobs(self, timeout_s: float = CALL_TIMEOUT_S) -> list[Job]:
        """All trainer jobs of the account."""
        return self._list("rlorTrainerJobs", timeout_s)

    def resume(self, job_id: str, timeout_s: float = CALL_TIMEOUT_S) -> Job | None:
        """Start a stopped trainer job again. None when the backend refuses: the job is gone, or cannot be resumed.

        One that runs is resumed: where an answer was lost, the backend refuses to do it a second time.
        """
        resumed = self._post_to_job(job_id, "resume", timeout_s, refusals=REFUSED_STATUSES)
        if resumed is None and (job := self.job(job_id, timeout_s)) is not None and job["state"] in _LIVE:
            return job
        return resumed

    def cancel(self, job_id: str, timeout_s: float = CALL_TIMEOUT_S) -> None:
        """Stop a trainer job, so that it can be resumed. Nothing happens when there is none, or it has stopped.

        Raises:
            ProvisioningError: the backend refuses, and the job goes on.
        """
        if self._post_to_job(job_id, "cancel", timeout_s, refusals=REFUSED_STATUSES) is not None:
            return
        job = self.job(job_id, timeout_s)
        if job is not None and job["state"] in _LIVE:
            raise self._error(f"cancelling trainer {job_id}", f"the backend refuses, and it is {job['state']}")

    def delete(self, job_id: str, timeout_s: float = CALL_TIMEOUT_S) -> None:
        """Delete a trainer job; its checkpoints stay. Nothing happens when there is none."""
        deadline = Deadline(timeout_s)
        path = f"{self._account_path(deadline)}/rlorTrainerJobs/{job_id}"
        self._request("DELETE", path, deadline, refusals=(404,))

    def list_checkpoints(self, job_id: str, timeout_s: float = CALL_TIMEOUT_S) -> list[dict[str, Any]]:
        """The checkpoints of a trainer job as the API describes them, oldest first; the job may be gone.

        [] when the backend knows neither the job nor a checkpoint of it. `sizeBytes` comes from the embedded one only.
        """
        return self._list(f"rlorTrainerJobs/{job_id}/checkpoints", timeout_s, refusals=(404,))

    def delete_checkpoint(self, job_id: str, name: str, kind: str, timeout_s: float = CALL_TIMEOUT_S) -> None:
        """Delete a checkpoint for ever; nothing happens when there is none. Only the embedded backend can do that.

        Args:
            kind: "state" or "sampler".

        Raises:
            ProvisioningError: the backend refuses ("HTTP 4.." in its text): one that is in use, for one; or is gone.
        """
        deadline = Deadline(timeout_s)
        path = f"{self._account_path(deadline)}/rlorTrainerJobs/{job_id}/checkpoints/{name}"
        self._request("DELETE", path, deadline, params={"kind": kind}, refusals=(404,))

    def trainer_url(self, job_id: str, timeout_s: float = CALL_TIMEOUT_S) -> str:
        """Where the trainer of a job answers."""
        account = self.account_id(timeout_s)
        return f"{self.jobs.trainer_gateway_url}/training/v1/rlorTrainerJobs/{account}/{job_id}"

    def is_healthy(self, trainer_url: str) -> bool:
        """Whether a trainer answers its health probe."""
        try:
            return self._http.get(f"{trainer_url}/api/v1/healthz", timeout=_HEALTH_TIMEOUT_S).status_code == 200
        except httpx.HTTPError:
            return False

    def deployment(self, deployment_id: str, timeout_s: float = CALL_TIMEOUT_S) -> Deployment | None:
        """A deployment as the API describes it, or None when there is none of that id."""
        deadline = Deadline(timeout_s)
        path = f"{self._account_path(deadline)}/deployments/{deployment_id}"
        return self._request("GET", path, deadline, refusals=(404,))

    def list_deployments(self, timeout_s: float = CALL_TIMEOUT_S) -> list[Deployment]:
        """All deployments of the account."""
        return self._list("deployments", timeout_s)

    def delete_deployment(self, deployment_id: str, timeout_s: float = CALL_TIMEOUT_S) -> bool:
        """Delete a deployment. False when there is none."""
        deadline = Deadline(timeout_s)
        path = f"{self._account_path(deadline)}/deployments/{deployment_id}"
        params = {"ignoreChecks": "true", "hard": "true"}
        return self._request("DELETE", path, deadline, params=params, refusals=(404,)) is not None

    def is_serving(self, model: str) -> bool:
        """Whether a deployment, by its name as a model, completes a prompt of two tokens."""
        body = {"model": model, "prompt": [1, 2], "max_tokens": 1, "temperature": 0.0}
        url = f"{self.deployments.inference_url}/inference/v1/completions"
        try:
            return self._http.post(url, json=body, timeout=_PROBE_TIMEOUT_S).status_code == 200
        except httpx.HTTPError:
            return False

    def completions_client(self) -> httpx.Client:
        """A client for `completions` and `chat/completions`, both below inference/v1.

        An answer may take any time, but after 600 s without a byte of it the deployment is given up: httpx.ReadTimeout.
        """
        return httpx.Client(**self._completions_options())

    def async_completions_client(self) -> httpx.AsyncClient:
        """As `completions_client`, for any number of requests at once."""
        return httpx.AsyncClient(**self._completions_options(), limits=httpx.Limits(max_connections=None))

    def deployment_manager(self) -> DeploymentManager:
        """Another manager of the SDK. Closing it ends whatever a call that was given up still does with it."""
        return DeploymentManager(api_key=self._api_key, base_url=self.base_url)

    def account_id(self, timeout_s: float = CALL_TIMEOUT_S) -> str:
        """The account that the key belongs to."""
        return self.call("looking up the account", lambda: str(self.jobs.account_id), timeout_s)

    def shape(self, training_shape_id: str, timeout_s: float = CALL_TIMEOUT_S) -> TrainingShapeProfile:
        """The newest validated version of a training shape: its context length and its hardware."""
        return self.call(
            f"looking up training_shape_id {training_shape_id!r}",
            lambda: self.jobs.resolve_training_profile(training_shape_id),
            timeout_s,
        )

    def call(self, what: str, function: Callable[[], T], timeout_s: float) -> T:
        """Call an idempotent method of the SDK with a deadline, again where the connection broke.

        Raises:
            ProvisioningError: it failed or was late; says what was being done. Not chained: the SDK's errors may hold
                the request, and so the key.
        """
        try:
            return insist(function, Deadline(timeout_s))
        except TimeoutError:
            problem = f"no answer within {timeout_s:.0f} s"
        except Exception as error:
            problem = problem_of(error)
        raise self._error(what, problem)

    def _completions_options(self) -> dict[str, Any]:
        return {
            "base_url": f"{self.deployments.inference_url}/inference/v1/",
            "headers": {"Authorization": f"Bearer {self._api_key}"},
            "timeout": httpx.Timeout(_ANSWER_TIMEOUT_S, connect=_PROBE_TIMEOUT_S, pool=None),
            "trust_env": self.backend != "embedded",
        }

    def _list(self, collection: str, timeout_s: float, refusals: Collection[int] = ()) -> list[dict[str, Any]]:
        deadline = Deadline(timeout_s)
        found: list[dict[str, Any]] = []
        token = ""
        while True:
            query = {"pageSize": "200"} | ({"pageToken": token} if token else {})
            path = f"{self._account_path(deadline)}/{collection}"
            page = self._request("GET", path, deadline, params=query, refusals=refusals) or {}
            found += page.get(collection.rpartition("/")[2], [])
            token = page.get("nextPageToken", "")
            if not token:
                return found

    def _post_to_job(self, job_id: str, verb: str, timeout_s: float, refusals: Collection[int]) -> Job | None:
        deadline = Deadline(timeout_s)
        path = f"{self._account_path(deadline)}/rlorTrainerJobs/{job_id}:{verb}"
        return self._request("POST", path, deadline, refusals=refusals)

    def _account_path(self, deadline: Deadline) -> str:
        return f"/v1/accounts/{self.account_id(deadline.remaining())}"

    def _request(
        self,
        method: str,
        path: str,
        deadline: Deadline,
        *,
        params: dict[str, str] | None = None,
        refusals: Collection[int] = (),
    ) -> dict[str, Any] | None:
        """Send an idempotent request, again where that may help, until the deadline. None for a status in `refusals`.

        Raises:
            ProvisioningError: any other answer, or none in time.
        """
        pause = _FIRST_PAUSE_S
        while True:
            try:
                timeout = deadline.for_call()
                answer = self._http.request(method, self.base_url + path, params=params, timeout=timeout)
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {error}"
            else:
                if answer.is_success:
                    return dict(answer.json()) if answer.content else {}
                if answer.status_code in refusals:
                    return None
                problem = _refusal(answer)
                if answer.status_code not in CONTROL_PLANE_STATUSES:
                    break
            if deadline.remaining() <= pause:
                break
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)
        raise self._error(f"{method} {path}", problem)

    def _error(self, what: str, problem: str) -> ProvisioningError:
        where = "" if self.base_url in problem else f" ({self.base_url})"
        return ProvisioningError(f"{what} failed{where}: {problem}".replace(self._api_key, "[key]"))


def insist(function: Callable[[], T], deadline: Deadline) -> T:
    """Call an idempotent method of the SDK, again where the connection broke. The SDK itself asks again only where no
    connection was made, none answered, or the status says so; it does not when an answer is lost on its way.

    Raises:
        TimeoutError: it is late; also whatever else it raises, in the end.
    """
    pause = _FIRST_PAUSE_S
    while True:
        try:
            return call_with_deadline(function, deadline.for_call())
        except httpx.TransportError:
            if deadline.remaining() <= pause:
                raise
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_S)


def problem_of(error: BaseException) -> str:
    """An error of the SDK in one text, with the backend's own words where it has some. May hold the key."""
    if isinstance(error, httpx.HTTPStatusError):
        return f"{error.request.method} {error.request.url.path}: {_refusal(error.response)}"
    return f"{error}" or type(error).__name__


def is_refused(error: ProvisioningError) -> bool:
    """Whether the backend has said no, for good, to what was asked."""
    status = _STATUS.search(str(error))
    return status is not None and int(status[1]) in REFUSED_STATUSES


def _refusal(answer: httpx.Response) -> str:
    request_id = answer.headers.get("x-request-id")
    which = f", request {request_id}" if request_id else ""
    return f"HTTP {answer.status_code}{which}: {_message(answer)}"


def _message(answer: httpx.Response) -> str:
    try:
        body = answer.json()
        return str(body["error"]["message"] if "error" in body else body.get("message") or body)
    except (ValueError, KeyError, TypeError, AttributeError):
        return answer.text[:500]
