"""Calls between processes of Ray Serve: what is asked of a replica, and what becomes of its mistakes and its death."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import ray
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from raysseg.schema import InputError
from raysseg.serve.refusal import Refusal

logger = logging.getLogger(__name__)

TRIES = 2  # of a request whose replica dies: more, and one that kills replicas would kill many


class Replica:
    """Hands over a user's mistake as a value: an error that is raised here would fill the log as a bug does."""

    async def call(self, method: str, *arguments: object) -> object:
        """What a method returns, or the InputError that it raises."""
        try:
            return await getattr(self, method)(*arguments)
        except InputError as error:
            return error


async def ask(handle: DeploymentHandle, method: str, *arguments: object) -> Any:
    """Calls a method of a replica; another one's where that dies.

    Raises:
        Refusal: too many are waiting already, or no replica is left.
        InputError: the user's mistake, as the replica tells it.
    """
    for _ in range(TRIES):
        response = handle.call.remote(method, *arguments)
        try:
            result = await response
        except asyncio.CancelledError:  # who asked is gone, or the time is up
            response.cancel()
            raise
        except BackPressureError as error:
            raise Refusal(503, "too many requests are waiting; ask again in a moment", 1) from error
        except (ray.exceptions.RayActorError, DeploymentUnavailableError):
            logger.warning("a replica of %s died under a request", handle.deployment_name)
        else:
            if isinstance(result, InputError):
                raise result
            return result
    raise Refusal(503, "no replica could answer; ask again in a moment", 5)
