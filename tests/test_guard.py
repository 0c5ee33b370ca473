"""Who may call which route, over a real port: no route of the real application is unguarded."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.routing import BaseRoute, Mount

from client.api import Client
from http_api.scopes import ROWS, Need, need_of
from jobs.database import Database, open_database
from jobs.keys import SCOPES, KeyStore, Scope
from tests.conftest import ROOT, ServerProcess, serving
from tests.test_http_api import NOTES, problem_of

OPEN = {"/", "/docs", "/healthz", "/livez", "/openapi.json", "/readyz", "/static_content/x"}
"""What needs no key; `http_api.scopes` says why."""

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND")


def routes_of(routes: list[BaseRoute], prefix: str = "") -> Iterator[str]:
    """Every path, with `x` for what varies; of a mounted application its own."""
    for route in routes:
        path = prefix + re.sub(r"\{[^}]*\}", "x", getattr(route, "path", None) or "")
        below = getattr(route, "routes", None)
        if below:
            yield from routes_of(below, path)
        else:
            yield path + "/x" if isinstance(route, Mount) else path


def every_path() -> list[str]:
    """Those of FastAPI and of BentoML, as the real service serves them."""
    from service import Remix

    service: Any = Remix
    return sorted(set(routes_of(service.to_asgi(is_main=True).routes)))


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The HTTP face over a fake composer, with keys on."""
    folder = tmp_path_factory.mktemp("guarded")
    command = [sys.executable, "-m", "bentoml", "serve", "tests.fakes:FakeRemix"]
    with serving(command, folder, ready_s=60.0, environment={"PHILHARMONICS_KEYS": "on"}) as server:
        yield server


async def keys_of(
    server: ServerProcess, wanted: dict[str, tuple[Scope, ...]], jobs_at_once: int = 10**6
) -> dict[str, str]:
    """Keys by name, made beside the running server."""
    database = Database(open_database(f"sqlite:///{server.temp_dir.parent / 'data/jobs.db'}"))
    try:
        store = KeyStore(database)
        return {
            name: (await store.add(name, scopes, 10**6, jobs_at_once))[0]
            for name, scopes in wanted.items()
        }
    finally:
        database.close()


@pytest.fixture(scope="module")
def keys(guarded: ServerProcess) -> dict[str, str]:
    """A key of each scope, and one of all."""
    wanted: dict[str, tuple[Scope, ...]] = {scope: (scope,) for scope in SCOPES}
    return asyncio.run(keys_of(guarded, wanted | {"all": SCOPES}))


@pytest.fixture(scope="module")
def http(guarded: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=guarded.url, timeout=60.0) as client:
        yield client


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_routes_are_found() -> None:
    assert {"/v1/remix", "/v1/keys/x", "/metrics", "/schema.json", "/livez"} <= set(every_path())


@pytest.mark.parametrize("path", every_path())
def test_no_route_is_unguarded(http: httpx.Client, keys: dict[str, str], path: str) -> None:
    for method in METHODS:
        need: Need = need_of(method, path)
        if need == "nothing":
            assert (path in OPEN, method in {"GET", "HEAD"}) == (True, True)
            continue
        answer = http.request(method, path)
        assert answer.status_code == 401, (method, path)
        assert answer.headers["www-authenticate"].startswith("Bearer")
        if method != "HEAD":
            problem_of(answer, 401, "unauthenticated")
        for scope in SCOPES:
            if need in SCOPES and scope != need:
                refused = http.request(method, path, headers=bearer(keys[scope]))
                assert refused.status_code == 403, (method, path, scope)


def test_path_that_is_no_route_needs_the_widest_scope(
    http: httpx.Client, keys: dict[str, str]
) -> None:
    for path in ["/v2/remix", "/v1/remix/", "//v1/remix", "/V1/REMIX", "/v1%2Fremix/x", "/x"]:
        assert http.get(path).status_code == 401, path
        assert http.get(path, headers=bearer(keys["remix"])).status_code == 403, path
        assert http.get(path, headers=bearer(keys["all"])).status_code in {307, 404, 405}, path


def test_what_is_open_answers_without_a_key(http: httpx.Client) -> None:
    for path in ["/livez", "/readyz", "/docs", "/openapi.json", "/static_content/swagger-ui.css"]:
        assert http.get(path).status_code == 200, path
    assert {path for path, row in ROWS.items() if row.reads == "nothing"} == {
        path.removesuffix("x") for path in OPEN
    }


def test_a_key_opens_what_its_scope_is_for(http: httpx.Client, keys: dict[str, str]) -> None:
    notes = {"notes": ("notes.json", str(NOTES).replace("'", '"'))}
    remix, metrics, admin = (bearer(keys[name]) for name in ("remix", "metrics", "admin"))
    assert http.post("/v1/generate", files=notes, headers=remix).status_code == 200
    assert http.get("/v1/voices", headers=metrics).status_code == 200
    assert http.get("/metrics", headers=metrics).status_code == 200
    assert http.get("/v1/keys", headers=admin).status_code == 200
    refused = problem_of(http.get("/metrics", headers=remix), 403, "forbidden")
    assert (refused["value"], refused["limit"]) == (["remix"], "metrics")


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Basic {}", "{}", "Bearer {}0", "Bearer {} {}", "Token {}"]
)
def test_header_that_is_no_bearer_of_a_key_is_refused(
    http: httpx.Client, keys: dict[str, str], header: str
) -> None:
    key = keys["all"]
    answer = http.get("/v1/voices", headers={"Authorization": header.format(key, key)})
    problem_of(answer, 401, "unauthenticated")
    assert key not in answer.text


