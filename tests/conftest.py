from __future__ import annotations

from collections.abc import Iterator
from uuid import uuid4

import boto3
import pytest

from jobs.s3_server import s3_server as running_s3_server
from raysseg import storage


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """A real S3 server, which the environment of the whole session points to; yields its endpoint."""
    with running_s3_server() as endpoint, pytest.MonkeyPatch.context() as environment:
        for name in (*storage.S3_ENVIRONMENT, "AWS_PROFILE", "AWS_SESSION_TOKEN"):
            environment.delenv(name, raising=False)
        environment.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        environment.setenv("AWS_REGION", "us-east-1")
        environment.setenv("AWS_ACCESS_KEY_ID", "testing")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        yield endpoint


@pytest.fixture
def s3_bucket(s3_server: str) -> str:
    """A new, empty bucket: s3://name."""
    name = f"test-{uuid4().hex[:12]}"
    boto3.client("s3", endpoint_url=s3_server, region_name="us-east-1").create_bucket(Bucket=name)
    return f"s3://{name}"
