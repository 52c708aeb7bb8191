"""The preview SDKs' side of the wire, byte for byte as wire.md records it, over plain TLS sockets.

Owns the bytes that C, Node and C# programs send, and checks on what the hub sends them. Does not know culvert: nothing
here is culvert's own client code. Invariant: whatever a client of that language could not take fails an assertion.
"""

import base64
import hashlib
import hmac
import json
import os
import select
import socket
import ssl
import struct
import threading
import time
import urllib.parse
import uuid

HUB = "hub.culvert.test"
FOLDER = os.environ.get("WORLD", ".")
BINARY, TEXT, CLOSE, PING, PONG, CONTINUATION = 2, 1, 8, 9, 10, 0


# --- credentials (wire.md, e) ---


def connection_string(name):
    """The parts of a connection string in a file of the world."""
    with open(os.path.join(FOLDER, name)) as file:
        return dict(part.split("=", 1) for part in file.read().strip().split(";"))


def _sign(text, key, expiry):
    mac = hmac.new(base64.b64decode(key), f"{text}\n{expiry}".encode(), hashlib.sha256).digest()
    return base64.b64encode(mac).decode()


def sas(sdk, resource, key, policy=None, expires_in=3600):
    """A token as the SDK spells it: the order of fields, what is percent-encoded, and in which case."""
    expiry = int(time.time()) + expires_in
    if sdk == "c":
        # Literal resource, lower-case hexadecimal digits.
        signature = urllib.parse.quote(_sign(resource, key, expiry), safe="")
        signature = "".join(p if i == 0 else p[:2].lower() + p[2:] for i, p in enumerate(_split(signature)))
        skn = f"&skn={policy}" if policy else ""
        return f"SharedAccessSignature sr={resource}&sig={signature}&se={expiry}{skn}"
    if sdk == "node":
        signature = urllib.parse.quote(_sign(resource, key, expiry), safe="")
        skn = f"&skn={policy}" if policy else ""
        return f"SharedAccessSignature sr={resource}&sig={signature}{skn}&se={expiry}"
    assert sdk == "csharp"
    encoded = urllib.parse.quote(resource, safe="")
    signature = urllib.parse.quote(_sign(encoded, key, expiry), safe="")
    skn = f"&skn={policy}" if policy else ""
    return f"SharedAccessSignature sr={encoded}&sig={signature}&se={expiry}{skn}"


def _split(text):
    parts = text.split("%")
    return [parts[0]] + ["%" + part for part in parts[1:]]


# --- TLS ---


class Connection(ssl.SSLSocket):
    """A TLS connection that one thread may read while another one writes. OpenSSL's object is for one at a time, and
    Python 3.11 lets two at it: a read then sees an end that nobody sent."""

    limit = 30

    def settimeout(self, seconds):
        self.limit = seconds

    def recv(self, count, flags=0):
        return self.in_turn(lambda: ssl.SSLSocket.recv(self, count, flags))

    def sendall(self, data, flags=0):
        rest = memoryview(data).cast("B")
        while rest:
            rest = rest[self.in_turn(lambda: ssl.SSLSocket.send(self, rest, flags)) :]

    def in_turn(self, use):
        while True:
            with self.lock:
                try:
                    return use()
                except ssl.SSLWantReadError:
                    wanted = ([self], [])
                except ssl.SSLWantWriteError:
                    wanted = ([], [self])
            if not any(select.select(*wanted, [], self.limit)):
                raise TimeoutError(f"the hub neither sends nor takes anything for {self.limit} s")


def tls(port, host=HUB, certificate=None, address=None):
    """A TLS connection without ALPN that verifies the hub. `certificate`: name of a PEM pair of the world."""
    context = ssl.create_default_context(cafile=os.path.join(FOLDER, "ca.pem"))
    if certificate:
        path = os.path.join(FOLDER, certificate)
        context.load_cert_chain(path + ".pem", path + ".key")
    raw = socket.create_connection((address or host, port), timeout=30)
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    context.sslsocket_class = Connection
    connection = context.wrap_socket(raw, server_hostname=host)
    connection.lock = threading.Lock()
    connection.setblocking(False)
    return connection


def drop(connection):
    """The end of the C sample: TCP goes without a Close frame and without TLS's close_notify."""
    raw = connection.detach() if hasattr(connection, "detach") else connection.fileno()
    os.close(raw)


