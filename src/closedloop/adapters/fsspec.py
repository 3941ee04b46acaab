"""fsspec: files that lie in object storage, reached as DVC reaches its remotes."""

from __future__ import annotations

from pathlib import Path

from closedloop.errors import ConfigError, ServiceUnavailable, hide_passwords


def put_file(path: Path, address: str) -> None:
    """Copy a file to an address such as s3://bucket/key, where it appears once all of it has come.

    Raises
    ------
    ConfigError
        If the extra for this kind of address is not installed.
    ServiceUnavailable
        If it cannot be written there.
    """
    name = hide_passwords(address)
    try:
        from fsspec.core import url_to_fs

        files, place = url_to_fs(address, skip_instance_cache=True)
        files.put_file(str(path), place)
    except ImportError as error:
        raise ConfigError(f"{name}: {error}; install closedloop[s3]") from None
    except Exception as error:  # each kind of storage raises its own error classes
        raise ServiceUnavailable(hide_passwords(f"{address}: {error}")) from None
