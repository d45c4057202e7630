"""Settings for the project's own tests: the same examples in every run, kept nowhere, without a deadline."""

from hypothesis import settings

settings.register_profile("own-tests", deadline=None, database=None, derandomize=True, print_blob=False)
settings.load_profile("own-tests")
