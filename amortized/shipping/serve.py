"""``amortized serve``: contexts in by HTTP, solutions out, each with its certificate and where it comes from.

    ``POST /solve``: contexts as JSON (``{"a": [...]}``, or a list for each field) or as an ``.npz`` file; back come columns
    ``b``, ``objective``, ``certificate``, ``path``, ...; ``GET /health`` solves one context, ``GET /info`` says what is served,
    ``GET /`` is a page to try it on.

LitServe has the processes and their queues: those that predict and certify, requests batched; and those of the solver, to
which the rows go that the network did not solve, so that they hold no other request. A row that the solver does not finish
by the deadline is answered with the network's prediction, and says so. What is wrong with a request is told in its answer, and
touches no other; numbers that JSON does not have are ``null``.
"""

from __future__ import annotations

import asyncio
import io
import json
import multiprocessing
import os
import signal
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import litserve
import numpy as np
import torch
from fastapi import Request, Response
from litserve.server import RegularRequestHandler
from starlette.concurrency import run_in_threadpool

from amortized.certificates.conformal import ASSUMPTION
from amortized.checkpoint import sha256
from amortized.contexts.files import as_contexts, fields
from amortized.contract import ProblemError, num_rows
from amortized.shipping.load import load
from amortized.shipping.page import page
from amortized.shipping.trained import TrainedSolver
from amortized.shipping.worker import Worker, rows_of, split

NPZ = "application/x-npz"


@dataclass(frozen=True)
class Limits:
    """What a server takes on."""

    rows: int = 4096
    """Contexts in a request."""
    megabytes: float = 16
    """Of a request, unpacked."""
    pending: int = 256
    """Requests at a time."""
    deadline: float = 10.0
    """Seconds that the solver has for the rows of a request."""
    timeout: float = 60.0
    """Seconds after which a request is given up."""


