"""The mark that keeps the tests of one run together, where pytest-xdist is not there to know it."""


def pytest_configure(config):
    config.addinivalue_line("markers", "xdist_group(name): run in one worker")
