"""The alliance service on the wire: stubs made from ``alliance.proto`` by ``make rpc``."""
