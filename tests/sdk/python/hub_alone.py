"""SDK service program -> SDK device program through the hub alone, in every pair of languages and transports."""

import os
import time

import stories
import wire

MEGABYTE = os.urandom(1 << 20)


def both_ways(service, device):
    """A megabyte each way at once; the C side in its 64-byte frames, Node in 64 KiB, C# in 10,240."""
    sizes = {"c": 64, "node": 65536, "csharp": 10240}
    writers = [
        wire.Together(service.write, MEGABYTE, sizes[service.sdk]),
        wire.Together(device.write, MEGABYTE[::-1], sizes[device.sdk]),
    ]
    reader = wire.Together(device.read, len(MEGABYTE))
    assert service.read(len(MEGABYTE)) == MEGABYTE[::-1]
    assert reader.join() == MEGABYTE
    for writer in writers:
        writer.join()


def a_device_program_of_each_kind_serves_every_service_program():
    for device_sdk, websocket in (("c", False), ("c", True), ("csharp", True), ("csharp", False)):
        device = wire.Device(device_sdk, "device-sdk.connection", websocket=websocket)
        for service_sdk in ("node", "csharp", "c"):
            service, leg = wire.connect(wire.Service(service_sdk), device)
            both_ways(service, leg)
            service.close(*({"node": (), "csharp": (1000,), "c": (1000,)}[service_sdk]))
            leg.read_to_close()
            assert leg.closed[0] in (1000, None, 1011), leg.closed
            leg.answer_close()
            service.read_to_close()
            assert service.pings == leg.pings == 0, "the hub pings nobody who does not ping"
        device.disconnect()


def a_module_has_its_own_channel():
    device = wire.Device("c", "module-sdk-m.connection")
    service, leg = wire.connect(wire.Service("node"), device, "ModuleStream")
    service.write(b"to the module", 64)
    assert leg.read(13) == b"to the module"
    leg.close(1000)
    assert service.read_to_close() == b""
    device.disconnect()


def bytes_sent_before_the_other_side_came_are_not_lost():
    device = wire.Device("c", "device-sdk.connection")
    # The service first: it sends before the device's leg is there.
    accepting = wire.Together(lambda: [request := device.request(), device.answer(request), request][-1])
    service = wire.Service("node").open(device.id)
    request = accepting.join()
    service.write(b"x" * 300_000, 65536)
    leg = device.leg(request)
    assert leg.read(300_000) == b"x" * 300_000
    # What was sent right before the Close arrives before the end.
    service.write(b"last words" * 1000, 65536)
    service.close()
    assert leg.read_to_close() == b"last words" * 1000
    # The device first: it opens its WebSocket and sends before it accepts.
    side = wire.Together(early_device, device)
    service = wire.Service("csharp").open(device.id)
    leg = side.join()
    assert service.read(5) == b"early"
    leg.drop()
    device.disconnect()


def early_device(device):
    request = device.request()
    leg = device.leg(request)
    leg.write(b"early", 64)
    device.answer(request)
    return leg


def each_manner_of_ending_reaches_the_other_side():
    device = wire.Device("c", "device-sdk.connection")
    # C: TCP ends without a Close. The survivor hears 1011 `WS disconnected`, after all data.
    service, leg = wire.connect(wire.Service("node"), device)
    leg.write(b"before the end" * 100, 64)
    leg.drop()
    assert service.read_to_close() == b"before the end" * 100
    assert service.closed == (1011, "WS disconnected"), service.closed
    # Node: an empty Close; C hears an end and answers with an empty Close.
    service, leg = wire.connect(wire.Service("node"), device)
    service.close()
    leg.read_to_close()
    assert leg.closed[0] in (1000, None), leg.closed
    leg.answer_close()
    service.read_to_close()
    assert service.reader.connection.recv(1) == b"", "the hub ends TCP after the Closes"
    # C#: 1000.
    service, leg = wire.connect(wire.Service("csharp"), device)
    service.close(1000)
    leg.read_to_close()
    assert leg.closed[0] == 1000, leg.closed
    # C# service program: disposes, which is abrupt.
    service, leg = wire.connect(wire.Service("csharp"), device)
    service.drop()
    leg.read_to_close()
    assert leg.closed == (1011, "WS disconnected"), leg.closed
    device.disconnect()


def frames_of_every_kind_pass_as_bytes():
    device = wire.Device("c", "device-sdk.connection")
    service, leg = wire.connect(wire.Service("csharp"), device)
    # Fragments with a ping between, and a text frame: all are data. Empty frames vanish.
    service.send(b"one", fin=False)
    service.send(b"are you there", opcode=wire.PING)
    service.send(b"two", opcode=wire.CONTINUATION, fin=False)
    service.send(b"", opcode=wire.CONTINUATION, fin=True)
    for _ in range(1000):
        service.send(b"")
    service.send(b"three", opcode=wire.TEXT)
    service.send(b"unasked", opcode=wire.PONG)
    assert leg.read(11) == b"onetwothree"
    assert leg.pings == 0
    # One large frame in, frames of at most 65,536 bytes out (`receive` asserts it).
    large = os.urandom(1_000_000)
    writing = wire.Together(service.send, large)
    assert leg.read(len(large)) == large
    writing.join()
    device.disconnect()
    # A device's session may end; its streams go on.
    leg.write(b"still here", 64)
    assert service.read(10) == b"still here"
    service.close()


