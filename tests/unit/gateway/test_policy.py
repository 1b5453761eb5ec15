"""A class of data goes only where upstream, region, provider and address allow it."""

from __future__ import annotations

import socket

import pytest
from aiohttp.abc import AbstractResolver, ResolveResult

from freehold.errors import ConfigError
from freehold.gateway.call import Caller
from freehold.gateway.policy import (
    LocalResolver,
    Policy,
    check_addresses,
    classes_of,
    in_region,
    is_local,
    is_local_address,
)
from tests.routing import TOML, request, settings

AIR_GAPPED = "[gateway]\nair_gapped = true\n" + TOML


def test_without_a_class_everything_is_allowed() -> None:
    assert Policy(settings()).allowed(("", "")) == {"house", "small", "cloud"}


@pytest.mark.parametrize(
    ("data_class", "allowed"),
    [
        ("personal", {"house", "small"}),  # the cloud may have it, but is not in the eu
        ("secret", {"house"}),  # has no table of its own
        ("unheard-of", set()),
        ("Personal", set()),
    ],
)
def test_a_named_class_goes_only_where_it_may(data_class: str, allowed: set[str]) -> None:
    assert Policy(settings()).allowed([data_class]) == allowed


def test_a_class_with_a_table_still_needs_the_upstreams_word() -> None:
    policy = Policy(settings('[data_classes.public]\nregions = ["us"]\n'))
    assert policy.allowed(["public"]) == frozenset()


@pytest.mark.parametrize(
    ("rule", "allowed"),
    [
        ('providers = [""]', {"house", "small"}),
        ('providers = ["example"]', {"cloud"}),
        ('providers = ["other"]', set()),
        ('regions = ["us", "eu-west"]', {"house", "cloud"}),
        ('regions = ["us"]\nproviders = [""]', set()),
        ("local = true", {"house", "small"}),
        ("", {"house", "small", "cloud"}),
    ],
)
def test_region_provider_and_address_narrow(rule: str, allowed: set[str]) -> None:
    base = TOML.replace('regions = ["eu"]', rule)
    assert Policy(settings(base=base)).allowed(["personal"]) == allowed


def test_a_name_is_not_local_enough_for_a_class_that_must_stay() -> None:
    base = TOML.replace('regions = ["eu"]', "local = true").replace("10.0.0.5", "engine.internal")
    assert Policy(settings(base=base)).allowed(["personal"]) == {"small"}


def test_a_header_narrows_what_a_key_may_do_and_never_widens_it() -> None:
    policy = Policy(settings())
    caller = Caller("k", data_class="secret")
    assert classes_of(request(caller=caller)) == ("secret", "secret")
    assert policy.allowed(classes_of(request(caller=caller, data_class="personal"))) == {"house"}
    assert policy.allowed(classes_of(request(caller=caller, data_class="made-up"))) == frozenset()


@pytest.mark.parametrize(
    ("region", "rule", "inside"),
    [("eu", "eu", True), ("eu-west-1", "eu", True), ("eu-west-1", "eu-west", True), ("europa", "eu", False),
     ("eu", "eu-west", False), ("", "eu", False), ("us", "eu", False)],
)  # fmt: skip
def test_regions_have_parts(region: str, rule: str, inside: bool) -> None:
    assert in_region(region, rule) is inside


@pytest.mark.parametrize(
    ("address", "local"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("10.1.2.3", True), ("172.16.0.1", True), ("172.32.0.1", False),
     ("192.168.1.1", True), ("8.8.8.8", False), ("169.254.169.254", False), ("100.64.0.1", False), ("0.0.0.0", False),
     ("::1", True), ("fd00::1", True), ("2001:db8::1", False), ("::ffff:8.8.8.8", False), ("::ffff:10.0.0.1", True),
     ("fe80::1%eth0", False), ("example.com", False), ("", False)],
)  # fmt: skip
def test_local_addresses(address: str, local: bool) -> None:
    assert is_local_address(address) is local


def test_an_upstream_is_local_if_all_its_replicas_are() -> None:
    def of(*urls: str) -> bool | None:
        base = TOML.replace('url = "http://10.0.0.5:8000/v1"', f"urls = {list(urls)}")
        return is_local(settings(base=base).upstreams["house"])

    assert of("http://10.0.0.5/v1", "http://[::1]:8000/v1", "http://localhost/v1") is True
    assert of("http://10.0.0.5/v1", "http://engine/v1") is None
    assert of("http://engine/v1", "http://8.8.8.8/v1") is False
    assert of("http://localhost.example.com/v1") is None


def test_air_gapped_settings_with_an_address_outside_are_refused() -> None:
    found = settings(base=AIR_GAPPED.replace("https://api.example.com", "https://203.0.113.9"))
    assert Policy(found).allowed([""]) == {"house", "small"}
    with pytest.raises(ConfigError, match=r"upstreams\.cloud: air_gapped is set, and 203\.0\.113\.9 is not a local"):
        check_addresses(found)


def test_air_gapped_names_are_resolved() -> None:
    found = settings(base=AIR_GAPPED)
    check_addresses(found, lambda host: ["10.9.9.9"])
    with pytest.raises(ConfigError, match=r"api\.example\.com, which is 203\.0\.113\.9,"):
        check_addresses(found, lambda host: ["10.9.9.9", "203.0.113.9"])


def test_a_name_that_does_not_resolve_cannot_be_sent_anything() -> None:
    def nothing(host: str) -> list[str]:
        raise OSError(host)

    check_addresses(settings(base=AIR_GAPPED), nothing)


def test_not_air_gapped_nobody_is_asked() -> None:
    def fail(host: str) -> list[str]:
        raise AssertionError(host)

    check_addresses(settings(), fail)


class Answers(AbstractResolver):
    def __init__(self, *addresses: str) -> None:
        self.addresses = addresses
        self.closed = False

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        return [
            ResolveResult(hostname=host, host=address, port=port, family=family, proto=0, flags=0)
            for address in self.addresses
        ]

    async def close(self) -> None:
        self.closed = True


async def test_a_name_that_moves_outside_is_refused_when_it_is_called() -> None:
    inside, outside = Answers("10.0.0.1"), Answers("10.0.0.1", "203.0.113.9")
    assert (await LocalResolver(inside).resolve("engine", 80))[0]["host"] == "10.0.0.1"
    with pytest.raises(OSError, match=r"air-gapped: engine is 203\.0\.113\.9"):
        await LocalResolver(outside).resolve("engine", 80)
    resolver = LocalResolver(inside)
    await resolver.close()
    assert inside.closed
