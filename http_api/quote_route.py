"""`/v1/quote`: what a song would cost, and when it would be done, before it is sent."""

from __future__ import annotations

from typing import Annotated

from fastapi import FastAPI, Request
from pydantic import BaseModel, Field

from http_api.guard import caller_of
from http_api.openapi import problems
from http_api.problems import PROBLEMS, kind_of_status
from jobs.desk import Desk
from jobs.forecast import Quote
from remix.errors import LimitExceeded, RunnerUnavailable, StorageUnavailable
from remix.stages import Stage

Seconds = Annotated[float, Field(ge=0)]


class QuoteRequest(BaseModel):
    """What is asked about."""

    duration_s: float = Field(gt=0, allow_inf_nan=False, description="Of the song.")


class QuoteFacts(BaseModel):
    """What a job would get, were it submitted now and no other after it. Seconds from now."""

    compute_s: Seconds = Field(description="Of compute, all stages together.")
    stages: dict[Stage, Seconds] = Field(description="Of compute, by stage.")
    alone_s: Seconds = Field(description="From its begin to its end, were it alone.")
    jobs_before: int = Field(description="Jobs that wait, and would begin before it.")
    start_in_s: Seconds = Field(description="Until it would begin.")
    done_in_s: Seconds = Field(description="Until it would be done.")

    @classmethod
    def of(cls, quote: Quote) -> QuoteFacts:
        """To milliseconds."""
        return cls(
            compute_s=round(quote.cost.compute_s, 3),
            stages={stage: round(took_s, 3) for stage, took_s in quote.cost.stages_s.items()},
            alone_s=round(quote.cost.alone_s, 3),
            jobs_before=quote.jobs_before,
            start_in_s=round(quote.span.start_s, 3),
            done_in_s=round(quote.span.end_s, 3),
        )


def add_quote_route(app: FastAPI, desk: Desk) -> None:
    """The only one."""
    refusals = (PROBLEMS[error] for error in (LimitExceeded, RunnerUnavailable, StorageUnavailable))

    @app.post(
        "/v1/quote",
        summary="What a song would cost",
        responses=problems(*refusals, kind_of_status(422)),
    )
    async def quote_song(body: QuoteRequest, request: Request) -> QuoteFacts:
        """For a job with the default models, from its song's length and what is at work now.

        The figures are a model of this server, kept right by what its last jobs took.
        """
        return QuoteFacts.of(await desk.quote(caller_of(request), body.duration_s))
