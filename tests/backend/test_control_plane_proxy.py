"""The reverse proxy, against workers that echo: what passes through it, and what it says when a worker is gone."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import statistics
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from cookbook.backend.control_plane.workers import read_record
from tests.backend.conftest import JOBS, TRAINER, Backend, wait_until

MIB = 2**20


def kill_worker(backend: Backend, job_id: str, signum: signal.Signals) -> None:
    record = read_record(backend.paths.job_dir(job_id))
    assert record is not None
    os.kill(record.pid, signum)


def test_a_body_of_96_mib_arrives_whole_and_in_pieces(echo_backend: Backend) -> None:
    body = bytes(range(256)) * (96 * MIB // 256)

    answer = echo_backend.client.post(f"{TRAINER}/echo/api/v1/digest", content=body)

    assert answer.status_code == 200
    assert answer.json()["size"] == len(body)
    assert answer.json()["sha256"] == hashlib.sha256(body).hexdigest()
    assert answer.json()["pieces"] > 10


def test_a_chunked_body_arrives_whole(echo_backend: Backend) -> None:
    def pieces() -> Iterator[bytes]:
        for number in range(50):
            yield b"%d," % number

    answer = echo_backend.client.post(f"{TRAINER}/echo/api/v1/digest", content=pieces())

    expected = b"".join(b"%d," % number for number in range(50))
    assert answer.json()["sha256"] == hashlib.sha256(expected).hexdigest()


def test_method_path_query_and_headers_reach_the_worker_unchanged(echo_backend: Backend) -> None:
    answer = echo_backend.client.put(
        f"{TRAINER}/echo/api/v1/a%2Fb/c:d?x=1&y=%20", content=b"z", headers={"X-Idempotency-Key": "k1"}
    )

    assert answer.status_code == 207
    assert answer.headers["x-worker"] == "echo"
    seen = answer.json()
    assert (seen["method"], seen["raw_path"], seen["query"]) == ("PUT", "/api/v1/a%2Fb/c:d", "x=1&y=%20")
    assert seen["headers"]["x-idempotency-key"] == "k1"
    assert seen["headers"]["content-length"] == "1"


def test_a_bearer_token_reaches_the_worker_as_its_api_key(echo_backend: Backend) -> None:
    answer = httpx.get(
        f"{echo_backend.endpoint.base_url}{TRAINER}/echo/anything",
        headers={"Authorization": f"Bearer {echo_backend.token}"},
        trust_env=False,
    )

    assert answer.json()["headers"]["x-api-key"] == echo_backend.token
    assert "authorization" not in answer.json()["headers"]


def test_an_answer_is_passed_on_piece_by_piece(echo_backend: Backend) -> None:
    go = echo_backend.paths.job_dir("echo") / "go"
    with echo_backend.client.stream("GET", f"{TRAINER}/echo/api/v1/drip") as answer:
        pieces = answer.iter_raw()
        seen = b""
        while seen != b"first second ":
            seen += next(pieces)  # would wait for ever if the proxy collected the whole answer
        go.touch()
        assert b"".join(pieces) == b"third"


def test_small_answers_are_not_held_back(echo_backend: Backend) -> None:
    # Without TCP_NODELAY the kernel holds back the second part of an answer for 40 ms.
    for path in ("/v1/accounts", f"{TRAINER}/echo/api/v1/healthz"):
        with httpx.Client(
            base_url=echo_backend.endpoint.base_url, headers={"X-Api-Key": echo_backend.token}, trust_env=False
        ) as client:
            times = [client.get(path).elapsed.total_seconds() for _ in range(21)]
        assert statistics.median(times) < 0.025


def test_a_long_poll_is_dropped_when_its_client_goes_away(echo_backend: Backend) -> None:
    job_dir = echo_backend.paths.job_dir("held")
    host, port = echo_backend.endpoint.base_url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as client:
        head = f"POST {TRAINER}/held/api/v1/hold HTTP/1.1\r\nHost: x\r\nX-Api-Key: {echo_backend.token}\r\n"
        client.sendall(f"{head}Content-Length: 2\r\n\r\n{{}}".encode())
        wait_until((job_dir / "held").exists)
        assert not (job_dir / "dropped").exists()

    wait_until((job_dir / "dropped").exists)


def test_a_client_that_breaks_off_its_upload_harms_nobody(echo_backend: Backend) -> None:
    host, port = echo_backend.endpoint.base_url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as client:
        head = f"POST {TRAINER}/echo/api/v1/digest HTTP/1.1\r\nHost: x\r\nX-Api-Key: {echo_backend.token}\r\n"
        client.sendall(f"{head}Content-Length: 1000\r\n\r\nonly this".encode())

    assert echo_backend.client.post(f"{TRAINER}/echo/api/v1/digest", content=b"abc").json()["size"] == 3


def test_a_worker_that_dies_in_an_answer_breaks_the_answer_and_fails_the_job(echo_backend: Backend) -> None:
    with (
        pytest.raises(httpx.RemoteProtocolError),
        echo_backend.client.stream("GET", f"{TRAINER}/broken/api/v1/break_off") as answer,
    ):
        answer.read()

    answer = echo_backend.client.get(f"{TRAINER}/broken/api/v1/healthz")
    assert answer.status_code in (410, 503)  # 503 in the moment before its death is noticed
    echo_backend.wait_for_state("broken", "JOB_STATE_FAILED")
    assert echo_backend.client.get(f"{TRAINER}/broken/api/v1/healthz").status_code == 410


def test_a_long_poll_answers_410_when_its_worker_is_killed(echo_backend: Backend) -> None:
    with ThreadPoolExecutor(1) as pool:
        poll = pool.submit(echo_backend.client.post, f"{TRAINER}/polled/api/v1/hold", json={})
        wait_until((echo_backend.paths.job_dir("polled") / "held").exists)
        kill_worker(echo_backend, "polled", signal.SIGKILL)

        assert poll.result(timeout=10).status_code == 410


def test_a_killed_worker_fails_its_job_and_its_requests_answer_410(echo_backend: Backend) -> None:
    kill_worker(echo_backend, "killed", signal.SIGKILL)

    job = echo_backend.wait_for_state("killed", "JOB_STATE_FAILED")
    assert "ended unexpectedly" in str(job["statusMessage"])
    assert job["status"] == {"code": 13, "message": job["statusMessage"], "details": []}
    answer = echo_backend.client.post(f"{TRAINER}/killed/api/v1/forward", json={})
    assert answer.status_code == 410
    assert "trainer job killed is FAILED" in answer.json()["detail"]


def test_cancel_ends_the_worker_and_its_requests_answer_410(echo_backend: Backend) -> None:
    job_dir = echo_backend.paths.job_dir("cancelled")
    assert echo_backend.client.post(f"{JOBS}/cancelled:cancel").json()["state"] == "JOB_STATE_CANCELLED"

    assert (job_dir / "exit.json").exists()  # it was asked, not killed
    job = echo_backend.job("cancelled")
    assert job["statusMessage"] == "cancelled on request"
    assert echo_backend.client.get(f"{TRAINER}/cancelled/api/v1/healthz").status_code == 410


def test_a_deleted_job_is_a_tombstone(echo_backend: Backend) -> None:
    assert echo_backend.client.delete(f"{JOBS}/deleted").status_code == 200
    assert echo_backend.client.delete(f"{JOBS}/deleted").status_code == 200  # a repeated call finds it done

    assert echo_backend.job("deleted")["state"] == "JOB_STATE_DELETED"
    assert echo_backend.client.get(f"{TRAINER}/deleted/api/v1/healthz").status_code == 410
    assert echo_backend.client.get(f"{JOBS}/deleted/checkpoints").json() == {"checkpoints": [], "nextPageToken": ""}
    assert echo_backend.client.post(f"{JOBS}/deleted:cancel").json()["state"] == "JOB_STATE_DELETED"
    resumed = echo_backend.client.post(f"{JOBS}/deleted:resume")
    assert resumed.status_code == 400
    assert "was deleted and cannot be resumed" in resumed.json()["error"]["message"]


def test_an_unknown_job_or_account_is_not_found(echo_backend: Backend) -> None:
    assert echo_backend.client.get(f"{TRAINER}/nobody/api/v1/healthz").status_code == 404
    assert echo_backend.client.get("/training/v1/rlorTrainerJobs/other/echo/api/v1/healthz").status_code == 404


def test_the_token_is_in_no_log(echo_backend: Backend) -> None:
    logs = [path for path in echo_backend.paths.root.rglob("*.log") if path.is_file()]

    assert logs
    for log in logs:
        assert echo_backend.token not in log.read_text()
