"""The pytest plugin: equivalence tests in a user's own suite.

    fixture assert_equivalent           moeopt.testing.assert_equivalent, its figures in the JUnit report
    @pytest.mark.moeopt_bundle("dir")   the bundle's golden check before the test's body, once per provider
    --moeopt-bundle DIR                 such tests without any test file
    --moeopt-certificate FILE           what --moeopt-bundle's check must not be worse than

pytest loads this file in every run wherever moeopt is installed, so it imports nothing of moeopt or torch
before one of these is used. ``-p no:moeopt.pytest_plugin`` leaves it out.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from moeopt.value_types import PyObject

MARK = "moeopt_bundle"
ARGUMENT = "moeopt_provider"
DEFAULT = "default"
"""Stands for a provider where a bundle cannot be read: the check then fails with the reason."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("moeopt", "equivalence of optimised models")
    group.addoption(
        "--moeopt-bundle", action="append", default=[], metavar="DIR",
        help="check this bundle's golden runs, one test for each provider (may be given again)",
    )  # fmt: skip
    group.addoption(
        "--moeopt-certificate", metavar="FILE",
        help="a stored certificate; the bundle of --moeopt-bundle fails if it became worse",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        f"{MARK}(directory, certificate=None): run the golden check of the bundle in this directory (relative to the "
        "root directory) on each provider, and compare it with a stored certificate; the test's body runs after it",
    )
    if config.getoption("--moeopt-certificate") and len(config.getoption("--moeopt-bundle")) != 1:
        raise pytest.UsageError("--moeopt-certificate compares one bundle: give one --moeopt-bundle with it")


@pytest.fixture(name="assert_equivalent")
def assert_equivalent_fixture(request: pytest.FixtureRequest) -> PyObject:
    """``moeopt.testing.assert_equivalent``; what was required and allowed goes into the JUnit report."""

    def check(*args: PyObject, **kwargs: PyObject) -> PyObject:
        from moeopt.testing import compare, failure_text

        certificate = compare(*args, **kwargs)
        _record(request.node, certificate)
        if certificate.passed is not True:
            pytest.fail(failure_text(certificate), pytrace=False)
        return certificate

    return check


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker(MARK)
    if marker is None:
        return
    if len(marker.args) != 1 or set(marker.kwargs) - {"certificate"}:
        raise pytest.UsageError(f"{metafunc.definition.nodeid}: write @pytest.mark.{MARK}(directory, certificate=None)")
    if ARGUMENT not in metafunc.fixturenames:
        metafunc.fixturenames.append(ARGUMENT)
    metafunc.parametrize(ARGUMENT, _provider_names(metafunc.config.rootpath / marker.args[0]))


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> None:
    """Before the body of a marked test: the check itself, so that a difference is a failure and not an error."""
    marker = pyfuncitem.get_closest_marker(MARK)
    if marker is None:
        return
    root = pyfuncitem.config.rootpath
    against = marker.kwargs.get("certificate")
    provider = str(pyfuncitem.callspec.params[ARGUMENT])  # pytest_generate_tests put it there
    _check(pyfuncitem, root / marker.args[0], provider, None if against is None else root / against)


@pytest.hookimpl(tryfirst=True)  # so that -k and -m see the tests that it adds
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    for given in config.getoption("--moeopt-bundle"):
        bundle = BundleCollector.from_parent(session, name=str(given), nodeid=str(given))
        bundle.directory = config.invocation_params.dir / given
        items.extend(bundle.collect())


class BundleCollector(pytest.Collector):
    """One ``--moeopt-bundle``: a test for each provider."""

    directory: Path

    def collect(self) -> Iterator[GoldenItem]:
        for provider in _provider_names(self.directory):
            item = GoldenItem.from_parent(self, name=f"golden[{provider}]")
            item.directory, item.provider = self.directory, provider
            yield item


class GoldenItem(pytest.Item):
    """The golden check of a bundle on one provider."""

    directory: Path
    provider: str

    def runtest(self) -> None:
        against = self.config.getoption("--moeopt-certificate")
        _check(self, self.directory, self.provider, against and self.config.invocation_params.dir / against)

    def reportinfo(self) -> tuple[Path, int | None, str]:
        return self.directory, None, f"moeopt bundle {self.nodeid}"


def _provider_names(directory: Path) -> list[str]:
    from moeopt.errors import MoeoptError
    from moeopt.testing import provider_names

    try:
        return list(provider_names(directory))
    except MoeoptError:
        return [DEFAULT]


def _check(item: pytest.Item, directory: Path, provider: str, against: Path | None) -> None:
    from moeopt.errors import MoeoptError
    from moeopt.testing import check_bundle, providers

    _note(item, "provider", provider)
    damage, reason = "", ""
    try:
        reason = providers(directory).get(provider, "")
        if not reason:
            check = check_bundle(directory, None if provider == DEFAULT else provider, against)
    except MoeoptError as err:
        damage = f"moeopt: {err}"
    if damage:  # out here, so that the report has no chain of exceptions
        pytest.fail(damage, pytrace=False)
    if reason:
        pytest.skip(f"{provider}: {reason}")
    _record(item, check.certificate)
    _note(item, "regressions", str(len(check.regressions)))
    if check.failure():
        pytest.fail(check.failure(), pytrace=False)


def _record(item: PyObject, certificate: PyObject) -> None:
    from moeopt.testing import facts

    for name, value in facts(certificate).items():
        _note(item, name, value)


def _note(item: PyObject, name: str, value: str) -> None:
    """What ``record_property`` does, where no fixture is."""
    item.user_properties.append((f"moeopt.{name}", value))
