import pytest

from tests.serve import serving


@pytest.fixture(scope='session')
def weights():
  return serving.params()


@pytest.fixture(scope='session')
def server(tmp_path_factory, weights):
  folder = serving.write_policies(tmp_path_factory.mktemp('policies'))
  with serving.running(folder, weights) as found:
    yield found
