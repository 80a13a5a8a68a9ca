"""Credentials in the address of a dataset are in nothing that a run writes."""

import pytest

from data.config import shown


@pytest.mark.parametrize(
    ("address", "written"),
    [
        ("https://me:pa55@host/d", "https://***@host/d"),
        ("s3://bucket/imagenet64", "s3://bucket/imagenet64"),
        ("https://h/d?X-Amz-Signature=ab%2Fc&part=2", "https://h/d?X-Amz-Signature=***&part=2"),
        ("https://h/d?part=2&sig=a1b2", "https://h/d?part=2&sig=***"),
        (
            "pipe:curl -s -H 'Authorization: Bearer abc.def' https://h/{name}",
            "pipe:curl -s -H 'Authorization: Bearer ***' https://h/{name}",
        ),
        ("pipe:curl -u me:pa55 https://h/{name}", "pipe:curl -u me:*** https://h/{name}"),
        (
            "pipe:AWS_SECRET_ACCESS_KEY=x1 aws s3 cp {name} -",
            "pipe:AWS_SECRET_ACCESS_KEY=*** aws s3 cp {name} -",
        ),
        ("/data/tokens/secret-garden/imagenet64", "/data/tokens/secret-garden/imagenet64"),
        ("pipe:ssh store cat {name}", "pipe:ssh store cat {name}"),
    ],
)  # fmt: skip
def test_secrets_are_left_out_and_nothing_else(address: str, written: str) -> None:
    assert shown(address) == written
