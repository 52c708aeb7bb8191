"""Input that no client sends: every connection gets an error or a close, at once, and the hub goes on."""

import os
import socket
import struct

import stories
import wire


def answered(data, port=443):
    """What the hub says to `data` before it closes. It must close, or answer, within its own limits."""
    connection = wire.tls(port)
    connection.settimeout(20)
    said = b""
    try:
        connection.sendall(data)
        while more := connection.recv(65536):
            said += more
            if port == 443 and b"\r\n\r\n" in said:
                break
    except (ConnectionError, BrokenPipeError, wire.ssl.SSLError):
        pass
    connection.close()
    return said


def alive():
    """A whole device stream, as if nothing had been."""
    device = wire.Device("c", "device-sdk.connection")
    service, leg = wire.connect(wire.Service("node"), device)
    service.write(b"alive", 64)
    assert leg.read(5) == b"alive"
    service.close()
    device.disconnect()


def odd_requests_are_answered():
    host = b"Host: hub.culvert.test\r\n"
    for request in (
        b"\0" * 100,
        b"GET / HTTP/1.1\n\n",
        b"GET / HTTP/1.1\r\n" + host + b"X: a\r\n b\r\n\r\n",
        b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"".join(b"X%d: y\r\n" % n for n in range(200)) + b"\r\n",
        b"GET / HTTP/1.1\r\nX: " + b"a" * 70_000 + b"\r\n\r\n",
        b"POST / HTTP/1.1\r\n" + host + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\n" + host + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
        b"POST / HTTP/1.1\r\n" + host + b"Content-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\n" + host + b"Content-Length: 99999999999999999999\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /%00 HTTP/1.1\r\n" + host + b"\r\n",
        b"GET /devices/%ff HTTP/1.1\r\n" + host + b"\r\n",
        b"GET /$iothub/websocket HTTP/1.1\r\n" + host + b"\r\n",
        b"GET /$iothub/websocket HTTP/1.1\r\n" + host + b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: x\r\n\r\n",
        b"GET /bridges/ih/hub/d/device-sdk/sid/" + b"0" * 32 + b"/r/service HTTP/1.1\r\n" + host + b"\r\n",
    ):
        said = answered(request)
        assert said == b"" or said.split(b" ")[1][:1] == b"4" or said.startswith(b"HTTP/1.1 505"), (request[:80], said[:200])
    alive()


def connect_packet(client="device-sdk"):
    user = f"{wire.HUB}/{client}/?api-version=2020-09-30"
    parts = wire.connection_string("device-sdk.connection")
    password = wire.sas("c", f"{wire.HUB}/devices/device-sdk", parts["SharedAccessKey"])
    body = wire.string("MQTT") + b"\x04\xc0\0\xf0" + wire.string(client) + wire.string(user) + wire.string(password)
    return wire.packet(0x10, body)


def mqtt_before_connect_is_closed():
    good = connect_packet()
    for data in (
        wire.packet(0xC0, b""),
        wire.packet(0x20, b"\0\0"),
        wire.packet(0x40, b"\0\1"),
        wire.packet(0x30, wire.string("devices/device-sdk/messages/events/")),
        wire.packet(0x82, b"\0\1" + wire.string("#") + b"\0"),
        b"\x10\xff\xff\xff\x7f",
        b"\x10\xff\xff\xff\xff\xff",
        wire.packet(0x10, b"x" * 5000),
        wire.packet(0x11, good[3:]),
        wire.packet(0x10, wire.string("MQTT") + b"\x04\xc1\0\xf0" + wire.string("a")),
        wire.packet(0x10, wire.string("MQIsdp") + b"\x03\x02\0\xf0" + wire.string("a")),
        wire.packet(0x10, wire.string("MQTT") + b"\x04\xc0\0\xf0" + b"\xff\xff"),
        wire.packet(0x10, wire.string("MQTT") + b"\x04\xc0\0\xf0" + wire.string(b"\xff\xfe") + wire.string("a") + wire.string("b")),
        wire.packet(0x10, wire.string("MQTT") + b"\x04\xc0\0\xf0" + wire.string("a\0b") + wire.string("a") + wire.string("b")),
        os.urandom(300),
    ):
        said = answered(data, 8883)
        assert said[:1] in (b"", b"\x20"), (data[:40], said)
        assert len(said) in (0, 4) and (not said or said[3] != 0), (data[:40], said)
    alive()


