"""Gateways as processes: killed, stopped, two on one database. Nothing is lost, and nothing is made twice without a reason."""

from __future__ import annotations

import collections
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import sqlalchemy as sql
from gateway_doubles import mesh_of

from hunyuan3d_gateway.database import Database, jobs
from hunyuan3d_gateway.jobs import State
from hunyuan3d_gateway.settings import Settings

PROGRAM = Path(__file__).parent / "gateway_process.py"
WAIT_S = 240.0
LEASE_S = 8.0  # longer than a busy test machine keeps a process from its heartbeat
JOBS = 50


class Gateways:
    """Gateways on one database and one folder."""

    def __init__(self, folder: Path, database: str) -> None:
        self.folder, self.database, self.processes = folder, database, list[subprocess.Popen[str]]()
        self.clients: list[httpx2.Client] = []

    def start(self, *, seconds: float = 0.4, **settings: Any) -> httpx2.Client:
        """A gateway, and a client of it."""
        given = {"data": str(self.folder / "data"), "database": self.database, "lease_s": LEASE_S, "running": 6, **settings}
        command = [sys.executable, str(PROGRAM), str(self.folder / "log"), str(seconds)]
        command += [f"{name}={json.dumps(value)}" for name, value in given.items()]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.processes.append(process)
        assert process.stdout is not None
        self.clients.append(httpx2.Client(base_url=process.stdout.readline().strip(), timeout=WAIT_S))
        return self.clients[-1]

    def log(self) -> list[Any]:
        return (
            [json.loads(line) for line in (self.folder / "log").read_text().splitlines()]
            if (self.folder / "log").exists()
            else []
        )

    def stop(self) -> None:
        for client in self.clients:
            client.close()
        for process in self.processes:
            process.kill()
            process.wait(timeout=60)
            assert process.stdout is not None
            process.stdout.close()


@pytest.fixture
def gateways(tmp_path: Path, database: str) -> Iterator[Gateways]:
    found = Gateways(tmp_path, database)
    yield found
    found.stop()


def until(true: Callable[[], bool], message: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < deadline, message
        time.sleep(0.1)


def submit(client: httpx2.Client, count: int) -> list[str]:
    ids = []
    for seed in range(count):
        found = client.post("/v1/meshes", json={"prompt": "torus", "seed": seed})
        assert found.status_code == 200, found.text
        ids.append(str(found.json()["id"]))
    return ids


def states(client: httpx2.Client, ids: list[str]) -> collections.Counter[str]:
    return collections.Counter(client.get(f"/v1/meshes/{id}").json()["status"] for id in ids)


def made(gateways: Gateways) -> list[str]:
    return [id for what, id, *_ in gateways.log() if what == "made"]


def check_all(client: httpx2.Client, ids: list[str]) -> None:
    """Every job is completed, with its own mesh."""
    until(lambda: states(client, ids)["completed"] == len(ids), "every job must end well")
    for seed, id in enumerate(ids):
        assert client.get(f"/v1/meshes/{id}/content").content == mesh_of(seed).data


def check_never_at_the_same_time(gateways: Gateways, killed: set[int]) -> None:
    """A job that was begun twice was begun again only after the process that had begun it was killed."""
    begun = collections.defaultdict(list)
    for what, id, attempt, process, _ in gateways.log():
        if what == "begun":
            begun[id].append((attempt, process))
    for id, times in begun.items():
        assert all(process in killed for _, process in times[:-1]), id
        assert [attempt for attempt, _ in times] == list(range(1, len(times) + 1))


def completed(database: str) -> set[str]:
    """The jobs that are completed, as the database itself tells while no gateway runs."""
    opened = Database(Settings(database=database).database_url)
    query = sql.select(jobs.c.id).where(jobs.c.state == State.COMPLETED.value)
    found = opened.run_here(lambda connection: {row.id for row in connection.execute(query)})
    opened.close()
    return found


def test_a_gateway_killed_under_fifty_jobs_loses_and_doubles_nothing(gateways: Gateways) -> None:
    client = gateways.start(seconds=1.5)
    ids = submit(client, JOBS)
    until(lambda: len(made(gateways)) >= 8, "some meshes must be made")
    gateways.processes[0].send_signal(signal.SIGKILL)
    gateways.processes[0].wait()
    done = completed(gateways.database)
    assert 0 < len(done) < JOBS
    check_all(gateways.start(), ids)  # finished results are intact, and the others are made
    begun = collections.Counter(id for what, id, *_ in gateways.log() if what == "begun")
    twice = {id for id, count in begun.items() if count > 1}
    assert len(twice) <= 6 and not twice & done, "only what ran at the time runs again"
    check_never_at_the_same_time(gateways, {gateways.processes[0].pid})


@pytest.mark.slow
def test_two_gateways_share_the_work_and_one_takes_over(gateways: Gateways) -> None:
    one, two = gateways.start(), gateways.start()
    ids = submit(one, JOBS // 2) + submit(two, JOBS // 2)
    until(lambda: len(made(gateways)) >= 6, "some meshes must be made")
    gateways.processes[0].send_signal(signal.SIGKILL)
    gateways.processes[0].wait()
    until(lambda: states(two, ids)["completed"] == len(ids), "the other gateway must finish everything")
    assert len({process for what, _, _, process, _ in gateways.log() if what == "begun"}) == 2
    check_never_at_the_same_time(gateways, {gateways.processes[0].pid})
    assert max(collections.Counter(made(gateways)).values()) <= 2


@pytest.mark.slow
def test_a_job_that_kills_its_gateway_fails_by_name(gateways: Gateways) -> None:
    client = gateways.start(seconds=100, attempts=1)
    (id,) = submit(client, 1)
    until(lambda: bool(gateways.log()), "the job must begin")
    gateways.processes[0].kill()
    gateways.processes[0].wait()
    again = gateways.start(attempts=1)
    until(lambda: again.get(f"/v1/meshes/{id}").json()["status"] == "failed", "it must not be in progress for ever")
    assert again.get(f"/v1/meshes/{id}").json()["error"]["code"] == "gateway_lost"
    assert again.get(f"/status/{id}").json()["status"] == "error"


@pytest.mark.slow
def test_a_delete_at_one_gateway_stops_a_job_of_another(gateways: Gateways) -> None:
    one = gateways.start(seconds=100)
    (id,) = submit(one, 1)
    until(lambda: bool(gateways.log()), "the job must begin")
    two = gateways.start(seconds=100)
    assert two.delete(f"/v1/meshes/{id}").json()["status"] == "deleted"
    until(lambda: gateways.log()[-1][0] == "stopped", "its gateway must stop it")
    until(lambda: one.get(f"/v1/jobs/{id}").json()["state"] == "deleted", "and write it down")


@pytest.mark.slow
def test_sigterm_gives_running_jobs_back(gateways: Gateways) -> None:
    client = gateways.start(seconds=100, drain_s=0.5)
    ids = submit(client, 3)
    until(lambda: len(gateways.log()) == 3, "the jobs must begin")
    gateways.processes[0].send_signal(signal.SIGTERM)
    assert gateways.processes[0].wait(timeout=60) == 0
    check_all(gateways.start(seconds=0.1), ids)
    assert {attempt for _, _, attempt, _, _ in gateways.log()} == {1}, "as if they had not been begun before"
