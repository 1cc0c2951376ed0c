"""Connections to a study's database: SQLite in WAL mode, one file for each study, or Postgres by its URL."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    import sqlalchemy as sql
    from sqlalchemy.exc import SQLAlchemyError
except ImportError as error:
    raise ValueError("studies need SQLAlchemy: pip install 'fewstep[web]'") from error

BUSY_MS = 60_000  # that a statement waits for another program's


def connect(url: str | sql.URL) -> sql.Engine:
    """An engine on a database.

    Args:
        url: such as "sqlite:////data/study.sqlite" or "postgresql://user@host/name".

    Raises:
        ValueError: no such kind of database, or its driver is missing.
    """
    try:
        at = sql.make_url(url.replace("postgres://", "postgresql://", 1) if isinstance(url, str) else url)
        if at.drivername == "postgresql":
            at = at.set(drivername="postgresql+psycopg")
        if at.drivername not in ("sqlite", "postgresql+psycopg"):
            raise ValueError("a study's database is SQLite or Postgres: give a URL that begins with postgresql://")
        if at.drivername != "sqlite":
            return sql.create_engine(at, pool_size=20, max_overflow=20, pool_pre_ping=True)
        # One connection: threads of the server wait in turn for it, which is faster than SQLite's own waiting.
        one = {"poolclass": sql.QueuePool, "pool_size": 1, "max_overflow": 0, "pool_timeout": 120}
        engine = sql.create_engine(at, connect_args={"check_same_thread": False}, **one)
    except ImportError as error:
        raise ValueError("Postgres needs its driver: pip install 'fewstep[postgres]'") from error
    except SQLAlchemyError as error:
        raise ValueError(f"that is no database's URL: {type(error).__name__}") from error  # the URL may hold a password

    @sql.event.listens_for(engine, "connect")
    def configure(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # transactions are begun below, not by Python's module
        for line in ("journal_mode=WAL", "synchronous=FULL", "secure_delete=ON", f"busy_timeout={BUSY_MS}"):
            connection.execute(f"PRAGMA {line}")

    @sql.event.listens_for(engine, "begin")
    def begin(connection: sql.Connection) -> None:
        reads = connection.get_execution_options().get("fewstep_reads")
        connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")

    return engine


def fold(engine: sql.Engine, wait_ms: int = 2000) -> bool:
    """Put what SQLite's log holds into the one file of the database, and empty the log; nothing to do on Postgres.

    Afterwards a copy of the file is whole, and what was deleted is in no file any more.

    Args:
        engine: of the database.
        wait_ms: how long to wait for another program that is reading it. All requests of a server wait meanwhile.

    Returns:
        Whether it was done; another program that still reads keeps the log as it is.
    """
    if engine.dialect.name != "sqlite":
        return True
    raw = engine.raw_connection()
    try:
        cursor = raw.cursor()
        cursor.execute(f"PRAGMA busy_timeout={wait_ms}")
        cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        busy, *_ = cursor.fetchone() or (1,)
        return not busy
    finally:
        raw.cursor().execute(f"PRAGMA busy_timeout={BUSY_MS}")
        raw.close()


@contextmanager
def reading(engine: sql.Engine) -> Iterator[sql.Connection]:
    """A connection that locks nobody out. On SQLite all that it reads is of one moment; on Postgres each statement is."""
    with engine.connect() as connection:
        yield connection.execution_options(fewstep_reads=True)


def sqlite_url(path: Path) -> sql.URL:
    """URL of a database file, whatever characters its path has."""
    return sql.URL.create("sqlite", database=str(path.absolute()))


def write(url: str | sql.URL, fill: Callable[[sql.Engine], None]) -> None:
    """Fill a database and close it; SQLite's is then one file, without the log beside it."""
    engine = connect(url)
    try:
        fill(engine)
        fold(engine)
    finally:
        engine.dispose()
