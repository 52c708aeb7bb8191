"""RFC 6455 as a conformance suite checks it, case by case, at the streaming endpoint; the hub is judged, not the far end.

The numbers name the groups of Autobahn's suite. What differs is inherent: the endpoint relays bytes, so a message comes
back as binary frames cut anywhere, and a violation is heard by the other leg as 1011.
"""

import itertools
import os
import struct
import time

import stories
import wire

PONG_FRAME = 0x8A


class Pair:
    """A bridge between a client that breaks rules and a device that sends everything back."""

    device = None

    def __init__(self):
        Pair.device = Pair.device or wire.Device("c", "device-sdk.connection")
        self.client, self.leg = wire.connect(wire.Service("csharp"), Pair.device)
        self.client.settimeout(20)
        self.leg.settimeout(20)

    def raw(self, *frames, chop=None):
        data = b"".join(frames)
        for piece in [data] if chop is None else [data[at : at + chop] for at in range(0, len(data), chop)]:
            self.client.connection.sendall(piece)

    def frame(self, first, payload=b""):
        """A frame with any first byte."""
        return bytes([first]) + self.client.frame(payload)[1:]

    def echoes(self, expected):
        """The device gets exactly this, sends it back, and the client gets it."""
        assert self.leg.read(len(expected)) == expected
        writing = wire.Together(self.leg.write, expected, 65536)
        assert self.client.read(len(expected)) == expected
        writing.join()

    def still_works(self):
        self.raw(self.frame(0x82, b"still works"))
        self.echoes(b"still works")

    def hears(self, first):
        """The payload of the client's next frame, which must begin with this byte."""
        got, size = self.client.reader.exactly(2)
        assert got == first and size < 126, (hex(got), size)
        return self.client.reader.exactly(size)

    def fails_with(self, *codes, delivered=b""):
        """The client gets a Close with one of these codes and TCP's end; the device all before it, and 1011."""
        self.client.read_to_close()
        assert self.client.closed[0] in codes, (codes, self.client.closed)
        self.answers(self.client)
        assert self.leg.read_to_close() == delivered
        assert self.leg.closed[0] == 1011, self.leg.closed
        self.answers(self.leg)
        self.tcp_ends()

    def answers(self, end):
        """A Close is answered; the hub may be gone already."""
        try:
            end.answer_close()
        except (ConnectionError, wire.ssl.SSLError):
            pass

    def tcp_ends(self):
        """The hub ends TCP; it may do so with a reset, when bytes of ours were left unread."""
        try:
            assert self.client.reader.connection.recv(1) == b""
        except (ConnectionError, wire.ssl.SSLError):
            pass

    def ends(self):
        self.client.drop()
        self.leg.read_to_close()
        self.answers(self.leg)


def sizes_in_every_manner():
    """Groups 1 and 9: text and binary of every length encoding, whole, in octets and in pieces."""
    pair = Pair()
    for first in (0x81, 0x82):
        for size in (1, 125, 126, 127, 128, 65535, 65536, 65537):
            data = b"*" * size
            pair.raw(pair.frame(first, data))
            pair.echoes(data)
        pair.raw(pair.frame(first, b"octets" * 20), chop=1)
        pair.echoes(b"octets" * 20)
        pair.raw(pair.frame(first))
        pair.still_works()
    large = os.urandom(4 << 20)
    for piece in (None, 64 << 10, 1 << 10):
        writing = wire.Together(lambda: pair.raw(pair.frame(0x82, large), chop=piece))
        assert pair.leg.read(len(large)) == large
        writing.join()
    for size in (64, 4 << 10, 64 << 10, 1 << 20):
        cuts = range(0, len(large), size)
        frames = [pair.frame((2 if at == 0 else 0) | (0x80 if at == cuts[-1] else 0), large[at : at + size]) for at in cuts]
        writing = wire.Together(lambda: [pair.raw(*frames[at : at + 256]) for at in range(0, len(frames), 256)])
        assert pair.leg.read(len(large)) == large
        writing.join()
    pair.ends()


