"""Buckets of the store that tests read from; the store itself is the fixture `server`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3

KEYS = {"aws_access_key_id": "AKIAEXAMPLE", "aws_secret_access_key": "wJalrXUtnFEMI-very-secret"}


@contextlib.contextmanager
def bucket_in(endpoint: str, name: str) -> Iterator[Any]:
    """A new bucket, removed with all that is in it; gives a client."""
    client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", **KEYS)
    client.create_bucket(Bucket=name)
    yield client
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=name):
        for item in page.get("Contents", []):
            client.delete_object(Bucket=name, Key=item["Key"])
    client.delete_bucket(Bucket=name)
    client.close()


def upload(client: Any, folder: Path, bucket: str, prefix: str) -> None:
    for path in folder.iterdir():
        client.upload_file(str(path), bucket, f"{prefix}/{path.name}")
