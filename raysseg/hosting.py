"""The keys of a serve job that know no model: how many copies run, and what is let in. No torch, no ray."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, WithJsonSchema, model_validator

from raysseg.section import Duration, Section, not_ordered, seconds_of


class Replicas(Section):
    """How many copies of a model answer requests, what each holds, and how many requests may wait for them."""

    replicas: Annotated[int, Field(ge=1)] | tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=1)]] = 1
    """[min, max]: as many as the load asks for; with a min of 0, none while there are no requests."""
    cpus_per_replica: Annotated[float, Field(gt=0)] = 1.0
    gpus_per_replica: Annotated[float, Field(ge=0)] | None = None
    """Default: 1 where the cluster has GPUs, else 0."""
    max_ongoing: Annotated[int, Field(ge=1)] = 16
    """Requests that a replica has at hand, from which it makes its batches."""
    max_queue: Annotated[int, Field(ge=1)] = 64
    """Requests that wait for a replica beyond those; further ones are answered 503 at once."""
    upscale_delay: Duration = "5 seconds"
    """For which the load has to ask for more replicas."""
    downscale_delay: Duration = "5 minutes"
    """For which it has to ask for fewer."""

    @property
    def bounds(self) -> tuple[int, int]:
        """Replicas at least and at most."""
        return (self.replicas, self.replicas) if isinstance(self.replicas, int) else self.replicas

    @model_validator(mode="after")
    def _is_ordered(self) -> Self:
        if self.bounds[0] > self.bounds[1]:
            raise not_ordered("replicas", *self.bounds)
        return self


UriStart = Annotated[str, Field(pattern=r"^(https|s3|gs)://(.+/)?$"), WithJsonSchema({"type": "string"})]
"""A scheme, and folders up to a slash; in a file it may hold ${NAME}, which editors must not complain of."""


class Http(Section):
    """Where requests come in, and what is let in."""

    host: str = "127.0.0.1"
    """0.0.0.0: from other machines, too."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    token_variable: Annotated[str, Field(pattern=r"^\w+$")] | None = None
    """Name of the environment variable, on the machines that serve, that holds the bearer token; null: none is asked
    for."""
    replicas: Annotated[int, Field(ge=1)] = 1
    """Processes that take requests in and hand them to the models."""
    timeout: Duration = "60 seconds"
    """After which a request is given up, and answered 504."""
    max_bytes: Annotated[int, Field(ge=1024)] = 32 * 2**20
    """Of a request."""
    max_pixels: Annotated[int, Field(ge=1024)] = 16_000_000
    """Of an image; a model that sees images whole takes some 250 bytes a pixel and more."""
    min_side: Annotated[int, Field(ge=1)] = 8
    """Pixels; of an image."""
    fetch: tuple[UriStart, ...] = ()
    """What the URIs of images may begin with that requests name, such as `s3://bucket/images/` or `https://`, up to a
    slash; hosts with private addresses are never asked."""

    @property
    def timeout_s(self) -> float:
        """Of a request, in seconds."""
        seconds = seconds_of(self.timeout)
        assert seconds is not None, self.timeout
        return seconds