def pings_are_answered():
    """Group 2."""
    pair = Pair()
    for payload in (b"", b"hello", b"\0\xff\xfe\xfd\xfc\xfb\0\xff", b"\xfe" * 125):
        for chop in (None, 1):
            pair.raw(pair.frame(0x89, payload), chop=chop)
            assert pair.hears(PONG_FRAME) == payload
    payloads = [b"payload-%d" % number for number in range(10)]
    for chop in (None, 1):
        pair.raw(*(pair.frame(0x89, payload) for payload in payloads), chop=chop)
        assert [pair.hears(PONG_FRAME) for _ in payloads] == payloads
    # Pongs that nobody asked for are ignored.
    pair.raw(pair.frame(0x8A), pair.frame(0x8A, b"unsolicited"), pair.frame(0x89, b"asked"))
    assert pair.hears(PONG_FRAME) == b"asked"
    pair.still_works()
    pair.ends()
    too_long = Pair()
    too_long.raw(b"\x89\xfe" + struct.pack(">H", 126) + b"\0\0\0\0" + b"x" * 126)
    too_long.fails_with(1002)


def reserved_bits_and_opcodes_fail():
    """Groups 3 and 4: alone, and behind a good message, which is delivered if it came before."""
    for first in itertools.chain((0x82 | rsv << 4 for rsv in range(1, 8)), (0x80 | op for op in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15))):
        pair = Pair()
        pair.raw(pair.frame(0x82, b"before"))
        pair.echoes(b"before")
        pair.raw(pair.frame(first, b"payload"), pair.frame(0x89, b"behind"))
        pair.fails_with(1002)
    for first in (0xC9, 0xD8):
        pair = Pair()
        pair.raw(pair.frame(first))
        pair.fails_with(1002)


def fragments():
    """Group 5."""
    pair = Pair()
    for op, chop in itertools.product((1, 2), (None, 1)):
        pair.raw(pair.frame(op, b"fragment1"), pair.frame(0x80, b"fragment2"), chop=chop)
        pair.echoes(b"fragment1fragment2")
        pair.raw(pair.frame(op, b"fragment1"), pair.frame(0x89, b"ping"), pair.frame(0x80, b"fragment2"), chop=chop)
        assert pair.hears(PONG_FRAME) == b"ping"
        pair.echoes(b"fragment1fragment2")
        five = [pair.frame(op if n == 0 else 0x80 if n == 4 else 0, b"fragment%d" % n) for n in range(5)]
        pair.raw(*(part for frame in five for part in (frame, pair.frame(0x89, b"p"), pair.frame(0x8A, b"q"))), chop=chop)
        assert [pair.hears(PONG_FRAME) for _ in range(5)] == [b"p"] * 5
        pair.echoes(b"".join(b"fragment%d" % n for n in range(5)))
        pair.raw(pair.frame(op), pair.frame(0), pair.frame(0x80))
        pair.still_works()
    pair.ends()
    for frames, delivered in (
        ([(0x09, b"fragmented ping"), (0x80, b"x")], b""),
        ([(0x08, b""), (0x80, b"")], b""),
        ([(0x80, b"nothing to continue"), (0x81, b"hello")], b""),
        ([(0x00, b"nothing to continue"), (0x81, b"hello")], b""),
        ([(0x01, b"first"), (0x81, b"second")], b"first"),
        ([(0x01, b"first"), (0x82, b"second")], b"first"),
    ):
        pair = Pair()
        pair.raw(pair.frame(*frames[0]))
        if delivered:
            # In a piece of its own: what comes in one piece with a violation goes with it.
            assert pair.leg.read(len(delivered)) == delivered
        pair.raw(*(pair.frame(*frame) for frame in frames[1:]))
        pair.fails_with(1002)


