"""The store: what failures are from night to night, and what becomes of files that cannot be used."""

import sqlite3
import threading

import pytest

from kernelfuzz.fuzz.store import queries, schema
from kernelfuzz.fuzz.store.store import Seen, Store
from kernelfuzz.strategies.errors import KernelfuzzError


def seen(name="a.bug", kernel="vllm@1.0"):
    return Seen(name, "bgmv", kernel, "1.0", "cpu", name, {"kind": "wrong_value", "case": {}})


def run(store):
    return store.start_run(1, 60.0, {"python": "3.12"}, {}, [])


def statuses(store, number):
    return {each.fingerprint: each.status for each in queries.sightings(store.connection, number)}


def test_a_failure_is_new_then_known_then_fixed_then_returned(tmp_path):
    store = Store(tmp_path)
    found = []
    for night in range(5):
        number = run(store)
        if night == 2:
            store.save_gone(number, "a.bug", "fixed", "it passes")
        else:
            found.append(store.save_failure(number, seen()))
        store.finish_run(number, "finished", 0, [])
    assert found == ["new", "known", "returned", "known"]
    (failure,) = queries.failures(store.connection).values()
    assert (failure.first_run, failure.last_run, failure.fixed_run) == (1, 5, None)


def test_what_a_run_that_was_cut_off_saw_is_new_to_the_next(tmp_path):
    store = Store(tmp_path)
    first = run(store)
    assert store.save_failure(first, seen()) == "new"
    store.cut_off(first)
    second = run(store)
    assert [each.fingerprint for each in queries.open_failures(store.connection)] == ["a.bug"]
    assert store.save_failure(second, seen()) == "new"
    assert [each.state for each in queries.runs(store.connection)] == ["running", "cut off"]


def test_a_failure_keeps_its_status_within_a_run(tmp_path):
    store = Store(tmp_path)
    number = run(store)
    assert [store.save_failure(number, seen()) for _ in range(3)] == ["new"] * 3
    assert statuses(store, number) == {"a.bug": "new"}


def test_unseen_says_nothing_of_a_failure(tmp_path):
    store = Store(tmp_path)
    for night in range(3):
        number = run(store)
        if night == 1:
            store.save_gone(number, "a.bug", "unseen", "no kernel here")
        else:
            status = store.save_failure(number, seen())
        store.finish_run(number, "finished", 0, [])
    assert status == "known"


def test_a_failure_that_is_not_listed_any_more_counts_again_once(tmp_path):
    store = Store(tmp_path)
    found = []
    for listed in ("because", "because", "", ""):
        number = run(store)
        found.append(store.save_failure(number, seen(), listed=listed))
        store.finish_run(number, "finished", 0, [])
    assert found == ["listed", "listed", "returned", "known"]


def test_what_turns_out_to_be_another_failure_is_forgotten(tmp_path):
    store = Store(tmp_path)
    number = run(store)
    store.save_failure(number, seen("a.symptom"))
    store.save_failure(number, seen("a.bug"), withdrawn=["a.symptom"])
    assert statuses(store, number) == {"a.bug": "new"}
    assert list(queries.failures(store.connection)) == ["a.bug"]


def test_many_writers_lose_nothing(tmp_path):
    Store(tmp_path).close()
    numbers = []

    def write(writer):
        store = Store(tmp_path)
        number = run(store)
        for index in range(20):
            store.save_failure(number, seen(f"bug.{writer}.{index}"))
        store.finish_run(number, "finished", 0, [])
        numbers.append(number)
        store.close()

    writers = [threading.Thread(target=write, args=(writer,)) for writer in range(4)]
    for each in writers:
        each.start()
    for each in writers:
        each.join()
    assert sorted(numbers) == [1, 2, 3, 4]
    store = Store(tmp_path)
    assert len(queries.failures(store.connection)) == 80
    assert all(len(statuses(store, number)) == 20 for number in numbers)


def damage_header(path):
    path.write_bytes(b"not a database at all, and long enough to be looked at" * 40)


def damage_pages(path):
    content = bytearray(path.read_bytes())
    content[4096:12288] = b"\xff" * 8192
    path.write_bytes(content)


def make_newer(path):
    with sqlite3.connect(path) as connection:
        connection.execute(f"PRAGMA user_version = {schema.SCHEMA + 1}")


def make_foreign(path):
    path.unlink()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE mine (x)")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (damage_header, "is damaged"),
        (damage_pages, "is damaged"),
        (make_newer, "a newer one has written it"),
        (make_foreign, "the SQLite file of another program"),
    ],
)
def test_a_file_that_cannot_be_used_is_left_and_a_fresh_one_is_used_beside_it(tmp_path, spoil, said):
    store = Store(tmp_path)
    number = run(store)
    store.save_failure(number, seen())
    store.close()
    spoil(tmp_path / "store.sqlite")
    before = (tmp_path / "store.sqlite").read_bytes()
    for _ in range(2):  # the next night finds the fresh one again
        store = Store(tmp_path)
        (problem,) = store.problems
        assert said in problem
        assert problem.endswith("; using store-2.sqlite")
        assert "\n" not in problem
        run(store)
        store.close()
    assert (tmp_path / "store.sqlite").read_bytes() == before
    assert [each.id for each in queries.runs(queries.connect(tmp_path))] == [2, 1]


