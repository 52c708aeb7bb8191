"""Prints a token of a device for programs that cannot make one: mosquitto's."""

import sys

import wire

parts = wire.connection_string(sys.argv[1])
print(wire.sas("csharp", f"{wire.HUB}/devices/{parts['DeviceId']}", parts["SharedAccessKey"]))
