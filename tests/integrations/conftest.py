from tests.serve.conftest import server, weights  # noqa: F401  fixtures
