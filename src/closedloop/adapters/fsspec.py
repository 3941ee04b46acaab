"""fsspec: files that lie in object storage, reached as DVC reaches its remotes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from closedloop.errors import ConfigError, ServiceUnavailable, hide_passwords

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem


def put_file(path: Path, address: str) -> None:
    """Copy a file to an address such as s3://bucket/key, where it appears once all of it has come.

    Raises
    ------
    ConfigError
        If the extra for this kind of address is not installed.
    ServiceUnavailable
        If it cannot be written there.
    """
    with _reach(address) as (files, place):
        files.put_file(str(path), place)


def require_storage(address: str) -> None:
    """See that what reaches this kind of address is installed; only `put_file` tells whether it may be written there.

    Raises
    ------
    ConfigError
        If the extra for this kind of address is not installed.
    """
    with _reach(address):
        pass


def list_files(pattern: str) -> dict[str, str]:
    """The addresses that a pattern such as s3://bucket/*.parquet matches, with a key that changes with the content.

    Raises
    ------
    ConfigError
        If the extra for this kind of address is not installed.
    ServiceUnavailable
        If the storage does not answer, or refuses.
    """
    with _reach(pattern) as (files, place):
        found = files.glob(place, detail=True)
        return {files.unstrip_protocol(name): files.ukey(name) for name in found}


def get_file(address: str, path: Path) -> None:
    """Copy what lies at an address into a file.

    Raises
    ------
    ConfigError
        If the extra for this kind of address is not installed.
    ServiceUnavailable
        If it cannot be read.
    """
    with _reach(address) as (files, place):
        files.get_file(place, str(path))


@contextmanager
def _reach(address: str) -> Iterator[tuple[AbstractFileSystem, str]]:
    name = hide_passwords(address)
    try:
        from fsspec.core import url_to_fs

        yield url_to_fs(address, skip_instance_cache=True)
    except ImportError as error:
        raise ConfigError(f"{name}: {error}; install closedloop[s3]") from None
    except Exception as error:  # each kind of storage raises its own error classes
        raise ServiceUnavailable(hide_passwords(f"{address}: {error}")) from None