VALID = [
    "κόσμε".encode(),
    "\0".encode(),
    b"\xc2\x80",
    b"\xe0\xa0\x80",
    b"\xf0\x90\x80\x80",
    b"\x7f",
    b"\xdf\xbf",
    b"\xef\xbf\xbf",
    b"\xf4\x8f\xbf\xbf",
    b"\xed\x9f\xbf",
    b"\xee\x80\x80",
    b"\xef\xbf\xbd",
    b"\xef\xbf\xbe",
    b"\xf0\x9f\xbf\xbe",
    "Hello-µ@ßöäüàá-UTF-8!!".encode(),
]
INVALID = [
    b"\xce\xba\xe1\xbd\xb9\xcf\x83\xce\xbc\xce\xb5\xed\xa0\x80edited",
    b"\xf8\x88\x80\x80\x80",
    b"\xfc\x84\x80\x80\x80\x80",
    b"\xf7\xbf\xbf\xbf",
    b"\xf4\x90\x80\x80",
    b"\x80",
    b"\x80\xbf\x80\xbf",
    b"\xc0\xaf",
    b"\xe0\x80\xaf",
    b"\xf0\x80\x80\xaf",
    b"\xc1\xbf",
    b"\xed\xa0\x80",
    b"\xed\xbf\xbf",
    b"\xfe",
    b"\xff",
    b"\xfe\xfe\xff\xff",
    b"cut \xe2\x82",
]


def text_is_utf8():
    """Group 6. Invalid bytes fail as soon as they are there."""
    pair = Pair()
    for text in VALID:
        for chop in (None, 1):
            pair.raw(pair.frame(0x81, text), chop=chop)
            pair.echoes(text)
        # One fragment per byte.
        pair.raw(*(pair.frame((1 if at == 0 else 0) | (0x80 if at == len(text) - 1 else 0), text[at : at + 1]) for at in range(len(text))))
        pair.echoes(text)
    # Binary may be anything.
    pair.raw(pair.frame(0x82, b"\xff\xfe"))
    pair.echoes(b"\xff\xfe")
    pair.ends()
    for text in INVALID:
        pair = Pair()
        pair.raw(pair.frame(0x81, text))
        pair.fails_with(1007)
    # Fail fast: the frame is not whole, the message neither.
    pair = Pair()
    pair.raw(b"\x01\x94\0\0\0\0" + b"\xce\xba\xe1\xbd\xb9\xcf\x83\xce\xbc\xce\xb5\xf4\x90")
    pair.client.read_to_close()
    assert pair.client.closed[0] == 1007, pair.client.closed
    pair.leg.read_to_close()


def closes():
    """Group 7."""
    for code in (1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 3000, 3999, 4000, 4999):
        for reason in (b"", "ärgerlich".encode(), b"*" * 123):
            pair = Pair()
            pair.client.close(code, reason)
            pair.client.read_to_close()
            assert pair.client.closed[0] == code, (code, pair.client.closed)
            pair.leg.read_to_close()
            assert pair.leg.closed[0] == (1000 if code == 1000 else 1011), (code, pair.leg.closed)
            pair.tcp_ends()
    for payload, codes in (
        (b"\x03", (1002,)),
        (struct.pack(">H", 1000) + b"\xce\xba\xed\xa0\x80", (1007,)),
        *((struct.pack(">H", code), (1002,)) for code in (0, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65535)),
    ):
        pair = Pair()
        pair.raw(pair.frame(0x88, payload))
        pair.fails_with(*codes)
    pair = Pair()
    pair.raw(b"\x88\xfe" + struct.pack(">H", 126) + b"\0\0\0\0" + struct.pack(">H", 1000) + b"*" * 124)
    pair.fails_with(1002)
    # What comes behind a Close is not looked at; what came before it is delivered.
    pair = Pair()
    pair.raw(pair.frame(0x82, b"before"), pair.frame(0x88), pair.frame(0x82, b"behind"), pair.frame(0x89, b"ping"), b"\xff" * 50)
    assert pair.client.read_to_close() == b""
    assert pair.client.closed == (None, ""), "an empty Close is answered with an empty one"
    assert pair.leg.read_to_close() == b"before"
    pair = Pair()
    pair.raw(pair.frame(0x01, b"unfinished"), pair.frame(0x88, struct.pack(">H", 1000)))
    pair.client.read_to_close()
    assert pair.client.closed[0] == 1000
    assert pair.leg.read_to_close() == b"unfinished"


