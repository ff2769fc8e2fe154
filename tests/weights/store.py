"""A store that speaks S3, in this process, with one empty bucket."""

import contextlib
import logging
from collections.abc import Iterator

import fsspec

BUCKET = "runs"


@contextlib.contextmanager
def s3_store() -> Iterator[dict[str, str]]:
    """Yields the environment that leads to it."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        environment = {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "me",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        import boto3

        client = boto3.client(
            "s3", endpoint_url=environment["AWS_ENDPOINT_URL"], aws_access_key_id="me", aws_secret_access_key="secret"
        )
        client.create_bucket(Bucket=BUCKET)
        yield environment
    finally:
        fsspec.filesystem("s3").clear_instance_cache()  # it would be asked for this server again
        server.stop()
