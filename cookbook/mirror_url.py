"""Which URLs a run directory can be mirrored to. No file system is opened here; fsspec is imported where it is asked.

Credentials come from the environment of the process, as each file system of fsspec takes them, never from a URL: a URL
is stored in run.json, in the tracker and in Prefect's database.
"""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlsplit

from cookbook.errors import CredentialsError

__all__ = ["OBJECT_STORES", "refuse_credentials", "url_problem", "without_credentials"]

OBJECT_STORES = frozenset({"abfs", "abfss", "adl", "az", "gcs", "gs", "oci", "oss", "r2", "s3", "s3a"})
"""Protocols without folders: none is made there, as that might make a bucket."""

_LOCAL = ("file", "local")
_USER_IN_URL = frozenset({"abfs", "abfss", "ftp", "hdfs", "sftp", "smb", "ssh", "webhdfs"})
"""Protocols whose URLs name a user or a container before the @, which is no secret."""
_READ_ONLY = frozenset({"data", "github", "git", "http", "https", "libarchive", "tar", "zip"})

_USER_INFO = re.compile(r"//(?:[^/@\s]+|[^/@\s:]*:(?!\d+[/?#])[^@\s]+)@")
"""What is before the @; after a colon that no port follows, a secret with a "/" in it."""
_SECRET_VALUE = re.compile(
    r"([?&]?[\w-]*(?:sig|signature|token|key|secret|credential|password)[\w-]*=)[^&\s\"')]+", re.IGNORECASE
)


def refuse_credentials(url: str | None) -> str | None:
    """The URL, if there is nothing secret in it.

    Raises:
        CredentialsError: a password, a key, a query or a fragment is in it. The message does not repeat it.
    """
    if url is None:
        return None
    parts = urlsplit(url)
    protocol, (user, _, _) = parts.scheme.lower(), parts.netloc.rpartition("@")
    is_path = protocol in ("", *_LOCAL)  # where @ and # are parts of names
    is_secret = ":" in user or (user != "" and protocol not in _USER_IN_URL)
    is_secret |= not is_path and "@" in url and _lacks_port(parts.netloc)
    if is_secret or parts.query or (parts.fragment and not is_path):
        found = "credentials" if is_secret else "a query or a fragment, which may hold credentials,"
        raise CredentialsError(
            f"storage.mirror_url ({protocol or 'file'}://...) has {found} in it, and would be stored with the run. "
            "Leave them out: they are taken from the environment (AWS_ACCESS_KEY_ID, GOOGLE_APPLICATION_CREDENTIALS, "
            "..., or FSSPEC_* variables)."
        )
    return url


def _lacks_port(netloc: str) -> bool:
    """Whether a colon is followed by no port: it may be the beginning of a secret, which a "/" in it has cut off."""
    _, colon, port = netloc.rpartition("@")[2].rpartition("]")[2].partition(":")
    return colon != "" and not port.isdecimal()


def url_problem(url: str, log_path: Path) -> tuple[str, str] | None:
    """Why a run directory cannot be mirrored to a URL, and what to do; None when it may work. Nothing is contacted."""
    from fsspec.registry import get_filesystem_class, known_implementations

    protocol = urlsplit(url).scheme.lower() if "://" in url or url.startswith("file:") else "file"
    if "::" in url:
        return f"{url!r} chains file systems.", "Name one folder: s3://bucket/folder."
    if protocol in _READ_ONLY:
        return f"{url!r} cannot be written.", "Use a file system that can: s3://, gs://, sftp://, file://."
    if protocol in _LOCAL:
        return _local_problem(url, log_path)
    try:
        get_filesystem_class(protocol)
    except ValueError:
        known = ", ".join(sorted(set(known_implementations) - _READ_ONLY))
        return f"{url!r} has a protocol that fsspec does not know.", f"Use one of {known}."
    except ImportError as error:
        needed = str(known_implementations.get(protocol, {}).get("err") or error).rstrip(".")
        return f"{url!r} needs a package that is not installed: {needed}.", "Install it beside this one."
    return None


def without_credentials(text: str) -> str:
    """The words of an error without what may be a secret in a URL."""
    return _SECRET_VALUE.sub(r"\1[hidden]", _USER_INFO.sub("//[hidden]@", text))


def _local_problem(url: str, log_path: Path) -> tuple[str, str] | None:
    from fsspec.core import url_to_fs

    folder, run = Path(url_to_fs(url)[1]).resolve(), log_path.expanduser().resolve()
    if folder == run or run in folder.parents or folder in run.parents:
        return f"{url!r} and log_path {str(log_path)!r} lie in each other.", "Use a folder of its own."
    existing = next(part for part in (folder, *folder.parents) if part.exists())
    if not existing.is_dir():
        return f"{url!r}: {existing} is a file.", "Give a folder."
    return None