class Reader:
    """Reads exact counts and lines."""

    def __init__(self, connection):
        self.connection, self.held = connection, b""

    def exactly(self, count):
        while len(self.held) < count:
            more = self.connection.recv(max(65536, count - len(self.held)))
            if not more:
                raise EOFError(f"the hub ended the connection after {self.held[:200]!r}")
            self.held += more
        taken, self.held = self.held[:count], self.held[count:]
        return taken

    def head(self):
        while b"\r\n\r\n" not in self.held:
            more = self.connection.recv(65536)
            if not more:
                raise EOFError(f"the hub ended the connection after {self.held[:200]!r}")
            self.held += more
        head, self.held = self.held.split(b"\r\n\r\n", 1)
        lines = head.decode("latin-1").split("\r\n")
        pairs = [line.split(": ", 1) for line in lines[1:]]
        return int(lines[0].split(" ")[1]), {name.lower(): value for name, value in pairs}


# --- service API (wire.md, a) ---


class Service:
    """A service program. One TLS connection, kept alive, as the Node agent does."""

    def __init__(self, sdk, strings="service.connection"):
        self.sdk, self.parts, self.kept = sdk, connection_string(strings), None

    def token(self, **changes):
        policy = self.parts["SharedAccessKeyName"]
        return sas(self.sdk, HUB, self.parts["SharedAccessKey"], policy, **changes)

    def headers(self, connect, response, token):
        timeouts = [
            ("iothub-streaming-connect-timeout-in-seconds", connect),
            ("iothub-streaming-response-timeout-in-seconds", response),
        ]
        timeouts = [pair for pair in timeouts if pair[1] is not None]
        authorization = [("Authorization", token)] if token else []
        if self.sdk == "node":
            agent = [("Request-Id", str(uuid.uuid4())), ("User-Agent", "azure-iothub/1.10.0-preview.0")]
            return timeouts + authorization + agent + [("Host", HUB), ("Connection", "keep-alive"), ("Content-Length", 0)]
        if self.sdk == "csharp":
            return authorization + [("User-Agent", "Microsoft.Azure.Devices/1.28.0-preview-001")] + timeouts + [("Host", HUB), ("Content-Length", 0)]
        json_type = [("Content-Type", "application/json; charset=utf-8")]
        return [("Host", HUB)] + authorization + json_type + timeouts + [("Content-Length", 0)]

    def post(self, path, connect=30, response=30, token="own", version="2018-10-20-preview", body=b""):
        """Status, headers and body of a POST."""
        token = self.token() if token == "own" else token
        lines = [f"{name}: {value}" for name, value in self.headers(connect, response, token)]
        if body:
            lines = [line for line in lines if not line.startswith("Content-Length")] + [f"Content-Length: {len(body)}"]
        return self._exchange(f"POST {path}?api-version={version} HTTP/1.1", lines, body)

    def call(self, method, path, value, create=False):
        """The registry's REST API, as any HTTP client does it: a change of what is there, or something new."""
        body = json.dumps(value).encode()
        lines = [f"Host: {HUB}", f"Authorization: {self.token()}", "Content-Type: application/json"]
        lines += [] if create else ["If-Match: *"]
        return self._exchange(f"{method} {path}?api-version=2021-04-12 HTTP/1.1", lines + [f"Content-Length: {len(body)}"], body)

    def _exchange(self, first, lines, body):
        if self.kept is None:
            self.kept = Reader(tls(443))
            self.kept.connection.settimeout(90)
        self.kept.connection.sendall("\r\n".join([first, *lines, "", ""]).encode() + body)
        status, headers = self.kept.head()
        content = self.kept.exactly(int(headers.get("content-length", 0)))
        if headers.get("connection") == "close":
            self.kept.connection.close()
            self.kept = None
        return status, headers, content

    def open(self, device, stream="TestStream", module=None, **timeouts):
        """Opens a device stream: the WebSocket, or None if the device rejected it."""
        path = f"/twins/{urllib.parse.quote(device, safe='')}"
        path += f"/modules/{module}" if module else ""
        status, headers, body = self.post(f"{path}/streams/{stream}", **timeouts)
        assert status == 200, (status, headers, body)
        assert body == b"" and headers["content-length"] == "0"
        accepted = headers["iothub-streaming-is-accepted"]
        assert accepted in ("True", "False"), accepted
        if accepted == "False":
            assert "iothub-streaming-url" not in headers and "iothub-streaming-auth-token" not in headers
            return None
        return WebSocket(self.sdk, headers["iothub-streaming-url"], headers["iothub-streaming-auth-token"])