def upgrades_that_are_none():
    """The opening handshake: each lacks something, and none is answered with 101."""
    good = ["Host: " + wire.HUB, "Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="]

    def status(lines, method="GET", path="/$iothub/websocket", version="HTTP/1.1"):
        connection = wire.tls(443)
        connection.settimeout(20)
        connection.sendall((f"{method} {path} {version}\r\n" + "\r\n".join(lines) + "\r\n\r\n").encode())
        answer = wire.Reader(connection).head()
        connection.close()
        return answer

    code, headers = status(good + ["Sec-WebSocket-Extensions: permessage-deflate", "Sec-WebSocket-Protocol: mqttv3.1, MQTT"])
    assert (code, headers["sec-websocket-protocol"]) == (101, "MQTT") and "sec-websocket-extensions" not in headers
    assert headers["sec-websocket-accept"] == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
    code, headers = status([line.replace("Upgrade: websocket", "Upgrade: WebSocket").replace("n: Upgrade", "n: keep-alive, upgrade") for line in good])
    assert code == 101 and "sec-websocket-protocol" not in headers
    for lines, wanted in (
        (good[1:], 400),
        (good[:1] + good[2:], 426),
        (good[:2] + good[3:], 426),
        (good[:3] + good[4:], 426),
        (good[:4], 400),
        (good[:3] + ["Sec-WebSocket-Version: 8"] + good[4:], 426),
        (good[:4] + ["Sec-WebSocket-Key: c2hvcnQ="], 400),
        (good + ["Sec-WebSocket-Protocol: AMQPWSB10"], 400),
        (good + ["Content-Length: 5"], 400),
        (good + ["Origin: https://elsewhere.example"], 403),
    ):
        code, headers = status(lines)
        assert code == wanted, (lines, code)
        assert "close" in headers["connection"].lower()
        assert code != 426 or (headers["upgrade"], headers["sec-websocket-version"]) == ("websocket", "13"), headers
    code, headers = status(good[:3] + ["Sec-WebSocket-Version: 8"] + good[4:])
    assert headers["sec-websocket-version"] == "13"
    assert status(good, method="POST")[0] == 401
    assert status(good, version="HTTP/1.0")[0] == 400


def mqtt_over_websocket_is_a_byte_stream():
    """Packets in any frames: several in one, one in several, bytes alone, pings between."""
    parts = wire.connection_string("device-sdk.connection")
    user = f"{wire.HUB}/device-sdk/?api-version=2020-09-30"
    token = wire.sas("c", f"{wire.HUB}/devices/device-sdk", parts["SharedAccessKey"])
    connect = wire.packet(0x10, wire.string("MQTT") + b"\x04\xc2\0\xf0" + wire.string("device-sdk") + wire.string(user) + wire.string(token))
    ping, telemetry = wire.packet(0xC0, b""), wire.packet(0x32, wire.string("devices/device-sdk/messages/events/") + b"\0\7x")
    answers = b"\x20\x02\0\0" + b"\xd0\0" + b"\x40\x02\0\7"

    def session():
        ws = wire.WebSocket("csharp", f"wss://{wire.HUB}:443/$iothub/websocket", protocol="mqtt")
        ws.settimeout(20)
        return ws

    whole = connect + ping + telemetry
    for size in (1, 3, 100, len(whole)):
        ws = session()
        for at in range(0, len(whole), size):
            ws.send(whole[at : at + size])
            if at == 3 * size:
                ws.send(b"between", opcode=wire.PING)
        assert ws.read(len(answers)) == answers
        ws.drop()
    # One packet in fragments, empty ones among them.
    ws = session()
    ws.send(connect[:50], fin=False)
    ws.send(b"", opcode=wire.CONTINUATION, fin=False)
    ws.send(connect[50:] + ping, opcode=wire.CONTINUATION)
    ws.send(telemetry)
    assert ws.read(len(answers)) == answers
    # DISCONNECT ends the session with a Close, and TCP.
    ws.send(wire.packet(0xE0, b""))
    assert ws.read_to_close() == b"" and ws.closed[0] == 1000, ws.closed
    for bad in (b"\x82\x00", b"\xc2\x80\0\0\0\0", b"\x83\x80\0\0\0\0", b"\x80\x80\0\0\0\0", b"\x09\x80\0\0\0\0", b"\x89\xfe\0\x7e\0\0\0\0" + b"x" * 126):
        ws = session()
        ws.connection.sendall(bad)
        try:
            ws.read_to_close()
            assert ws.closed[0] == 1002, (bad, ws.closed)
        except EOFError:
            raise AssertionError(f"{bad!r} got no Close")
    # A peer that closes is answered, even in the middle of a packet.
    ws = session()
    ws.send(connect[:20])
    ws.close(1000)
    ws.read_to_close()
    assert ws.closed[0] in (1000, None), ws.closed


