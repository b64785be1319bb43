"""The life of jobs of one kind: starting workers, watching them, and recording in the store what became of them.

Not here: reading requests (job_request.py, deployment_request.py), HTTP (jobs.py, deployments.py), processes
(workers.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import httpx

from cookbook.backend.control_plane import workers
from cookbook.backend.control_plane.store import LIVE_STATES, Job, JobState, Store
from cookbook.backend.control_plane.workers import WorkerRecord

__all__ = ["Lifecycle"]

logger = logging.getLogger(__name__)

_START_TIMEOUT_S = 900.0  # loading a model from a slow disk takes minutes; longer than this is a hang
_STARTING_POLL_S = 0.05
_RUNNING_POLL_S = 0.5
_HEALTH_TIMEOUT_S = 2.0


class Lifecycle:
    """All trainer jobs, or all deployments, of one control plane. `folder` says where the files of a job lie;
    `clean_up` removes what a worker that was killed has left half-written, and is called when no worker lives.

    What is recorded comes first: a state is stored before the processes are made to agree with it, and `reattach` makes
    them agree again after a kill in between.
    """

    def __init__(
        self,
        kind: str,
        folder: Callable[[str], Path],
        store: Store,
        client: httpx.AsyncClient,
        token: str,
        clean_up: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._kind = kind
        self._folder = folder
        self._store = store
        self._client = client
        self._token = token
        self._clean_up = clean_up
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._workers: dict[str, WorkerRecord] = {}
        self._watches: dict[str, asyncio.Task[None]] = {}
        self._guards: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    def launch(self, job: Job) -> None:
        """Start the worker of a job that is CREATING, and watch it."""
        if (watch := self._watches.pop(job.job_id, None)) is not None:
            watch.cancel()
        job = self._store.set_worker(job, None)
        try:
            child = workers.start(self._folder(job.job_id), job.spec, kind=self._kind, token=self._token)
        except OSError as error:
            self._store.set_state(job, JobState.FAILED, f"the {self._kind}'s process could not be started: {error}")
            return
        self._children[job.job_id] = child
        self._workers.pop(job.job_id, None)
        job = self._store.set_worker(job, child.pid)
        logger.info("%s %s: started worker %d", self._kind, job.job_id, child.pid)
        self._watches[job.job_id] = asyncio.create_task(self._watch(job.job_id))

    async def settled(self, job_id: str, timeout_s: float) -> Job:
        """The job once it has left CREATING, or as it is after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        job = self._job(job_id)
        while job.state == JobState.CREATING and time.monotonic() < deadline:
            await asyncio.sleep(_STARTING_POLL_S)
            # None: removed meanwhile.
            job = self._store.job(job_id, self._kind) or replace(job, state=JobState.DELETED)
        return job

    async def resume(self, job_id: str) -> Job:
        """Start a stopped job again, with a new worker. A job that is live already stays as it is."""
        async with self._guards[job_id]:
            job = self._job(job_id)
            if not job.is_live:
                await self._end_worker(job)  # one that outlived a control plane killed in the middle of a cancel
                self.launch(self._store.set_state(job, JobState.CREATING, ""))
            return self._job(job_id)

    async def end(self, job_id: str, state: str, message: str) -> Job:
        """Record that a job is over (CANCELLED, FAILED or DELETED), then end its worker.

        A job that is over keeps its state and message when it is cancelled; a DELETED one stays DELETED.
        """
        async with self._guards[job_id]:
            return await self._end(self._job(job_id), state, message)

    async def remove(self, job: Job) -> None:
        """End a job's worker and forget the job: its id is free again, its folder stays."""
        async with self._guards[job.job_id]:
            found = self._store.job(job.job_id, self._kind)
            if found is None or found.created != job.created:  # somebody else was faster, and may have made it anew
                return
            await self._end(found, JobState.DELETED, "removed on request")
            if (watch := self._watches.pop(job.job_id, None)) is not None:
                watch.cancel()
            self._store.remove_job(found)

    def worker(self, job_id: str) -> WorkerRecord | None:
        """Where the worker of a job answers, or None while it is starting or when there is none."""
        return self._workers.get(job_id)

    def job(self, job_id: str) -> Job | None:
        """The job as it is recorded, None when there is none."""
        return self._store.job(job_id, self._kind)

    def look(self, job_id: str) -> Job | None:
        """The job as it is now, None when there is none: when its worker has died, that is recorded first."""
        job = self._store.job(job_id, self._kind)
        if job is None or not job.is_live or workers.is_alive(self._folder(job_id)):
            return job
        return self._record_end(job)

    def jobs(self) -> list[Job]:
        """All jobs as they are now, oldest first."""
        looked = [self.look(job.job_id) for job in self._store.jobs(kind=self._kind)]
        return [job for job in looked if job is not None]

    def reattach(self) -> None:
        """Take up the jobs of an earlier control plane: watch live workers, record dead ones, end unwanted ones."""
        for job in self._store.jobs(kind=self._kind):
            alive = workers.is_alive(self._folder(job.job_id))
            if job.is_live:
                if alive:
                    # CREATING until it has answered: its record may be missing still.
                    self._store.set_state(job, JobState.CREATING, job.status_message)
                self._watches[job.job_id] = asyncio.create_task(self._watch(job.job_id))
            elif alive:
                self._watches[job.job_id] = asyncio.create_task(self._end_worker(job))

    async def stop_all(self, message: str) -> None:
        """End every live job, side by side."""
        live = self._store.jobs(LIVE_STATES, kind=self._kind)
        ends = [self.end(job.job_id, JobState.CANCELLED, message) for job in live]
        for error in await asyncio.gather(*ends, return_exceptions=True):
            if isinstance(error, BaseException):
                logger.error("while stopping: %s", error)
        for watch in self._watches.values():
            watch.cancel()

    async def _watch(self, job_id: str) -> None:
        """Follow one worker from its start to its end, also over a disk that is full or a table of files that is."""
        give_up = time.monotonic() + _START_TIMEOUT_S
        while True:
            try:
                await self._follow(job_id, give_up)
                return
            except (OSError, sqlite3.Error) as error:
                logger.error("%s %s: cannot be watched: %s; trying again", self._kind, job_id, error)
                await asyncio.sleep(_RUNNING_POLL_S)

    async def _follow(self, job_id: str, give_up: float) -> None:
        while (job := self.look(job_id)) is not None and job.is_live:
            if job.state == JobState.RUNNING:
                await asyncio.sleep(_RUNNING_POLL_S)
            elif (record := await self._answering(job_id)) is not None:
                self._record_ready(job_id, record)
            elif time.monotonic() >= give_up:
                await self.end(
                    job_id, JobState.FAILED, f"the {self._kind} was not ready after {_START_TIMEOUT_S:.0f} s"
                )
            else:
                await asyncio.sleep(_STARTING_POLL_S)
        async with self._guards[job_id]:  # no worker is started meanwhile
            if not workers.is_alive(self._folder(job_id)):
                with contextlib.suppress(OSError):  # the next worker tries again
                    await asyncio.to_thread(self._clean_up, job_id)

    async def _answering(self, job_id: str) -> WorkerRecord | None:
        """The worker's record when it answers its health check, else None."""
        record = workers.read_record(self._folder(job_id))
        if record is None:
            return None
        with contextlib.suppress(httpx.HTTPError):
            answer = await self._client.get(
                f"{record.base_url}/api/v1/healthz", headers={"X-Api-Key": self._token}, timeout=_HEALTH_TIMEOUT_S
            )
            if answer.status_code == 200:
                return record
        return None

    def _record_ready(self, job_id: str, record: WorkerRecord) -> None:
        job = self._store.job(job_id, self._kind)
        if job is not None and job.state == JobState.CREATING:  # not cancelled while the health check was under way
            self._workers[job_id] = record
            self._store.set_state(job, JobState.RUNNING, "")
            logger.info("%s %s: running on port %d", self._kind, job_id, record.port)

    def _record_end(self, job: Job) -> Job:
        self._workers.pop(job.job_id, None)
        end = workers.end_of(self._folder(job.job_id), self._reap(job.job_id), kind=self._kind)
        logger.info("%s %s: %s", self._kind, job.job_id, end.message)
        return self._store.set_state(job, JobState.CANCELLED if end.on_purpose else JobState.FAILED, end.message)

    async def _end(self, job: Job, state: str, message: str) -> Job:
        if job.state != JobState.DELETED and (job.is_live or state == JobState.DELETED):
            job = self._store.set_state(job, state, message)
            logger.info("%s %s: %s, %s", self._kind, job.job_id, state, message)
        await self._end_worker(job)
        return job

    async def _end_worker(self, job: Job) -> None:
        self._workers.pop(job.job_id, None)
        try:
            await workers.terminate(self._folder(job.job_id), job.worker_pid)
        except TimeoutError as error:
            logger.error("%s %s: %s", self._kind, job.job_id, error)
        self._reap(job.job_id)

    def _reap(self, job_id: str) -> int | None:
        """The exit status of a worker that has ended, when it was our child."""
        child = self._children.pop(job_id, None)
        if child is None:
            return None
        with contextlib.suppress(subprocess.TimeoutExpired):
            return child.wait(timeout=1.0)  # it let go of its lock, so it is as good as gone
        return None

    def _job(self, job_id: str) -> Job:
        job = self._store.job(job_id, self._kind)
        assert job is not None, job_id
        return job
