"""A simulated bucket of Google Cloud Storage on this machine."""

import contextlib
from collections.abc import Iterator

from gcp_storage_emulator import server
from gcp_storage_emulator.handlers import objects

from tests.conftest import free_port


def _download(request, response, storage, *args, **kwargs):
    """Sends the generation of an object with its content, as the real service does and tensorstore expects."""
    with contextlib.suppress(Exception):  # A missing object: `_plain_download` answers.
        metadata = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
        response["x-goog-generation"] = metadata["generation"]
    _plain_download(request, response, storage, *args, **kwargs)


_plain_download, objects.download = objects.download, _download


@contextlib.contextmanager
def simulated(name: str) -> Iterator[dict[str, str]]:
    """Serves an empty bucket; yields the environment variables that direct libraries to it."""
    port = free_port()
    with server.create_server("localhost", port, in_memory=True, default_bucket=name):
        address = f"http://localhost:{port}"
        yield {"STORAGE_EMULATOR_HOST": address, "TENSORSTORE_GCS_HTTP_URL": address}