def keep_alive_and_pipelines():
    """Several requests on one connection, bodies ignored, `Expect: 100-continue`, and requests sent ahead."""
    service = wire.Service("node")
    for body in (b"", b"x", b"y" * 3000):
        status, _, _ = service.post("/twins/nobody/streams/s", body=body)
        assert status == 404
    head = f"POST /twins/nobody/streams/s HTTP/1.1\r\nHost: {wire.HUB}\r\nAuthorization: {service.token()}\r\n"
    connection = wire.tls(443)
    connection.settimeout(20)
    reader = wire.Reader(connection)

    def answer():
        status, headers = reader.head()
        return status, headers, reader.exactly(int(headers.get("content-length", 0)))

    connection.sendall((head + "Content-Length: 0\r\n\r\n").encode() * 3)
    for _ in range(3):
        assert answer()[0] == 404
    connection.sendall((head + "Content-Length: 4\r\nExpect: 100-continue\r\n\r\n").encode())
    status = answer()[0]
    if status == 100:
        connection.sendall(b"body")
        status = answer()[0]
    assert status == 404
    connection.close()
    # A body in chunks is asked for its length.
    connection = wire.tls(443)
    connection.sendall((head + "Transfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n").encode())
    status, headers = wire.Reader(connection).head()
    assert (status, headers["connection"]) == (411, "close")


def names_in_every_encoding():
    """Device and module IDs with every character of IoT Hub's set, as Node, C# and C write them into the path."""
    wild, module = "a-:.%_*?!(),=@;$'Z9", "m-:._*!(),=@;$'"
    owner = wire.Service("node", "owner.connection")
    node = lambda text: wire.urllib.parse.quote(text, safe="-_.!~*'()")
    strict = lambda text: wire.urllib.parse.quote(text, safe="")
    for path, body in ((f"/devices/{strict(wild)}", {"deviceId": wild}), (f"/devices/{strict(wild)}/modules/{strict(module)}", {"deviceId": wild, "moduleId": module})):
        status, _, text = owner.call("PUT", path, body, create=True)
        assert status == 200, text
    for device in (node(wild), strict(wild), strict(wild).replace("%2", "%2").lower() if wild.islower() else strict(wild)):
        error = wire.Service("csharp").post(f"/twins/{device}/streams/TestStream", connect=0)
        assert wire.error_of(error[2])["errorCode"] == 404103, (device, error)
        # C# does not encode the module's ID.
        error = wire.Service("csharp").post(f"/twins/{device}/modules/{module}/streams/TestStream", connect=0)
        assert wire.error_of(error[2])["errorCode"] == 404103, (device, error)
    # C# writes a space as "+": no ID has either.
    for bad in ("a+b", "a%2Bb", "a%20b", "a%23b", "a%2Fb", "..", ".", "%2e%2e"):
        status, _, text = wire.Service("csharp").post(f"/twins/{bad}/streams/TestStream", connect=0)
        assert status == 400 and wire.error_of(text)["errorCode"] == 400004, (bad, status, text)


def no_timeouts_named():
    """C# leaves a header out when its timeout is not positive: then it is the documented 60 s, for both together."""
    device = wire.Device("c", "device-sdk.connection")
    began = time.monotonic()
    status, _, body = wire.Service("csharp").post("/twins/device-sdk/streams/TestStream", connect=None, response=None)
    error = wire.error_of(body)
    assert (status, error["errorCode"], error["info"]) == (504, 504101, {"timeout": "00:01:00"}), error
    assert 55 < time.monotonic() - began < 70
    device.disconnect()


if __name__ == "__main__":
    stories.tell(globals())