def test_key_in_the_address_is_none(http: httpx.Client, keys: dict[str, str]) -> None:
    """Addresses are logged."""
    answer = http.get("/v1/voices", params={"key": keys["all"], "access_token": keys["all"]})
    problem_of(answer, 401, "unauthenticated")


def test_key_is_made_listed_and_revoked_over_http(http: httpx.Client, keys: dict[str, str]) -> None:
    admin = bearer(keys["admin"])
    body = {"name": "ann", "scopes": ["remix"], "rate_per_minute": 5, "jobs_at_once": 2}
    made = http.post("/v1/keys", json=body, headers=admin)
    assert made.status_code == 201
    token, key_id = made.json()["key"], made.json()["id"]
    assert http.get("/v1/voices", headers=bearer(token)).status_code == 200
    listed = http.get("/v1/keys", headers=admin)
    assert token not in listed.text
    assert key_id in {key["id"] for key in listed.json()["keys"]}
    assert http.delete(f"/v1/keys/{key_id}", headers=admin).json()["revoked_s"] is not None
    # Asked of a key that nobody knows, the server reads the keys anew, and answers after that.
    http.get("/v1/voices", headers=bearer(f"phk_{'0' * 12}_{'0' * 64}"))
    problem_of(http.get("/v1/voices", headers=bearer(token)), 401, "unauthenticated")
    problem_of(http.delete("/v1/keys/nobody", headers=admin), 404, "not-found")
    for wrong in [
        {},
        {**body, "scopes": []},
        {**body, "scopes": ["root"]},
        {**body, "name": "x" * 65},
    ]:
        problem_of(http.post("/v1/keys", json=wrong, headers=admin), 422, "malformed-request")


def test_command_and_client_have_a_key(guarded: ServerProcess, keys: dict[str, str]) -> None:
    def run(key: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "client.command", *arguments, "--server", guarded.url],
            cwd=ROOT,
            env={**os.environ, "PHILHARMONICS_API_KEY": key},
            capture_output=True,
            text=True,
            timeout=120,
        )

    made = run(keys["admin"], "keys", "add", "joe", "--scope", "remix", "--rate", "9")
    assert made.returncode == 0, made.stderr
    token = made.stdout.strip()
    key_id = token.split("_")[1]
    assert run(token, "voices").returncode == 0
    assert f"{key_id}\tjoe\tremix\t9\t4\tyes" in run(keys["admin"], "keys", "list").stdout
    assert run(keys["admin"], "keys", "revoke", key_id).returncode == 0
    assert f"{key_id}\tjoe\tremix\t9\t4\tno" in run(keys["admin"], "keys", "list").stdout
    for refused in [run("", "voices"), run(keys["remix"], "keys", "list")]:
        assert refused.returncode == 3
        assert "key" in refused.stderr
    with Client(guarded.url) as stranger:
        assert stranger.is_ours()  # or the command would start another one
    with Client(guarded.url, keys["remix"]) as client:
        assert client.voices() is not None


def test_more_requests_than_the_rate_are_refused_until_retry_after(
    http: httpx.Client, keys: dict[str, str]
) -> None:
    body = {"name": "eager", "scopes": ["remix"], "rate_per_minute": 3}
    made = http.post("/v1/keys", json=body, headers=bearer(keys["admin"])).json()
    eager = bearer(made["key"])
    answers = [http.get("/v1/voices", headers=eager) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert problem_of(answers[-1], 429, "queue-full")["limit"] == 3
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 20
    assert http.get("/v1/voices", headers=bearer(keys["remix"])).status_code == 200


def test_body_of_a_stranger_is_not_read(guarded: ServerProcess) -> None:
    """Refused at its headers: the answer is there although no byte of the body was sent."""
    url = httpx.URL(guarded.url)
    with socket.create_connection((url.host, url.port), timeout=30.0) as connection:
        connection.sendall(
            b"POST /v1/remix HTTP/1.1\r\nHost: here\r\nContent-Length: 100000000\r\n"
            b"Content-Type: multipart/form-data; boundary=b\r\n\r\n"
        )
        assert connection.recv(1_000).startswith(b"HTTP/1.1 401")


def test_websocket_is_refused(guarded: ServerProcess) -> None:
    url = httpx.URL(guarded.url)
    with socket.create_connection((url.host, url.port), timeout=30.0) as connection:
        connection.sendall(
            b"GET /v1/voices HTTP/1.1\r\nHost: here\r\nConnection: Upgrade\r\n"
            b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
            b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
        )
        assert connection.recv(1_000).split()[1] in {b"401", b"403"}


def test_keys_cannot_be_made_where_they_are_off(fake_server: ServerProcess) -> None:
    """Else a stranger could make one for the day when they are switched on."""
    body = {"name": "ann", "scopes": ["admin"]}
    answer = httpx.post(f"{fake_server.url}/v1/keys", json=body, timeout=30.0)
    problem_of(answer, 403, "forbidden")


@pytest.mark.parametrize("arguments", [[], ["--host", "::"]])
def test_service_does_not_start_open_to_strangers(arguments: list[str], tmp_path: Path) -> None:
    """BentoML's own default address is 0.0.0.0."""
    started = subprocess.run(
        [sys.executable, "-m", "bentoml", "serve", "service:Remix", "--port", "0", *arguments],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "BENTOML_HOME": str(tmp_path), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert started.returncode == 1
    assert "PHILHARMONICS_KEYS" in started.stderr
    assert "Traceback" not in started.stderr