class Refused(Exception):
    """A request that gets an error for an answer: its HTTP status, and one line."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


class Service:
    """The routes of a server, and its two kinds of workers."""

    def __init__(
        self,
        checkpoint: Path,
        tol: float,
        limits: Limits,
        workers: int = 1,
        solvers: int = 1,
        batch_timeout: float = 0.002,
    ) -> None:
        solver = load(checkpoint)
        self.like, self.limits, self.tol = solver.like, limits, tol
        self.about = about(solver, checkpoint, tol, limits)
        network = Worker(
            str(checkpoint), tol, True, api_path="/network", max_batch_size=64, batch_timeout=batch_timeout
        )
        rest = Worker(str(checkpoint), tol, False, api_path="/solver", max_batch_size=8, batch_timeout=batch_timeout)
        self.server = litserve.LitServer(
            [network, rest],
            accelerator="auto" if torch.cuda.is_available() else "cpu",
            workers_per_device={"/network": workers, "/solver": solvers},
            timeout=limits.timeout,
            restart_workers=True,
            disable_openapi_url=True,
        )
        self.handlers = {api.api_path: RegularRequestHandler(api, self.server) for api in (network, rest)}
        self.pending = 0
        app = self.server.app
        app.router.routes.clear()  # LitServe's own: the workers are asked through the handlers alone
        for path, answer, method in (
            ("/", self.index, "GET"),
            ("/health", self.health, "GET"),
            ("/info", self.info, "GET"),
            ("/solve", self.solve, "POST"),
        ):
            app.add_api_route(path, answer, methods=[method], response_model=None)

    # ---- routes

    async def index(self) -> Response:
        """The page."""
        example = {name or "a": leaf[0].tolist() for name, leaf in fields(self.like).items()}
        return Response(page(self.about, json.dumps(example)), media_type="text/html")

    async def info(self) -> Response:
        """What is served."""
        return answer(200, self.about)

    async def health(self) -> Response:
        """Whether a context is solved now."""
        began = time.perf_counter()
        try:
            request = {name: leaf.numpy() for name, leaf in fields(self.like).items()}
            found = await self.ask("/network", request, self.limits.deadline)
        except (Refused, TimeoutError) as error:
            return answer(503, {"status": "not ready", "error": str(error) or "no answer in time"})
        if "error" in found:
            return answer(503, {"status": "failing", "error": found["error"]})
        return answer(200, {"status": "ok", "seconds": round(time.perf_counter() - began, 4)})

    async def solve(self, request: Request) -> Response:
        """Solve the contexts of a request."""
        if self.pending >= self.limits.pending:
            return answer(503, {"error": f"busy with {self.pending} requests: ask again later"})
        self.pending += 1
        try:
            body = await self.body(request)
            contexts = await run_in_threadpool(self.read, body, request.headers.get("content-type", ""))
            columns, notes = await asyncio.wait_for(self.answer(contexts), self.limits.timeout)
            if NPZ in request.headers.get("accept", ""):
                packed = io.BytesIO()
                np.savez(packed, **columns)  # type: ignore[arg-type]
                return Response(packed.getvalue(), media_type=NPZ)
            return await run_in_threadpool(answer, 200, columns | {"notes": notes})
        except Refused as error:
            return answer(error.status, {"error": str(error)})
        except TimeoutError:
            return answer(503, {"error": f"no answer in {self.limits.timeout:g} s: ask again later"})
        finally:
            self.pending -= 1

    # ---- what they do

    async def body(self, request: Request) -> bytes:
        """The whole of a request, unless it is too large."""
        most = int(self.limits.megabytes * 2**20)
        if (length := request.headers.get("content-length", "0")).isdigit() and int(length) > most:
            raise Refused(413, f"a request has at most {self.limits.megabytes:g} MB; got {int(length) / 2**20:.1f}")
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > most:
                raise Refused(413, f"a request has at most {self.limits.megabytes:g} MB")
            parts.append(part)
        return b"".join(parts)

    def read(self, body: bytes, kind: str) -> dict[str, np.ndarray]:
        """The contexts of a request, by field."""
        try:
            given = _npz(body, self.limits) if body[:4] == b"PK\x03\x04" or NPZ in kind else _json(body)
            a = as_contexts(given, self.like)
        except ProblemError as error:
            raise Refused(400, str(error)) from error
        if num_rows(a) > self.limits.rows:
            raise Refused(413, f"a request has at most {self.limits.rows} contexts; got {num_rows(a)}")
        return {name: leaf.numpy() for name, leaf in fields(a).items()}

    async def answer(self, contexts: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[str]]:
        """The columns for these contexts, by the network, and where it fails by the solver; and what is to be said."""
        columns = _sound(await self.ask("/network", contexts, self.limits.timeout))
        hard, notes = columns["path"] == "none", []
        if hard.any():
            try:
                rest = await self.ask("/solver", rows_of(contexts, hard), self.limits.deadline)
                columns = split(columns, hard, _sound(rest))
            except TimeoutError:
                notes.append(
                    f"{int(hard.sum())} rows were not solved in {self.limits.deadline:g} s: theirs is the network's prediction"
                )
        if (lost := int((columns["path"] == "none").sum())) and not notes:
            notes.append(f"{lost} rows do not meet the tolerance {self.tol:g}: their path is none")
        if bad := int((~columns["finite"]).sum()):
            notes.append(f"{bad} rows have no finite solution: null")
        return columns, notes

    async def ask(self, path: str, contexts: dict[str, np.ndarray], seconds: float) -> dict[str, Any]:
        """What a worker answers; one that dies over it is started again by LitServe, and asked again here.

        Raises:
            TimeoutError: if none answers in time.
        """
        end = time.monotonic() + seconds
        while True:
            task = asyncio.ensure_future(self.handlers[path].handle_request(contexts, dict))
            try:
                while not task.done():
                    left = end - time.monotonic()
                    if left <= 0:
                        raise TimeoutError
                    await asyncio.wait({task}, timeout=min(left, 0.5))
                    if not task.done() and not self.ready(path):
                        break
                if task.done():
                    found: dict[str, Any] = task.result()
                    return found
            except litserve.server.HTTPException as error:
                if error.status_code == 504:
                    raise TimeoutError from error
                raise Refused(500, "the worker failed; its log says why") from error
            finally:
                task.cancel()
            while not self.ready(path):
                if time.monotonic() > end:
                    raise TimeoutError
                await asyncio.sleep(0.2)

    def ready(self, path: str) -> bool:
        """Whether all workers of a kind are there."""
        states = self.server.workers_setup_status
        return all(str(state) == "ready" for name, state in states.items() if name.startswith(path[1:]))


def about(solver: TrainedSolver, checkpoint: Path, tol: float, limits: Limits) -> dict[str, Any]:
    """What ``/info`` says."""
    calibration = solver.calibration
    network = calibration.network
    return {
        "recipe": solver.name,
        "problem": type(solver.module).__name__,
        "objective": solver.module.objective_name,
        "checkpoint": sha256(checkpoint),
        "tol": tol,
        "gap": calibration.gap,
        "certificate": {
            "kind": network.kind,
            "alpha": network.alpha,
            "calibrated_on": network.n,
            "assumption": ASSUMPTION,
        },
        "contexts": {name or "a": ["B", *leaf.shape[1:]] for name, leaf in fields(solver.like).items()},
        "limits": {"rows": limits.rows, "megabytes": limits.megabytes, "deadline": limits.deadline},
    }


def answer(status: int, content: dict[str, Any]) -> Response:
    """JSON, in which what is not finite is ``null``."""
    plain = {name: _plain(value) for name, value in content.items()}
    return Response(json.dumps(plain, allow_nan=False), status_code=status, media_type="application/json")


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        if value.dtype.kind == "f" and not (known := np.isfinite(value)).all():
            value = value.astype(object)
            value[~known] = None
        return value.tolist()
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _sound(found: dict[str, Any]) -> dict[str, np.ndarray]:
    if "error" in found:
        raise Refused(400, found["error"])
    return found


def _json(body: bytes) -> Any:
    try:
        given = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ProblemError(f"what was given is no JSON, and no .npz file: {error}") from error
    if isinstance(given, dict):
        given = {name: _numbers(values) for name, values in given.items()}
        return given
    return _numbers(given)


def _numbers(values: Any) -> Any:
    """An array in which ``null`` is a number that is not known."""
    if isinstance(values, dict):
        return {name: _numbers(part) for name, part in values.items()}
    try:
        array = np.array(values)
        return np.array(values, np.float64) if array.dtype == object else array
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ProblemError(f"what was given holds other things than numbers: {str(error).splitlines()[0]}") from error


def _npz(body: bytes, limits: Limits) -> dict[str, np.ndarray]:
    try:
        with zipfile.ZipFile(io.BytesIO(body)) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > limits.megabytes * 2**20:
            raise Refused(
                413, f"a request has at most {limits.megabytes:g} MB; this file unpacks to {size / 2**20:.1f}"
            )
        with np.load(io.BytesIO(body), allow_pickle=False) as held:
            return dict(held)
    except Refused:
        raise
    except Exception as error:  # numpy, zipfile and zlib have one for every kind of damage
        raise ProblemError(f"what was given is no readable .npz file: {error}") from error


def stop(signum: int, frame: Any) -> None:
    """End at once, with all processes: LitServe's own end waits for connections, and for workers. A server keeps nothing."""
    for process in multiprocessing.active_children():
        process.kill()
    os._exit(0 if signum == signal.SIGINT else 128 + signum)


def serve(service: Service, host: str, port: int) -> None:
    """Run until the process is told to stop."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    service.server.run(
        host=host,
        port=port,
        num_api_servers=1,
        log_level="warning",
        generate_client_file=False,
        access_log=False,
        timeout_keep_alive=30,
    )
