"""API keys over HTTP, for whoever has one of the scope `admin`."""

from __future__ import annotations

from typing import Annotated

from fastapi import FastAPI
from pydantic import BaseModel, Field

from http_api.openapi import problems
from http_api.problems import PROBLEMS, kind_of_status
from jobs.desk import Desk
from jobs.keys import JOBS_AT_ONCE, MAX_NAME, MAX_QUOTA, RATE_PER_MINUTE, ApiKey, KeyStore, Scope
from remix.errors import Forbidden, NotFound, RunnerUnavailable

Quota = Annotated[int, Field(ge=1, le=MAX_QUOTA)]


class KeyRequest(BaseModel):
    """What a new key shall be."""

    name: str = Field(min_length=1, max_length=MAX_NAME, description="For people to know it by.")
    scopes: set[Scope] = Field(min_length=1, description="What it is for.")
    rate_per_minute: Quota = Field(RATE_PER_MINUTE, description="Requests a minute.")
    jobs_at_once: Quota = Field(JOBS_AT_ONCE, description="Jobs that have not ended.")


class KeyFacts(BaseModel):
    """What is kept of a key."""

    id: str
    name: str
    scopes: list[Scope]
    rate_per_minute: int
    jobs_at_once: int
    created_s: float = Field(description="Seconds since 1970.")
    revoked_s: float | None = Field(description="Since when it is valid no more.")

    @classmethod
    def of(cls, key: ApiKey) -> KeyFacts:
        """Without its hash."""
        return cls.model_validate(vars(key) | {"scopes": list(key.scopes)})


class NewKey(KeyFacts):
    """A key that was made just now."""

    key: str = Field(description="The key itself. It is nowhere else: keep it.")


class KeyList(BaseModel):
    """Every key."""

    keys: list[KeyFacts]


def add_key_routes(app: FastAPI, desk: Desk) -> None:
    """`/v1/keys`."""
    refusals = problems(
        *(PROBLEMS[error] for error in (Forbidden, RunnerUnavailable)), kind_of_status(422)
    )

    @app.get("/v1/keys", summary="API keys", responses=refusals)
    async def list_keys() -> KeyList:
        """Those that were revoked too, the oldest first."""
        return KeyList(keys=[KeyFacts.of(key) for key in await _keys(desk).list()])

    @app.post("/v1/keys", status_code=201, summary="Make an API key", responses=refusals)
    async def add_key(request: KeyRequest) -> NewKey:
        """The key is in this answer, and nowhere else."""
        token, key = await _keys(desk).add(
            request.name, request.scopes, request.rate_per_minute, request.jobs_at_once
        )
        return NewKey(key=token, **KeyFacts.of(key).model_dump())

    @app.delete(
        "/v1/keys/{key_id}",
        summary="Revoke an API key",
        responses={**refusals, **problems(PROBLEMS[NotFound])},
    )
    async def revoke_key(key_id: str) -> KeyFacts:
        """For good; within a second or two no server takes it any more."""
        return KeyFacts.of(await _keys(desk).revoke(key_id))


def _keys(desk: Desk) -> KeyStore:
    if not desk.door.asks_for_keys:
        raise Forbidden(
            "API keys are off at this server: who makes one for later is anybody.",
            value="off",
            limit="on",
            remedy="Start it with PHILHARMONICS_KEYS=on, or use `python -m jobs.keys` beside it.",
        )
    if desk.keys is None:
        raise RunnerUnavailable("The service is starting; it must be ready.")
    return desk.keys
