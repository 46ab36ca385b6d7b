"""What is wrong with a request costs no other; what is not finite is null; a hard row, or a dead worker, holds nobody."""

import asyncio
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from test_checkpoints import FIT, refusal
from toy import Quadratic

import amortized
from amortized import checkpoint
from amortized.cli.app import main

pytest.importorskip("litserve")

from amortized.shipping.serve import NPZ, Limits, Service
from amortized.shipping.worker import answers


class Touchy(Quadratic):
    """Does not stand contexts above 50."""

    def objective(self, b, a):
        if (a > 50).any():
            raise ValueError("too large for me")
        return super().objective(b, a)


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        args = [arg.replace("toy.Quadratic", "test_ship_serve.Touchy") for arg in FIT]
        main([*args, "--data.num_val=200", "--trainer.max_steps=200", "--run_folder=run"])
    checkpoint.strip(max((folder / "run" / "checkpoints").glob("step=*.ckpt")), folder / "toy.ckpt")
    return folder / "toy.ckpt"


@pytest.fixture
def service(ckpt, monkeypatch):
    """The routes, with workers in this process."""
    service = Service(ckpt, 0.5, Limits(rows=100, megabytes=0.1, pending=8, deadline=1.0, timeout=5.0))
    service.solver = amortized.load(ckpt)

    async def ask(path, contexts, seconds):
        return answers(service.solver, [contexts], 0.5, path == "/network")[0]

    monkeypatch.setattr(service, "ask", ask)
    return service


def client(service):
    return httpx.AsyncClient(transport=httpx.ASGITransport(service.server.app), base_url="http://test")


def post(service, content, **headers):
    async def send():
        async with client(service) as http:
            return await http.post("/solve", content=content, headers=headers)

    return asyncio.run(send())


def test_one_bad_request_of_a_batch_is_told_alone(ckpt):
    solver = amortized.load(ckpt)
    a = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    good, touchy, other = {"": a}, {"": np.full((1, 3), 60, np.float32)}, {"": np.zeros((2, 5), np.float32)}
    found = answers(solver, [good, touchy, other, good], 0.5, by_network=False)
    assert "too large for me" in found[1]["error"]
    assert "has contexts of shape (2, 5)" in found[2]["error"]
    alone = answers(solver, [good], 0.5, by_network=False)[0]
    for place in (0, 3):
        assert all(np.allclose(found[place][name], alone[name], atol=1e-6) for name in alone if name != "path")
        assert (found[place]["path"] == alone["path"]).all()


def test_contexts_as_json_or_npz(service):
    a = np.random.default_rng(1).normal(size=(5, 3)).astype(np.float32)
    reply = post(service, json.dumps(a.tolist()))
    assert reply.status_code == 200
    columns = reply.json()
    answer = service.solver.solve(a, 0.5)
    assert np.allclose(columns["b"], answer.b, atol=1e-5)
    assert columns["path"] == answer.path.tolist()
    assert np.allclose(columns["decoded"], answer.decoded, atol=1e-5)
    packed = io.BytesIO()
    np.savez(packed, a=a)
    reply = post(service, packed.getvalue(), accept=NPZ)
    with np.load(io.BytesIO(reply.content)) as held:
        assert np.allclose(held["b"], answer.b, atol=1e-5)
    one = post(service, json.dumps({"a": a[0].tolist()})).json()
    assert np.shape(one["b"]) == (1, 3)


