"""What nights leave behind for the next ones: one SQLite file. `schema` is its form, `store` writes it, `queries` reads
it."""
