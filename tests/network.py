"""A network of two computers, made of a network namespace and a pair of virtual network cards: packets can get lost in it, and nobody is told."""
import os
import secrets
import shutil
import subprocess

import pytest
from cluster import PORT
from cold import ColdServer


class Network:
    """The way to a server in a namespace of its own, with what cold.Wire has: `address`, `port`, `cut()`, `mend()`, `close()`."""

    def __init__(self):
        if os.geteuid() != 0:
            pytest.skip("network namespaces are made by root alone")
        if not shutil.which("ip"):
            pytest.skip("there is no iproute2 to make a network namespace with")
        name = secrets.token_hex(3)
        self.name, self._near, self._far = f"apii-{name}", f"apii{name}n", f"apii{name}f"
        # Of a range that is set aside for tests of networks.
        net = f"198.18.{secrets.randbelow(256)}"
        first = secrets.randbelow(63) * 4
        self.here, self.address, self.port = f"{net}.{first + 1}", f"{net}.{first + 2}", PORT
        self.trouble = []
        try:
            self._ip("netns", "add", self.name)
        except RuntimeError as error:
            pytest.skip(f"no network namespace can be made here: {error}")
        try:
            self._ip("link", "add", self._near, "type", "veth", "peer", "name", self._far, "netns", self.name)
        except RuntimeError as error:
            self.close()
            pytest.skip(f"no virtual network cards can be made here: {error}")
        self._ip("addr", "add", f"{self.here}/30", "dev", self._near)
        self._ip("link", "set", self._near, "up")
        self._there("addr", "add", f"{self.address}/30", "dev", self._far)
        self._there("link", "set", "lo", "up")
        self._there("link", "set", self._far, "up")

    def _ip(self, *words):
        done = subprocess.run(["ip", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise RuntimeError(f"ip {' '.join(words)}: {done.stdout.strip()}")

    def _there(self, *words):
        self._ip("-n", self.name, *words)

    def cut(self, how="no answers"):
        """`no answers`: what we send arrives, what the server sends does not. `unplugged`: its card is down."""
        if how == "unplugged":
            self._there("link", "set", self._far, "down")
        else:
            # More specific than the network's own route.
            self._there("route", "add", "blackhole", f"{self.here}/32")

    def mend(self):
        self._there("link", "set", self._far, "up")
        subprocess.run(["ip", "-n", self.name, "route", "del", "blackhole", f"{self.here}/32"], stderr=subprocess.DEVNULL)

    def close(self):
        """The cards go with the namespace."""
        subprocess.run(["ip", "netns", "del", self.name], stderr=subprocess.DEVNULL)


class FarServer(ColdServer):
    """A cold server in a namespace. Its socket is a file, which works across namespaces: tests see it whatever the network does."""

    def __init__(self, conf=()):
        # Its programs run there from the first on.
        self.wire = Network()
        try:
            super().__init__(conf, self.wire.address, self.wire.here, self.wire)
        except BaseException:
            self.wire.close()
            raise

    def as_owner(self, *command):
        return ["ip", "netns", "exec", self.wire.name, *super().as_owner(*command)]
