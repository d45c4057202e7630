"""An example database that several machines share."""

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from hypothesis.database import ExampleDatabase

from kernelfuzz.fuzz.job import Job
from kernelfuzz.fuzz.names import file_name
from kernelfuzz.strategies.errors import KernelfuzzError

ANSWER_SECONDS = 5.0
"""How long the server may take for one answer."""


def redis_examples(address: str, job: Job) -> ExampleDatabase:
    """Return the examples of a job in the Redis server at `address`, like redis://host:6379/0. A server that does not
    answer, now or later, ends no search: it has no examples then.

    Raises KernelfuzzError where the package redis is missing or the address is none.
    """
    client = _client(address)
    from hypothesis.extra.redis import RedisExampleDatabase

    prefix = file_name("kernelfuzz", job.target.name, str(job.kernel))
    return _Forgiving(RedisExampleDatabase(client, key_prefix=f"{prefix}:".encode()))


def require_redis(address: str) -> None:
    """Raise KernelfuzzError unless there is a Redis server at `address`."""
    client = _client(address)
    from redis import RedisError

    try:
        client.ping()
    except RedisError as error:
        raise _no_server(address, error) from error
    finally:
        client.close()


def _client(address: str) -> Any:
    try:
        import redis
    except ImportError:
        raise KernelfuzzError(
            "a shared example database needs the package redis: pip install 'kernelfuzz[redis]'"
        ) from None
    try:
        return redis.Redis.from_url(address, socket_timeout=ANSWER_SECONDS)
    except ValueError as error:
        raise _no_server(address, error) from error


def _no_server(address: str, error: Exception) -> KernelfuzzError:
    where = address.rpartition("@")[2]  # what stands before it is a user and a password
    return KernelfuzzError(f"no Redis server answers at {where!r}: {error}; start one, or change 'examples'")


class _Forgiving(ExampleDatabase):
    """An example database whose server may go away: a search goes on without it."""

    def __init__(self, database: ExampleDatabase) -> None:
        super().__init__()
        from redis import RedisError

        self._database = database
        self._error = RedisError

    def fetch(self, key: bytes) -> Iterable[bytes]:
        """Return what is saved."""
        with suppress(self._error):
            return list(self._database.fetch(key))
        return []

    def save(self, key: bytes, value: bytes) -> None:
        """Save an example."""
        with suppress(self._error):
            self._database.save(key, value)

    def delete(self, key: bytes, value: bytes) -> None:
        """Delete an example."""
        with suppress(self._error):
            self._database.delete(key, value)