def a_c_device_renews_its_token_and_its_streams_survive():
    device = wire.Device("c", "device-sdk.connection")
    service, leg = wire.connect(wire.Service("node"), device)
    device.disconnect()
    device = wire.Device("c", "device-sdk.connection")
    service.write(b"through the old stream", 65536)
    assert leg.read(22) == b"through the old stream"
    second, second_leg = wire.connect(wire.Service("node"), device)
    second.write(b"and a new one", 65536)
    assert second_leg.read(13) == b"and a new one"
    # Without DISCONNECT: the same id connects again, the old session is dropped.
    again = wire.Device("c", "device-sdk.connection")
    device.reader.connection.settimeout(30)
    try:
        kind, _ = device.receive()
        raise AssertionError(f"the old session hears {kind:#x}")
    except (EOFError, OSError):
        pass
    leg.write(b"back", 64)
    assert service.read(4) == b"back"
    again.disconnect()


def a_rejection_is_an_answer():
    device = wire.Device("c", "device-sdk.connection")
    side = wire.Together(lambda: device.answer(device.request(), 400))
    assert wire.Service("node").open(device.id) is None
    side.join()
    device.disconnect()


def served_once(device):
    service, leg = wire.connect(wire.Service("node"), device)
    service.write(b"hello", 64)
    assert leg.read(5) == b"hello"
    service.close()
    device.disconnect()


def a_device_comes_by_way_of_a_gateway():
    """TCP and SNI are the gateway's, the user name and the token the hub's."""
    for sdk, websocket in (("c", False), ("c", True), ("csharp", True)):
        for strings in ("device-sdk-gateway.connection", "module-sdk-m-gateway.connection"):
            served_once(wire.Device(sdk, strings, websocket=websocket))


def a_device_comes_with_a_ready_made_token():
    for sdk, websocket in (("c", False), ("csharp", True)):
        served_once(wire.Device(sdk, "device-sdk-token.connection", websocket=websocket))


def small_frames_pass_at_speed():
    """8 MB in 64-byte frames within a small multiple of 8 MB in 64 KiB frames; the best of three of each."""
    device = wire.Device("c", "device-sdk.connection")
    service, leg = wire.connect(wire.Service("node"), device)
    data, took = os.urandom(8_000_000), {}
    for size in (65536, 64):
        frames = [leg.frame(data[at : at + size]) for at in range(0, len(data), size)]
        # What one write of the sample's TLS would hold does not matter here: the hub's work per frame does.
        blocks = [b"".join(frames[at : at + 512]) for at in range(0, len(frames), 512)]
        took[size] = min(timed(service, leg, data, blocks) for _ in range(3))
    ratio = took[64] / took[65536]
    print(f"8 MB device to service: {took[65536]:.3f} s in 64 KiB frames, {took[64]:.3f} s in 64-byte frames, ratio {ratio:.1f}")
    assert ratio < 20, "the work per frame is too much"
    device.disconnect()


def timed(service, leg, data, blocks):
    began = time.monotonic()
    writing = wire.Together(lambda: [leg.connection.sendall(block) for block in blocks])
    assert service.read(len(data)) == data
    writing.join()
    return time.monotonic() - began


def revocation_ends_what_it_admitted():
    """Disabling a device, or a new key, ends its session and its streams within 5 s."""
    owner = wire.Service("node", "owner.connection")
    for change in ({"status": "disabled"}, {"status": "enabled", "authentication": {"type": "sas", "symmetricKey": {"primaryKey": "A" * 43 + "=", "secondaryKey": "B" * 42 + "E="}}}):
        device = wire.Device("c", "device-sdk.connection")
        service, leg = wire.connect(wire.Service("node"), device)
        status, _, body = owner.call("PUT", "/devices/device-sdk", {"deviceId": "device-sdk", **change})
        assert status == 200, body
        began = time.monotonic()
        for end in (service, leg):
            end.settimeout(10)
            assert end.read_to_close() == b""
            assert end.closed[0] not in (1000, None), end.closed
        device.reader.connection.settimeout(10)
        try:
            kind, _ = device.receive()
            raise AssertionError(f"the revoked session hears {kind:#x}")
        except (EOFError, ConnectionError):
            pass
        assert time.monotonic() - began < 5
        assert wire.Device("c", "device-sdk.connection").refusal == 5
        owner.call("PUT", "/devices/device-sdk", {"deviceId": "device-sdk", "status": "enabled"})


if __name__ == "__main__":
    stories.tell(globals())