def test_what_is_not_finite_is_null_and_said(service):
    reply = post(service, "[[0, 0, 1], [null, 0, 0], [NaN, 1, 2]]")
    assert reply.status_code == 200
    found = json.loads(reply.content, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert found["b"][1] == [None] * 3
    assert found["finite"] == [True, False, False]
    assert found["path"][1:] == ["none", "none"]
    assert "2 rows have no finite solution: null" in found["notes"]


def test_a_thousand_malformed_requests_change_nothing(service):
    before = post(service, "[[1, 2, 3]]").json()
    draw = random.Random(0)
    given = [
        b"",
        b"[",
        b"{}",
        b"null",
        b'"x"',
        b"[[1,2]]",
        b'{"a": [[1,2,3]], "b": 1}',
        b"[[1,2,1e999]]",
        b"PK\x03\x04junk",
    ]
    given += [
        b'{"a": {"a": [1,2,3]}}',
        b"[" * 5000,
        b"[[1,2,3]]" * 2,
        b"[[[1,2,3]]]",
        b"[true]",
        b"[[1,2,[3]]]",
        b"\xff\xfe",
    ]

    async def send():
        codes = []
        async with client(service) as http:
            for _ in range(1000):
                body = draw.choice(given) if draw.random() < 0.5 else draw.randbytes(draw.randrange(60))
                reply = await http.post("/solve", content=body)
                codes.append(reply.status_code)
                assert reply.status_code in (200, 400), (body, reply.text)
                if reply.status_code == 400:
                    assert "\n" not in reply.json()["error"]
        return codes

    assert asyncio.run(send()).count(400) > 800
    assert post(service, "[[1, 2, 3]]").json() == before
    assert service.pending == 0


def test_a_request_has_limits(service):
    reply = post(service, json.dumps(np.zeros((101, 3)).tolist()))
    assert (reply.status_code, reply.json()["error"]) == (413, "a request has at most 100 contexts; got 101")
    assert post(service, b"[" + b" " * 200_000).status_code == 413
    packed = io.BytesIO()
    np.savez_compressed(packed, a=np.zeros((100_000, 3), np.float32))  # 1.2 MB in a kilobyte or so
    reply = post(service, packed.getvalue())
    assert (reply.status_code, "unpacks to 1.1" in reply.json()["error"]) == (413, True)

    async def many():
        async with client(service) as http:
            return await asyncio.gather(*(http.post("/solve", content="[[1, 2, 3]]") for _ in range(40)))

    codes = [reply.status_code for reply in asyncio.run(many())]
    assert set(codes) <= {200, 503}
    assert codes.count(200) >= 8


def test_a_hard_row_holds_no_other_and_has_a_deadline(service, monkeypatch):
    slow = service.ask

    async def ask(path, contexts, seconds):
        if path == "/solver":
            await asyncio.sleep(seconds)
            raise TimeoutError
        return await slow(path, contexts, seconds)

    monkeypatch.setattr(service, "ask", ask)

    async def both():
        async with client(service) as http:
            hard = asyncio.create_task(http.post("/solve", content="[[40, 0, 0], [0, 0, 0.1]]"))
            began = time.monotonic()
            easy = await http.post("/solve", content="[[0, 0, 0.1]]")
            seconds = time.monotonic() - began
            return await hard, easy, seconds

    hard, easy, seconds = asyncio.run(both())
    assert seconds < 0.9  # not the deadline of the other
    assert easy.json()["path"] == ["network"]
    assert hard.json()["path"] == ["none", "network"]
    assert "were not solved in 1 s" in hard.json()["notes"][0]


def test_health_info_and_the_page(service):
    async def get():
        async with client(service) as http:
            return [await http.get(path) for path in ("/health", "/info", "/", "/docs", "/network", "/shutdown")]

    health, info, page, *others = asyncio.run(get())
    assert health.json()["status"] == "ok"
    about = info.json()
    assert about["certificate"]["kind"] == "conformal"
    assert about["gap"] > 0
    assert about["contexts"] == {"a": ["B", 3]}
    assert "curl -X POST" in page.text
    assert [reply.status_code for reply in others] == [404, 404, 404]


def test_what_cannot_be_served_is_refused_in_one_line(ckpt, capsys):
    assert "--port is from 1024" in refusal(capsys, "serve", f"--ckpt_path={ckpt}", "--port=80")
    assert "tol must be positive" in refusal(capsys, "serve", f"--ckpt_path={ckpt}", "--tol=-1")


@pytest.fixture(scope="module")
def server(ckpt):
    """A real one, in processes of its own: its address, and its process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    args = ["serve", f"--ckpt_path={ckpt}", "--tol=0.5", f"--port={port}", "--timeout=120", "--max_pending=1000"]
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    with (ckpt.parent / "serve.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "amortized", *args], stdout=log, stderr=log, env=os.environ | {"PYTHONPATH": path}
        )
    address = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready(address, process)
        yield address, process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        finally:
            process.kill()


def wait_until_ready(address, process, seconds=240):
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        try:
            if httpx.get(f"{address}/health", timeout=20).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.5)
    raise AssertionError("the server is not ready")


def children(process):
    """The processes that it started, by id, those of the workers first."""
    found = subprocess.run(
        ["ps", "-o", "pid=,args=", "--ppid", str(process.pid)], capture_output=True, text=True
    ).stdout
    return [int(line.split()[0]) for line in found.splitlines() if "spawn_main" in line]


@pytest.mark.slow
def test_a_server_answers_many_at_once_and_survives_bad_requests_and_dead_workers(server, ckpt):
    address, process = server
    solver = amortized.load(ckpt)
    a = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    expected = solver.solve(a.numpy(), 0.5)

    def ask(row):
        bad = row % 8 == 7
        content = "[[1, 2" if bad else json.dumps(a[row : row + 1].tolist())
        reply = httpx.post(f"{address}/solve", content=content, timeout=120)
        assert reply.status_code == (400 if bad else 200), reply.text
        return None if bad else reply.json()

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(ask, range(64)))
    for row, columns in enumerate(found):
        assert columns is None or np.allclose(columns["b"][0], expected.b[row], atol=1e-3)
    with ThreadPoolExecutor(16) as pool:  # while requests are under way
        waiting = [pool.submit(ask, row % 64) for row in range(200)]
        for pid in children(process)[-2:]:
            os.kill(pid, signal.SIGKILL)
        for one in waiting:
            one.result(timeout=120)  # nobody hangs
    assert httpx.get(f"{address}/health", timeout=60).json()["status"] == "ok"
