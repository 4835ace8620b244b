"""The role of docs/security.md suffices for a run's files and for no others, on a server that asks for permissions."""

from __future__ import annotations

import json
import re
import urllib.request
from pathlib import Path

import boto3
import pytest

from jobs.s3_server import s3_server
from raysseg import storage
from raysseg.storage import StorageError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def role(monkeypatch: pytest.MonkeyPatch) -> str:
    """The policy."""
    (policy,) = re.findall(r"```json\n(.*?)```", (ROOT / "docs/security.md").read_text(), re.DOTALL)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    return str(policy)


def test_the_role_reads_the_data_and_writes_the_runs_alone(role: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_server() as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        keys = {"aws_access_key_id": "root", "aws_secret_access_key": "root"}
        place = {"endpoint_url": endpoint, "region_name": "us-east-1"}
        s3, iam = (boto3.client(name, **place, **keys) for name in ("s3", "iam"))
        for bucket in ("bucket", "other"):
            s3.create_bucket(Bucket=bucket)
            for folder in ("camvid", "secret"):
                s3.put_object(Bucket=bucket, Key=f"{folder}/a", Body=b"x")
        iam.create_user(UserName="pod")
        iam.put_user_policy(UserName="pod", PolicyName="raysseg", PolicyDocument=json.dumps(json.loads(role)))
        key = iam.create_access_key(UserName="pod")["AccessKey"]
        reset = urllib.request.Request(f"{endpoint}/moto-api/reset-auth", b"0", {"Content-Type": "text/plain"})
        urllib.request.urlopen(reset).close()  # it asks for permissions from now on
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])

        assert storage.read_bytes("s3://bucket/camvid/a") == b"x"
        assert not storage.exists("s3://bucket/camvid/none")
        assert [entry.path for entry in storage.list_files("s3://bucket/camvid")] == ["a"]
        storage.write_bytes("s3://bucket/runs/x/large", bytes(40 * 2**20))  # in parts
        storage.write_text("s3://bucket/runs/x/best.json", "{}")
        storage.write_text("s3://bucket/runs/x/best.json", '{"bundle": 1}')
        assert storage.read_text("s3://bucket/runs/x/best.json") == '{"bundle": 1}'
        pod = {"aws_access_key_id": key["AccessKeyId"], "aws_secret_access_key": key["SecretAccessKey"]}
        boto3.client("s3", **place, **pod).delete_object(Bucket="bucket", Key="runs/x/large")  # moto lets no many go
        assert not storage.exists("s3://bucket/runs/x/large")

        with pytest.raises(StorageError, match="access is denied"):
            storage.write_text("s3://bucket/camvid/b", "{}")
        for uri in ("s3://bucket/secret/a", "s3://other/camvid/a"):
            with pytest.raises(StorageError, match="access is denied"):
                storage.read_bytes(uri)
