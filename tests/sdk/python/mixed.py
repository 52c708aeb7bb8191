"""SDK programs at one end, culvert's daemons at the other, which the story has started."""

import os
import socket
import threading

import stories
import wire

DATA = os.urandom(1 << 20)


# --- SDK service program -> culvert device ---


def sdk_services_reach_targets_by_stream_name():
    for sdk, size in (("node", 65536), ("csharp", 10240), ("c", 64)):
        leg = wire.Service(sdk).open("pump", "echo")
        writing = wire.Together(leg.write, DATA, size)
        assert leg.read(len(DATA)) == DATA
        writing.join()
        # A local EOF of the SDK program ends the stream; the echo server ends too, and says so.
        leg.close(*({"node": (), "csharp": (1000,), "c": (1000,)}[sdk]))
        leg.read_to_close()
        assert leg.closed[0] in (1000, None), leg.closed


def refusals_are_answers():
    service = wire.Service("node")
    for stream in ("no-such-target", "nobody-listens", "culvert-x"):
        assert service.open("pump", stream) is None, stream


def a_module_of_culvert_serves_targets():
    leg = wire.Service("node").open("pump", "echo", module="side")
    leg.write(DATA[:1000], 64)
    assert leg.read(1000) == DATA[:1000]
    leg.close()


def a_culvert_device_serves():
    leg = wire.Service("node").open("pump", "echo")
    leg.write(DATA[:1000], 64)
    assert leg.read(1000) == DATA[:1000]
    leg.close()


def a_device_by_certificate_serves_targets():
    leg = wire.Service("csharp").open("self-signed", "echo")
    leg.write(DATA[:1000], 10240)
    assert leg.read(1000) == DATA[:1000]
    leg.close(1000)


def the_targets_end_is_the_services():
    """A plain stream has no half-close: the device holds the target's end for 30 s of silence, then closes."""
    leg = wire.Service("node").open("pump", "goodbye")
    assert leg.read_to_close() == b"goodbye" * 1000
    assert leg.closed[0] == 1000, leg.closed
    leg.close()
    # A target that breaks is no clean end.
    leg = wire.Service("node").open("pump", "broken")
    leg.write(b"now", 64)
    leg.read_to_close()
    assert leg.closed == (1011, "WS disconnected"), leg.closed


def an_abrupt_service_resets_the_target():
    with socket.create_server(("127.0.0.1", 7003)) as server:
        leg = wire.Service("csharp").open("pump", "watched")
        target, _ = server.accept()
        target.settimeout(30)
        leg.write(b"half", 64)
        assert exactly(target, 4) == b"half"
        leg.drop()
        try:
            assert False, f"a cut is no end: {target.recv(1)!r}"
        except ConnectionResetError:
            pass


# --- culvert service, mode = "plain" -> SDK device program ---


def serve_device(device, requests, behave):
    """A device program: accepts requests, and behaves in each device stream as its name says."""
    for _ in range(requests):
        request = device.request()
        leg = device.accept(request)
        threading.Thread(target=behave, args=(device, request.stream, leg), daemon=True).start()


def behave(device, stream, leg):
    size = {"c": 64, "csharp": 10240}[device.sdk]
    if stream == "TestStream":
        while True:
            opcode, payload = leg.receive()
            if opcode == wire.CLOSE:
                return leg.answer_close()
            leg.write(payload, size)
    elif stream == "Abrupt":
        # The C sample after a local EOF.
        leg.write(DATA[:100_000], size)
        leg.drop()
    elif stream == "Polite":
        leg.write(DATA[:100_000], size)
        leg.close(1000)
        leg.read_to_close()
    elif stream == "Empty":
        # The C# sample after a local EOF: empty messages without end.
        leg.write(b"data", size)
        for _ in range(10_000):
            leg.send(b"")
        leg.write(b"more", size)
        leg.read_to_close()


def local(port):
    connection = socket.create_connection(("127.0.0.1", port), timeout=60)
    connection.settimeout(60)
    return connection


def exactly(connection, count):
    return wire.Reader(connection).exactly(count)


def received(connection):
    """What comes up to the end, and whether that was clean."""
    data = bytearray()
    try:
        while more := connection.recv(65536):
            data += more
        return bytes(data), "end"
    except ConnectionResetError:
        return bytes(data), "reset"


def sdk_devices_serve_plain_forwards():
    for sdk, websocket in (("c", False), ("c", True), ("csharp", True)):
        device = wire.Device(sdk, "device-sdk.connection", websocket=websocket)
        wire.Together(serve_device, device, 5, behave)
        # One device stream per connection, several at once.
        together = [wire.Together(echoed, 7100) for _ in range(3)]
        for side in together:
            side.join()
        # The local program closes first: it hears the rest, then the end.
        connection = local(7100)
        connection.sendall(b"last")
        assert exactly(connection, 4) == b"last"
        connection.close()
        assert received(local(7101)) == (DATA[:100_000], "end")
        device.disconnect()


def sdk_modules_serve_plain_forwards():
    device = wire.Device("c", "device-sdk-m.connection", websocket=True)
    wire.Together(serve_device, device, 2, behave)
    echoed(7105)
    echoed(7105)


def echoed(port):
    connection = local(port)
    writing = wire.Together(connection.sendall, DATA)
    assert exactly(connection, len(DATA)) == DATA
    writing.join()
    connection.close()


def the_abrupt_end_of_c_is_a_reset_unless_the_rule_says_otherwise():
    device = wire.Device("c", "device-sdk.connection")
    wire.Together(serve_device, device, 2, behave)
    data, end = received(local(7103))
    assert (data, end) == (DATA[:100_000], "end"), (len(data), end)
    data, end = received(local(7102))
    assert end == "reset", "without plain_eof nobody can tell a cut from an end"
    assert DATA[:100_000].startswith(data)


def empty_messages_are_swallowed():
    device = wire.Device("csharp", "device-sdk.connection", websocket=True)
    wire.Together(serve_device, device, 1, behave)
    connection = local(7104)
    assert exactly(connection, 8) == b"datamore"
    connection.close()


def a_device_that_says_no_resets_the_connection():
    device = wire.Device("c", "device-sdk.connection")
    side = wire.Together(lambda: device.answer(device.request(), 400))
    assert received(local(7100)) == (b"", "reset")
    side.join()


# --- a mux forward that leads to an SDK device by mistake ---


def an_sdk_device_speaks_first_in_a_mux_stream():
    device = wire.Device("c", "device-sdk.connection")
    request = device.request()
    assert request.stream == "culvert-mux-1"
    leg = device.accept(request)
    leg.write(b"SSH-2.0-OpenSSH_9.2p1\r\n", 64)
    leg.read_to_close()


if __name__ == "__main__":
    stories.tell(globals())
