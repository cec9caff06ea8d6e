from tests.support.talking import adapters, base, picture  # noqa: F401 (fixtures)