def mqtt_after_connect_is_closed_or_ignored():
    own = wire.string("devices/device-sdk/messages/events/")
    for data in (
        connect_packet(),
        wire.packet(0x20, b"\0\0"),
        wire.packet(0x90, b"\0\1\0"),
        wire.packet(0xB0, b"\0\1"),
        wire.packet(0xD0, b""),
        wire.packet(0xF0, b""),
        wire.packet(0x00, b""),
        wire.packet(0x36, own + b"\0\1"),
        wire.packet(0x34, own + b"\0\1"),
        wire.packet(0x32, own + b"\0\0"),
        wire.packet(0x32, own),
        wire.packet(0x30, wire.string("")),
        wire.packet(0x30, wire.string("devices/device-sdk/#")),
        wire.packet(0x30, wire.string(b"devices/\xff")),
        wire.packet(0x30, wire.string("devices/somebody/messages/events/")),
        wire.packet(0x80, b"\0\1" + wire.string("a") + b"\0"),
        wire.packet(0x82, b"\0\1"),
        wire.packet(0x82, b"\0\0" + wire.string("a") + b"\0"),
        wire.packet(0x82, b"\0\1" + wire.string("a") + b"\3"),
        wire.packet(0x82, b"\0\1" + (wire.string("x" * 60000) + b"\0")),
        wire.packet(0xA2, b"\0\1"),
        b"\x30\xff\xff\xff\x7f",
        b"\x30\xff\xff\xff\xff\x01",
        wire.packet(0x30, wire.string("$iothub/streams/res/200/?$rid=")),
        wire.packet(0x30, wire.string("$iothub/streams/res/99999999999/?$rid=x")),
        wire.packet(0x30, wire.string("$iothub/streams/res/200/?$rid=" + "x" * 60000)),
        wire.packet(0x30, wire.string("$iothub/twin/GET/?$rid=" + "x" * 60000)),
        wire.packet(0x30, wire.string("$culvert/streams/lost/?sid=" + "x" * 60000)),
        wire.packet(0xC0, b"") * 50_000,
    ):
        # DISCONNECT last, so that the hub closes what it has ignored.
        answered(connect_packet() + data + wire.packet(0xE0, b""), 8883)
    alive()


def websocket_frames_that_break_the_rules_end_the_leg():
    device = wire.Device("c", "device-sdk.connection")
    for bytes_sent, codes in (
        (b"\x82\x03abc", (1002,)),
        (b"\xc2\x80\0\0\0\0", (1002,)),
        (b"\x83\x80\0\0\0\0", (1002,)),
        (b"\x8b\x80\0\0\0\0", (1002,)),
        (b"\x89\xfe\0\x7e\0\0\0\0" + b"x" * 126, (1002,)),
        (b"\x09\x80\0\0\0\0", (1002,)),
        (b"\x80\x80\0\0\0\0", (1002,)),
        (b"\x88\x81\0\0\0\0x", (1002,)),
        (b"\x88\x82\0\0\0\0\x03\xe5", (1002,)),
        (b"\x82\xff" + b"\xff" * 8 + b"\0\0\0\0", (1002, 1009)),
        (b"\x82\xff" + struct.pack(">Q", 1 << 40) + b"\0\0\0\0", (1002, 1009)),
    ):
        service, leg = wire.connect(wire.Service("csharp"), device)
        service.connection.sendall(bytes_sent)
        leg.read_to_close()
        assert leg.closed[0] == 1011, (bytes_sent, leg.closed)
        try:
            service.read_to_close()
            assert service.closed[0] in codes, (bytes_sent, service.closed)
        except (EOFError, ConnectionError):
            assert False, f"{bytes_sent!r} got no Close"
    device.disconnect()
    alive()


def a_truncated_anything_is_no_harm():
    """Connections that end at every byte of a good beginning: of TLS, of CONNECT, of a request."""
    raw = socket.create_connection((wire.HUB, 443))
    raw.sendall(b"\x16\x03\x01\x02\x00\x01")
    raw.close()
    request = b"POST /twins/device-sdk/streams/s HTTP/1.1\r\nHost: hub.culvert.test\r\nContent-Length: 5\r\n\r\nab"
    for data, port in ((connect_packet(), 8883), (request, 443)):
        for cut in range(1, len(data), 7):
            connection = wire.tls(port)
            connection.sendall(data[:cut])
            wire.drop(connection)
    alive()


if __name__ == "__main__":
    stories.tell(globals())