def test_an_empty_file_becomes_a_store(tmp_path):
    (tmp_path / "store.sqlite").touch()
    store = Store(tmp_path)
    assert store.problems == []
    assert run(store) == 1


def test_an_older_store_is_brought_up_to_date_with_all_it_holds(tmp_path, monkeypatch):
    store = Store(tmp_path)
    store.save_failure(run(store), seen())
    store.close()
    step = "ALTER TABLE runs ADD COLUMN weather TEXT NOT NULL DEFAULT 'fair'; CREATE TABLE more (x);"
    monkeypatch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, step))
    for module in (schema, queries):
        monkeypatch.setattr(module, "SCHEMA", 2)
    monkeypatch.setattr("kernelfuzz.fuzz.store.store.SCHEMA", 2)
    with pytest.raises(KernelfuzzError, match="has schema 1, this kernelfuzz reads 2"):
        queries.connect(tmp_path)
    store = Store(tmp_path)
    assert store.connection.execute("SELECT weather FROM runs").fetchall() == [("fair",)]
    assert list(queries.failures(store.connection)) == ["a.bug"]
    store.close()
    assert queries.connect(tmp_path).execute("PRAGMA user_version").fetchone() == (2,)


def test_a_migration_that_fails_changes_nothing(tmp_path, monkeypatch):
    store = Store(tmp_path)
    run(store)
    store.close()
    monkeypatch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, "CREATE TABLE more (x); CREATE TABLE runs (y);"))
    monkeypatch.setattr(schema, "SCHEMA", 2)
    monkeypatch.setattr("kernelfuzz.fuzz.store.store.SCHEMA", 2)
    with pytest.raises(KernelfuzzError, match="runs"):
        Store(tmp_path)
    monkeypatch.undo()
    store = Store(tmp_path)
    assert store.problems == []
    assert "more" not in {row[0] for row in store.connection.execute("SELECT name FROM sqlite_master")}


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(tmp_path):
    store = Store(tmp_path)
    number = run(store)
    pages = store.connection.execute("PRAGMA page_count").fetchone()[0]
    store.connection.execute(f"PRAGMA max_page_count = {pages}")
    large = Seen("a.bug", "bgmv", "vllm", "1", "cpu", "a.bug", {"text": "x" * 100_000})
    with pytest.raises(KernelfuzzError, match=r"cannot write .*store\.sqlite: database or disk is full"):
        store.save_failure(number, large)
    assert queries.failures(store.connection) == {}
    assert statuses(store, number) == {}
    store.connection.execute("PRAGMA max_page_count = 100000")
    assert store.save_failure(number, large) == "new"


def test_a_folder_that_cannot_be_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(KernelfuzzError, match="name a folder that can be written"):
        Store(tmp_path / "file" / "store")
    with pytest.raises(KernelfuzzError, match="no store in"):
        queries.connect(tmp_path / "none")


def test_stores_have_names_of_their_own(tmp_path):
    names = {queries.identity(Store(tmp_path / name).connection) for name in "abc"}
    assert len(names) == 3


def test_one_kernels_excuse_is_none_for_another_in_the_same_run(tmp_path):
    for number, order in enumerate((("", "why"), ("why", ""))):
        store = Store(tmp_path / str(number))
        night = run(store)
        for listed in order:
            store.save_failure(night, seen(kernel=f"vllm@{listed or 2}"), listed=listed)
        assert statuses(store, night) == {"a.bug": "new"}


def test_a_store_that_is_locked_is_not_taken_for_damaged(tmp_path, monkeypatch):
    monkeypatch.setattr("kernelfuzz.fuzz.store.store.BUSY_SECONDS", 0.1)
    store = Store(tmp_path)
    store.close()
    other = sqlite3.connect(tmp_path / "store.sqlite", isolation_level=None)
    other.execute("PRAGMA locking_mode = EXCLUSIVE")
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(KernelfuzzError, match="database is locked; free it"):
        Store(tmp_path)
    other.close()
    assert Store(tmp_path).problems == []
    assert not (tmp_path / "store-2.sqlite").exists()


def test_a_historical_bug_that_a_cut_off_run_lost_is_news_to_the_next(tmp_path):
    store = Store(tmp_path)
    first = run(store)
    store.save_regression(first, "40131", "a title", "FAIL", "not found")
    second = run(store)
    assert queries.last_regressions(store.connection, second) == {}
    store.finish_run(first, "finished", 1, [])
    assert queries.last_regressions(store.connection, second) == {"40131": "FAIL"}
