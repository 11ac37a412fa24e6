"""Which hosts and targets never leave this machine; in doubt, none."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mora_serve.loopback import is_loopback, leads_to_loopback

HERE = (
    *("localhost", "LOCALHOST", "localhost.", "127.0.0.1", "127.9.9.9", "::1", "[::1]"),
    *("::ffff:127.0.0.1", "0:0:0:0:0:0:0:1", "unix:/run/mora.sock", "unix-abstract:mora"),
)
ELSEWHERE = (
    *("", "0.0.0.0", "::", "10.0.0.1", "128.0.0.1", "::2", "fe80::1", "::ffff:10.0.0.1", "*"),
    *("example.com", "localhost.example.com", "notlocalhost", "127.0.0.1.example.com"),
    *("127.1", "0x7f.0.0.1", "2130706433", "127.0.0.1 ", "127.0.0.1\n", "127.0.0.1,10.0.0.1"),
    *("[::1", "1::1]", "unixx:/a"),
)


@pytest.mark.parametrize("host", HERE)
def test_hosts_of_this_machine(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", [h for h in ELSEWHERE if h not in ("[::1", "1::1]")])
def test_other_hosts_and_what_cannot_be_read(host: str) -> None:
    assert not is_loopback(host)


@given(st.ip_addresses())
def test_an_address_is_loopback_where_the_standard_says_so(address: object) -> None:
    mapped = getattr(address, "ipv4_mapped", None)
    assert is_loopback(str(address)) == (mapped or address).is_loopback


@given(st.text(max_size=30))
def test_no_text_but_localhost_and_addresses_is_loopback(host: str) -> None:
    if is_loopback(host) and not host.startswith(("unix:", "unix-abstract:")):
        plain = host.removeprefix("[").removesuffix("]")
        if plain.lower() not in ("localhost", "localhost."):
            ipaddress.ip_address(plain)


@pytest.mark.parametrize(
    "target",
    [
        *("localhost:50051", "localhost", "127.0.0.1:50051", "127.0.0.1", "[::1]:50051", "::1"),
        *("unix:/run/mora.sock", "unix:///run/mora.sock", "unix-abstract:mora"),
        *("dns:///localhost:50051", "dns:localhost:1", "ipv4:127.0.0.1:1", "ipv6:[::1]:1"),
        "ipv4:127.0.0.1:1,127.0.0.2:2",
    ],
)
def test_targets_of_this_machine(target: str) -> None:
    assert leads_to_loopback(target)


@pytest.mark.parametrize(
    "target",
    [
        *("", "example.com:50051", "10.0.0.1:50051", "[::2]:50051", ":50051", "0.0.0.0:1"),
        *("dns://10.0.0.1/localhost:50051", "dns:///example.com", "xds:///localhost:1"),
        *("ipv4:127.0.0.1:1,10.0.0.1:1", "ipv6:[::1]:1,[::2]:1", "passthrough:///localhost:1"),
        *("localhost@example.com:1", "[::1]example.com:1", "127.0.0.1.example.com:1"),
        *("vsock:1:1", "google-c2p:///localhost", "localhost,example.com:1"),
    ],
)
def test_other_targets_and_what_cannot_be_read(target: str) -> None:
    assert not leads_to_loopback(target)
