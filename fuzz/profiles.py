"""Hypothesis settings for kernel tests, by the name of a profile. Registered when Hypothesis is imported."""

ENVIRONMENT = "HYPOTHESIS_PROFILE"
"""The environment variable that may name a profile; pytest's --hypothesis-profile goes before it."""

PROFILES = {
    "kernelfuzz-dev": {"max_examples": 30},
    "kernelfuzz-ci": {"max_examples": 200, "derandomize": True},
    "kernelfuzz-nightly": {"max_examples": 5_000},
}
"""Few examples while one works on a kernel; the same ones each time for a change that must pass; many at night."""


def register() -> None:
    """Register the profiles. A case takes as long as its kernel does, so that none has a deadline."""
    from hypothesis import settings  # whose import calls this

    for name, values in PROFILES.items():
        settings.register_profile(name, deadline=None, print_blob=False, **values)  # type: ignore[arg-type]