def error_of(body):
    """The error in an error body: JSON with a JSON string inside."""
    outer = json.loads(body)
    assert set(outer) == {"Message", "ExceptionMessage"} and outer["ExceptionMessage"] == ""
    return json.loads(outer["Message"])


# --- streaming endpoint (wire.md, d) ---


class Refused(Exception):
    """The hub answered an upgrade with something else than 101."""


class WebSocket:
    """One leg of a bridge, or MQTT over WebSocket, as the SDK opens and frames it."""

    def __init__(self, sdk, url, token=None, protocol=None, headers=(), certificate=None):
        host, port, self.path = check_url(url)
        self.sdk, self.lock = sdk, threading.Lock()
        self.connection = tls(port, host, certificate)
        self.key = base64.b64encode(os.urandom(16)).decode()
        self.connection.sendall(self._request(sdk, host, port, token, protocol, headers).encode())
        self.reader = Reader(self.connection)
        self.status, self.headers = self.reader.head()
        if self.status != 101:
            raise Refused(self.status)
        self._check(protocol if protocol is not None else {"c": "MQTT"}.get(sdk))
        self.closed = None
        self.pings = 0

    def _request(self, sdk, host, port, token, protocol, headers):
        bearer = [f"Authorization: Bearer {token}"] if token else []
        always = ["Upgrade: websocket", "Connection: Upgrade", f"Sec-WebSocket-Key: {self.key}"]
        if sdk == "c":
            protocol = protocol if protocol is not None else "MQTT"
            lines = [f"Host: {host}:{port}"] + always + [f"Sec-WebSocket-Protocol: {protocol}", "Sec-WebSocket-Version: 13"] + bearer
        elif sdk == "node":
            extension = "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits"
            named = host if port == 443 else f"{host}:{port}"
            lines = bearer + always + ["Sec-WebSocket-Version: 13", extension, f"Host: {named}"]
        else:
            named = [f"Sec-WebSocket-Protocol: {protocol}"] if protocol else []
            lines = bearer + always + ["Sec-WebSocket-Version: 13"] + named + [f"Host: {host}:{port}"]
        return f"GET {self.path} HTTP/1.1\r\n" + "\r\n".join(lines + list(headers)) + "\r\n\r\n"

    def _check(self, offered):
        digest = hashlib.sha1((self.key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11").encode()).digest()
        assert self.headers["sec-websocket-accept"] == base64.b64encode(digest).decode()
        assert self.headers.get("sec-websocket-protocol") == (offered or None), "echoed only if offered, in the same case"
        assert "sec-websocket-extensions" not in self.headers, "the C client cannot do RSV bits"

    def frame(self, payload, opcode=BINARY, fin=True):
        """One masked frame, minimal length encoding."""
        size = len(payload)
        head = bytes([(0x80 if fin else 0) | opcode])
        if size < 126:
            head += bytes([0x80 | size])
        elif size < 65536:
            head += struct.pack(">BH", 0x80 | 126, size)
        else:
            head += struct.pack(">BQ", 0x80 | 127, size)
        mask = os.urandom(4)
        stretched = (mask * (size // 4 + 1))[:size]
        masked = int.from_bytes(payload, "big") ^ int.from_bytes(stretched, "big")
        return head + mask + masked.to_bytes(size, "big")

    def send(self, payload, **kind):
        with self.lock:
            self.connection.sendall(self.frame(payload, **kind))

    def write(self, data, size):
        """Data as frames of `size` bytes: 64 for the C proxy sample, up to 65536 for Node."""
        frames = [self.frame(data[at : at + size]) for at in range(0, len(data), size)]
        with self.lock:
            for at in range(0, len(frames), 512):
                self.connection.sendall(b"".join(frames[at : at + 512]))

    def receive(self):
        """Opcode and payload of the next data frame or Close, with the checks that a strict client makes."""
        while True:
            first, second = self.reader.exactly(2)
            assert first & 0x70 == 0, "no RSV bits"
            assert second & 0x80 == 0, "a server does not mask"
            opcode, size = first & 15, second & 127
            if size == 126:
                (size,) = struct.unpack(">H", self.reader.exactly(2))
                assert size >= 126, "minimal length"
            elif size == 127:
                (size,) = struct.unpack(">Q", self.reader.exactly(8))
                assert size >= 65536, "minimal length"
            if opcode >= 8:
                assert first & 0x80 and size <= 125, "control frames are small and whole"
            else:
                assert 0 < size <= 65536, f"a data frame of {size} bytes: the C sample ends on 0, the gateway's limit is 65536"
            payload = self.reader.exactly(size)
            if opcode == PING:
                self.pings += 1
                self.send(payload, opcode=PONG)
            elif opcode == CLOSE:
                code = struct.unpack(">H", payload[:2])[0] if payload else None
                self.closed = (code, payload[2:].decode())
                return CLOSE, payload
            elif opcode != PONG:
                return opcode, payload

    def read(self, count):
        """Exactly `count` bytes of data, whatever the frames."""
        data = bytearray()
        while len(data) < count:
            opcode, payload = self.receive()
            assert opcode != CLOSE, f"closed with {self.closed} after {len(data)} of {count} bytes"
            data += payload
        assert len(data) == count, f"{len(data)} bytes instead of {count}"
        return bytes(data)

    def read_to_close(self):
        """All data up to the Close, which stays in `closed`."""
        data = bytearray()
        while True:
            opcode, payload = self.receive()
            if opcode == CLOSE:
                return bytes(data)
            data += payload

    def close(self, code=None, reason=b""):
        """As Node (empty Close) or C# (1000): sends Close; the peer answers, then TCP ends."""
        self.send(struct.pack(">H", code) + reason if code else b"", opcode=CLOSE)

    def answer_close(self):
        """As the C client does: an empty Close, whatever came."""
        self.send(b"", opcode=CLOSE)

    def drop(self):
        drop(self.connection)

    # For MQTT over it.
    def sendall(self, data):
        self.send(data)

    def recv(self, _count):
        opcode, payload = self.receive()
        return b"" if opcode == CLOSE else payload

    def settimeout(self, seconds):
        self.connection.settimeout(seconds)


def check_url(url):
    """Host, port and path of a streaming URL, as the parser of the C samples needs it."""
    assert url.startswith("wss://"), url
    authority, _, path = url[len("wss://") :].partition("/")
    host, colon, port = authority.partition(":")
    assert colon and port.isdigit(), f"the C samples have no default port: {url}"
    assert path and "?" not in path, f"the C samples drop the query and need a path: {url}"
    assert len(host) < 1024 and len(path) + 1 < 1023
    return host, int(port), "/" + path


# --- control channel over MQTT (wire.md, b) ---

AGENTS = {
    "c": "iothubclient%2f1.9.0%20(native%3b%20Linux%3b%20x86_64)",
    "csharp": "Microsoft.Azure.Devices.Client%2F1.19.0-preview-001%20(.NET%3B%20Linux%3B%20X64)",
}


def string(text):
    data = text.encode() if isinstance(text, str) else text
    return struct.pack(">H", len(data)) + data


def packet(kind, body):
    size, encoded = len(body), b""
    while True:
        size, digit = divmod(size, 128)
        encoded += bytes([digit | (0x80 if size else 0)])
        if not size:
            return bytes([kind]) + encoded + body


class Device:
    """A device program's control session: C or C#, on 8883 or over WebSocket."""

    def __init__(self, sdk, strings, websocket=False, **login):
        self.sdk, self.parts = sdk, connection_string(strings)
        self.id, self.module = self.parts["DeviceId"], self.parts.get("ModuleId")
        certificate = login.pop("certificate", None)
        host = self.parts.get("GatewayHostName", HUB)
        if websocket:
            path = f"wss://{host}:443/$iothub/websocket"
            protocol = {"c": "MQTT", "csharp": "mqtt"}[sdk]
            connection = WebSocket(sdk, path, protocol=protocol, certificate=certificate)
        else:
            connection = tls(8883, host, certificate=certificate)
        self.connection, self.reader, self.early = connection, Reader(connection), []
        self.refusal = self._connect(**login)
        if self.refusal == 0:
            self._subscribe()

    def resource(self):
        module = f"/modules/{self.module}" if self.module else ""
        return f"{HUB}/devices/{self.id}{module}"

    def _connect(self, password="own", client_id=None, username=None, version="?api-version=2020-09-30"):
        own = f"{self.id}/{self.module}" if self.module else self.id
        keep_alive = {"c": 240, "csharp": 300}[self.sdk]
        agent = AGENTS[self.sdk]
        user = username or f"{HUB}/{own}/{version}&DeviceClientType={agent}"
        if password == "own":
            key = self.parts.get("SharedAccessKey")
            password = sas(self.sdk, self.resource(), key) if key else self.parts.get("SharedAccessSignature")
        flags = 0xC0 if password else 0x80
        body = string("MQTT") + bytes([4, flags]) + struct.pack(">H", keep_alive) + string(client_id or own) + string(user)
        self.connection.sendall(packet(0x10, body + (string(password) if password else b"")))
        kind, answer = self.receive()
        assert kind == 0x20 and len(answer) == 2, (kind, answer)
        return answer[1]

    def _subscribe(self):
        post, res = string("$iothub/streams/POST/#"), string("$iothub/streams/res/#")
        if self.sdk == "c":
            self.connection.sendall(packet(0x82, struct.pack(">H", 2) + post + b"\0" + res + b"\0"))
            assert self._granted() == struct.pack(">H", 2) + b"\0\0"
            return
        for number, topic in ((2, post), (3, res)):
            self.connection.sendall(packet(0x82, struct.pack(">H", number) + topic + b"\0"))
            assert self._granted() == struct.pack(">H", number) + b"\0"

    def _granted(self):
        """The next SUBACK. A request that waited for the subscription may come before it, or between two."""
        while True:
            kind, body = self._packet()
            if kind == 0x90:
                return body
            self.early.append((kind, body))

    def receive(self):
        return self.early.pop(0) if self.early else self._packet()

    def _packet(self):
        """Type and flags, and body, of the next packet."""
        (kind,) = self.reader.exactly(1)
        size, shift = 0, 0
        while True:
            (digit,) = self.reader.exactly(1)
            size |= (digit & 127) << shift
            shift += 7
            if digit < 128:
                return kind, self.reader.exactly(size)

    def request(self):
        """The next stream request, read as strictly as the C client reads it."""
        kind, body = self.receive()
        assert kind == 0x30, f"PUBLISH with QoS 0 and retain 0, not {kind:#x}"
        (size,) = struct.unpack(">H", body[:2])
        topic, payload = body[2 : 2 + size].decode(), body[2 + size :]
        assert payload == b"", "no payload"
        return Request(topic)

    def answer(self, request, status=200):
        self.publish(f"$iothub/streams/res/{status}/?$rid={request.rid}")

    def publish(self, topic, payload=b"", qos=0, number=1):
        tail = struct.pack(">H", number) if qos else b""
        self.connection.sendall(packet(0x30 | qos << 1, string(topic) + tail + payload))

    def leg(self, request):
        return WebSocket(self.sdk, request.url, request.token)

    def accept(self, request):
        """C opens its WebSocket before it sends the accept; C# accepts first."""
        if self.sdk == "c":
            leg = self.leg(request)
            self.answer(request)
            return leg
        self.answer(request)
        return self.leg(request)

    def disconnect(self):
        self.connection.sendall(packet(0xE0, b""))


class Request:
    """A stream request."""

    def __init__(self, topic):
        levels = topic.split("/")
        assert len(levels) == 5 and levels[:3] == ["$iothub", "streams", "POST"], topic
        assert levels[4].startswith("?"), topic
        pairs = [pair.split("=") for pair in levels[4][1:].split("&")]
        assert all(len(pair) == 2 and pair[0] and pair[1] for pair in pairs), f"an empty value aborts the C client: {topic}"
        values = dict(pairs)
        assert set(values) == {"$rid", "$url", "$auth"}, f"nothing of culvert's own for an SDK client: {topic}"
        self.stream, self.rid, self.token = levels[3], values["$rid"], values["$auth"]
        self.url = urllib.parse.unquote(values["$url"])
        uuid.UUID(self.rid)
        assert self.rid == self.rid.lower()
        assert not set(self.token) & set("&=/+#"), self.token
        assert len("Bearer " + self.token) < 1024
        check_url(self.url)


# --- stories ---


class Together:
    """Runs one side in a thread; its failure is the story's."""

    def __init__(self, side, *arguments):
        self.failure, self.result = None, None
        self.thread = threading.Thread(target=self._run, args=(side, arguments), daemon=True)
        self.thread.start()

    def _run(self, side, arguments):
        try:
            self.result = side(*arguments)
        except BaseException as failure:
            self.failure = failure

    def join(self, seconds=90):
        self.thread.join(seconds)
        assert not self.thread.is_alive(), "a side of the story hangs"
        if self.failure:
            raise self.failure
        return self.result


def connect(service, device, stream="TestStream", **timeouts):
    """Both legs of a device stream between two SDK programs: the service's and the device's."""

    def accept():
        request = device.request()
        assert request.stream == stream
        return device.accept(request)

    side = Together(accept)
    return service.open(device.id, stream, module=device.module, **timeouts), side.join()
