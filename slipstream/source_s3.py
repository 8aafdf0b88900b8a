"""A LitData set's folder in S3, or in any store that speaks its protocol."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, TypeVar
from urllib.parse import urlsplit

from .daemon import DaemonExecutor, interruptibly
from .source import ProcessLock, UnavailableError
from .source_cache import StoppedError
from .source_faults import DISK_FULL

_CLIENT_OPTIONS = (
    "region_name",
    "api_version",
    "use_ssl",
    "verify",
    "endpoint_url",
    "aws_access_key_id",
    "aws_secret_access_key",
    "aws_session_token",
    "config",
)
_OPTIONS = (*_CLIENT_OPTIONS, "profile_name", "unsigned")
_SECRETS = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")
# Shorter ones would be found within ordinary words.
_MASKED_FROM = 4
_MISSING = ("404", "NoSuchKey", "NoSuchBucket", "NotFound")
# Of credentials that were good once; 400 is how they are told where an answer has no body. 403 may be of one object.
_EXPIRED = ("ExpiredToken", "InvalidToken", "TokenRefreshRequired", "RequestTimeTooSkewed", "400")
# boto3 tries a request again until its answer begins; a body that breaks off, and a file that is missing for a moment,
# are ours. Where every try first takes boto3 through all of its own, the time ends them; and nothing else does while
# the store does not answer.
_BODY_TRIES = 5
_MISSING_TRIES = 3
_FIRST_WAIT = 0.1
_LONGEST_WAIT = 10.0
_PATIENCE = 120.0
# With a store that has not answered yet: its name may be misspelled.
_FIRST_PATIENCE = 10.0
_CHECKS = 0.1
_NO_END = 1 << 60
_ONE_PART = 1 << 60

INDEX = "index.json"

T = TypeVar("T")

_log = logging.getLogger(__name__)


class S3Origin:
    """Files under an s3://bucket/prefix, read with boto3; what fails for a moment is tried again, with back-off.

    A store that gives no answer is tried for two minutes, or ten seconds if it never gave one, and then is an
    UnavailableError.

    `storage_options` are the arguments of boto3's `client` (endpoint_url, region_name, aws_access_key_id, ...,
    config), `profile_name` for its Session, and `unsigned=True` for a public bucket without credentials (litdata's
    way, a botocore `config` with signature_version=UNSIGNED, works too). Their secrets appear in no message and no
    repr. Raises ValueError for a URL or an option that it does not know.
    """

    def __init__(self, url: str, storage_options: Mapping[str, Any] | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme != "s3" or not parts.netloc or "@" in parts.netloc or ":" in parts.netloc:
            raise ValueError("remote_dir must look like s3://bucket/prefix; credentials go into storage_options")
        self._options = dict(storage_options or {})
        for name in self._options:
            if name not in _OPTIONS:
                raise ValueError(f"storage_options has {name!r}; allowed are {', '.join(_OPTIONS)}")
        self._bucket = parts.netloc
        # Not the parsed path: "?" and "#" are ordinary letters in a key.
        prefix = url.split("/", 3)[3] if url.count("/") > 2 else ""
        self._prefix = prefix.rstrip("/") + "/" if prefix.strip("/") else ""
        self.name = f"s3://{self._bucket}/{self._prefix}"
        self._lock = ProcessLock()
        self._client: Any = None
        self._pid = 0
        self._written = ""
        self._answered = False

    def identity(self) -> str:
        # Other labels may leave every number in an index as it was: when it was written tells such sets apart.
        return f"{self._options.get('endpoint_url')} {self._written}"

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        window = {} if (start, stop) == (0, None) else {"Range": f"bytes={start}-{'' if stop is None else stop - 1}"}

        def read_once() -> bytes:
            answer = self._connect().get_object(Bucket=self._bucket, Key=self._prefix + name, **window)
            data = answer["Body"].read()
            if name == INDEX:
                self._written = str(answer.get("LastModified"))
            # What knows no ranges answers with the whole file.
            return data[start:stop] if window and "ContentRange" not in answer else data

        return self._persistently(name, read_once)

    def fetch(self, name: str, path: str, on_bytes: Callable[[int], object] | None = None) -> None:
        from boto3.s3.transfer import OSUtils, S3Transfer, TransferConfig
        from s3transfer.manager import TransferManager

        # Its own further attempts follow at once, without back-off. One stream a file, in this thread: several files
        # come at a time as it is, with half the CPU time, and an interpreter that ends would wait for its threads.
        config = TransferConfig(use_threads=False, multipart_threshold=_ONE_PART, num_download_attempts=1)
        key = self._prefix + name

        def fetch_once() -> None:
            with TransferManager(self._connect(), config, OSUtils(), DaemonExecutor) as manager:
                S3Transfer(manager=manager).download_file(self._bucket, key, path, callback=on_bytes)

        check = None if on_bytes is None else lambda: on_bytes(0)
        self._persistently(name, lambda: interruptibly(fetch_once), check)

    def _persistently(self, name: str, work: Callable[[], T], check: Callable[[], object] | None = None) -> T:
        """Do `work` on the file `name`, again after a failure that may pass. Raises OSError, as `_explained`.

        `check` is called while it waits, and may raise to give up.
        """
        begin = time.monotonic()
        met: Counter[int] = Counter()  # each kind by itself: a body that broke off twice does not make a 404 final
        for number in itertools.count(1):
            try:
                result = work()
                self._answered = True
                return result
            except StoppedError:
                raise
            except Exception as error:
                failure, tries = self._explained(error, name), _tries(error)
            # Outside the clause, so that boto3's error, which may hold credentials, is not the context of ours.
            met[tries] += 1
            patience = _PATIENCE if self._answered else min(_PATIENCE, _FIRST_PATIENCE)
            if met[tries] >= tries or time.monotonic() - begin > patience:
                raise failure
            wait = min(_FIRST_WAIT * 2 ** min(number - 1, 20), _LONGEST_WAIT)
            if tries == _NO_END and met[tries] == 1:
                _log.warning("%s; it is tried again for %.0f s", failure, patience)
            _log.info("%s; try %d follows in %.1f s", failure, number + 1, wait)
            _sleep(wait, check)
        raise AssertionError("the tries have an end")

    def _connect(self) -> Any:
        with self._lock:
            # A forked child must not share its parent's connections.
            if self._client is None or self._pid != os.getpid():
                self._client, self._pid = self._new_client(), os.getpid()
            return self._client

    def _new_client(self) -> Any:
        from boto3.session import Session
        from botocore import UNSIGNED
        from botocore.config import Config

        options = {name: value for name, value in self._options.items() if name in _CLIENT_OPTIONS}
        config = Config(
            retries={"mode": "standard", "total_max_attempts": 6},
            max_pool_connections=32,
            connect_timeout=10,
            read_timeout=60,
        )
        if self._options.get("unsigned"):
            config = config.merge(Config(signature_version=UNSIGNED))
        if options.get("config") is not None:
            config = config.merge(options["config"])
        # boto3's module-wide session is not safe to share between threads.
        session = Session(profile_name=self._options.get("profile_name"))
        return session.client("s3", **{**options, "config": config})

    def _explained(self, error: Exception, name: str) -> OSError:
        """Turn boto3's error into an OSError that names the file and what to do, without secrets."""
        from botocore.exceptions import ClientError, NoCredentialsError, PartialCredentialsError

        error = getattr(error, "last_exception", None) or error
        if isinstance(error, OSError) and (error.filename or error.errno in (*DISK_FULL, errno.ENOENT)):
            code = error.errno or errno.EIO
            return OSError(code, os.strerror(code), error.filename)  # of this machine's
        reason = self._masked(str(error) or type(error).__name__)
        where = f"{self.name}{name}"
        if isinstance(error, ClientError):
            code = str(error.response.get("Error", {}).get("Code"))
            if code in _MISSING:
                return FileNotFoundError(f"{where} does not exist ({reason})")
            if code in ("403", "AccessDenied"):
                reason += "; give credentials in storage_options, or {'unsigned': True} if the bucket is public"
        elif isinstance(error, (NoCredentialsError, PartialCredentialsError)):
            reason += "; give them in storage_options, or {'unsigned': True} if the bucket is public"
        kind = UnavailableError if _is_outage(error) else OSError
        return kind(f"cannot read {where}: {reason}")

    def _masked(self, text: str) -> str:
        given = [self._options.get(key) for key in _SECRETS] + [os.environ.get(key.upper()) for key in _SECRETS]
        user = urlsplit(str(self._options.get("endpoint_url") or "")).netloc.rpartition("@")[0]
        secrets = {str(value) for value in (*given, user, *user.split(":")) if value}
        for secret in sorted(secrets, key=len, reverse=True):
            if len(secret) >= _MASKED_FROM:
                text = text.replace(secret, "***")
        return re.sub(r"//[^/\s@]+@", "//***@", text)

    def close(self) -> None:
        with self._lock:
            client, self._client = self._client, None
        if client is not None and self._pid == os.getpid():
            client.close()

    def __repr__(self) -> str:
        return f"S3Origin({self.name!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_client": None, "_pid": 0}


