import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "long: a chain of minutes (`pytest -m long`)")


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    if config.option.markexpr == "long":
        return
    skip = pytest.mark.skip(reason="takes minutes: `pytest -m long`")
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker(skip)