def _sleep(seconds: float, check: Callable[[], object] | None) -> None:
    if check is None:
        time.sleep(seconds)
        return
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        check()
        time.sleep(min(left, _CHECKS))
    check()


def _is_outage(error: Exception) -> bool:
    """Tell whether boto3's `error` says nothing of the file: no answer came, or none but of the store itself."""
    from botocore.exceptions import (
        ClientError,
        ConnectionError,
        CredentialRetrievalError,
        HTTPClientError,
        MetadataRetrievalError,
        ResponseStreamingError,
    )

    if isinstance(error, ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") or 0
        return status == 429 or (status >= 500 and status != 501) or _is_of_credentials(error)
    # A body that breaks off each time may be a damaged file, for which some stores do that.
    if isinstance(error, ResponseStreamingError):
        return False
    silent = (ConnectionError, HTTPClientError, CredentialRetrievalError, MetadataRetrievalError, TimeoutError)
    return isinstance(error, silent) or _is_of_credentials(error)


def _is_of_credentials(error: Exception) -> bool:
    from botocore.exceptions import ClientError, NoCredentialsError, PartialCredentialsError

    if isinstance(error, ClientError):
        return str(error.response.get("Error", {}).get("Code")) in _EXPIRED
    return isinstance(error, (NoCredentialsError, PartialCredentialsError))


def _tries(error: Exception) -> int:
    """How often to try what failed with boto3's `error`, the first try counted."""
    from boto3.exceptions import RetriesExceededError
    from botocore.exceptions import (
        ClientError,
        FlexibleChecksumError,
        IncompleteReadError,
        ReadTimeoutError,
        ResponseStreamingError,
    )
    from s3transfer.exceptions import S3DownloadFailedError, S3ValidationError

    if _is_outage(getattr(error, "last_exception", None) or error):
        return 1 if _is_of_credentials(error) else _NO_END
    if isinstance(error, ClientError):
        return _MISSING_TRIES if str(error.response.get("Error", {}).get("Code")) in _MISSING else 1
    broken = (
        RetriesExceededError,
        IncompleteReadError,
        ResponseStreamingError,
        ReadTimeoutError,
        FlexibleChecksumError,
    )
    changed = (S3DownloadFailedError, S3ValidationError)
    return _BODY_TRIES if isinstance(error, (*broken, *changed, ConnectionError, TimeoutError)) else 1
