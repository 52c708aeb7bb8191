"""What the hub answers when something is wrong: codes, bodies, headers, in time."""

import re
import time

import stories
import wire

KEY = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="


def refused(status, code, name, answer):
    """Checks an error answer; gives its inner JSON."""
    got, headers, body = answer
    error = wire.error_of(body)
    assert (got, error["errorCode"], headers["iothub-errorcode"]) == (status, code, name), (got, headers, body)
    assert headers["content-type"] == "application/json; charset=utf-8"
    assert headers["x-ms-request-id"]
    assert re.fullmatch(r"[0-9a-f]{32}-TimeStamp:\d\d/\d\d/\d{4} \d\d:\d\d:\d\d", error["trackingId"]), error
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", error["timestampUtc"]), error
    return error


def errors_have_their_codes():
    for sdk in ("node", "csharp", "c"):
        service = wire.Service(sdk)
        refused(404, 404001, "DeviceNotFound", service.post("/twins/nobody/streams/TestStream"))
        refused(404, 404010, "ModuleNotFound", service.post("/twins/device-sdk/modules/none/streams/TestStream"))
        error = refused(404, 404103, "DeviceNotOnline", service.post("/twins/device-sdk/streams/TestStream", connect=0))
        assert error["info"] == {"timeout": "00:00:00"}, error
        assert "isn't online" in error["message"]
        for stream in ("a%2Fb", "a%3Fb", "a%23b", "a%2Bb", "a%0Ab", "a%00b", "x" * 1000):
            refused(400, 400004, "ArgumentInvalid", service.post(f"/twins/device-sdk/streams/{stream}"))
        for connect in ("soon", "-1", "NaN"):
            refused(400, 400004, "ArgumentInvalid", service.post("/twins/device-sdk/streams/s", connect=connect))
        # Any api-version, and a body, which is ignored.
        for version in ("2018-06-30", "2020-09-30", "2019-05-01-preview", "", "x" * 300):
            refused(404, 404103, "DeviceNotOnline", service.post("/twins/device-sdk/streams/s", connect=0, version=version))
        refused(404, 404103, "DeviceNotOnline", service.post("/twins/device-sdk/streams/s", connect=0, body=b"old previews sent this"))


def timeouts_come_from_the_two_headers():
    service, began = wire.Service("csharp"), time.monotonic()
    error = refused(404, 404103, "DeviceNotOnline", service.post("/twins/device-sdk/streams/s", connect="1.5", response=20))
    assert error["info"] == {"timeout": "00:00:01"}, error
    assert 1.4 < time.monotonic() - began < 5
    device = wire.Device("c", "device-sdk.connection")
    began = time.monotonic()
    side = wire.Together(device.request)
    error = refused(504, 504101, "GatewayTimeout", service.post("/twins/device-sdk/streams/s", connect=20, response=2))
    assert error["info"] == {"timeout": "00:00:02"} and error["message"] == "Timed out waiting for the response from device."
    assert 1.9 < time.monotonic() - began < 6
    # A late answer is ignored, and the next request is served.
    device.answer(side.join())
    late = wire.Together(lambda: device.accept(device.request()))
    assert service.open("device-sdk") is not None
    late.join()
    device.disconnect()
    # A device that comes within the connect timeout is waited for.
    opening = wire.Together(lambda: service.open("device-sdk", connect=30))
    device = wire.Device("csharp", "device-sdk.connection", websocket=True)
    device.accept(device.request())
    assert opening.join() is not None
    device.disconnect()


def every_spelling_of_a_token_is_understood():
    path = "/twins/device-sdk/streams/s"
    for sdk in ("c", "node", "csharp"):
        for key in ("primary", "secondary"):
            service = wire.Service(sdk)
            with open(f"{wire.FOLDER}/keys/service.{key}") as file:
                service.parts["SharedAccessKey"] = file.read().strip()
            refused(404, 404103, "DeviceNotOnline", service.post(path, connect=0))
        # The host name's case does not matter; the clock may be five minutes off.
        policy, key = service.parts["SharedAccessKeyName"], service.parts["SharedAccessKey"]
        token = wire.sas(sdk, wire.HUB.upper(), key, policy)
        refused(404, 404103, "DeviceNotOnline", service.post(path, connect=0, token=token))
        token = wire.sas(sdk, wire.HUB, key, policy, expires_in=-200)
        refused(404, 404103, "DeviceNotOnline", service.post(path, connect=0, token=token))
        # Fields in any order.
        token = wire.sas(sdk, wire.HUB, key, policy)
        fields = token.removeprefix("SharedAccessSignature ").split("&")
        for turned in (fields[::-1], fields[1:] + fields[:1]):
            refused(404, 404103, "DeviceNotOnline", service.post(path, connect=0, token="SharedAccessSignature " + "&".join(turned)))
    # Devices: own key in every spelling, a module's, and a policy with the right to connect as a device.
    for strings, module in (("device-sdk.connection", ""), ("module-sdk-m.connection", "/modules/m")):
        parts = wire.connection_string(strings)
        for sdk in ("c", "node", "csharp"):
            token = wire.sas(sdk, f"{wire.HUB}/devices/{parts['DeviceId']}{module}", parts["SharedAccessKey"])
            assert wire.Device("c", strings, password=token).refusal == 0
        with open(f"{wire.FOLDER}/keys/device.primary") as file:
            token = wire.sas("csharp", wire.HUB, file.read().strip(), "device")
        assert wire.Device("c", strings, password=token).refusal == 0


def wrong_tokens_are_refused():
    path, service = "/twins/device-sdk/streams/s", wire.Service("node")
    key, policy = service.parts["SharedAccessKey"], "service"
    device = wire.connection_string("device-sdk.connection")["SharedAccessKey"]
    for token in (
        None,
        "",
        "Bearer abc",
        "SharedAccessSignature ",
        "SharedAccessSignature sr=x",
        wire.sas("node", wire.HUB, KEY, policy),
        wire.sas("node", wire.HUB, key, "nobody"),
        wire.sas("node", wire.HUB, key, None),
        wire.sas("node", "other.culvert.test", key, policy),
        wire.sas("node", wire.HUB, key, policy, expires_in=-400),
        wire.sas("node", wire.HUB, key, policy) + "&se=9999999999",
        wire.sas("c", f"{wire.HUB}/devices/device-sdk", device),
        wire.sas("node", wire.HUB, key, policy) + "x" * 8000,
    ):
        refused(401, 401002, "IotHubUnauthorizedAccess", service.post(path, token=token))
    # A policy without the right.
    with open(f"{wire.FOLDER}/keys/registryRead.primary") as file:
        token = wire.sas("node", wire.HUB, file.read().strip(), "registryRead")
    status, _, body = service.post(path, token=token)
    assert status == 401, (status, body)
    # Devices: a prefix is no path; another device, another hub, an old token, another key.
    for resource, secret, age in (
        (f"{wire.HUB}/devices/device-sd", device, 3600),
        (f"{wire.HUB}/devices/device-sdk2", device, 3600),
        (f"{wire.HUB}/devices/module-sdk", device, 3600),
        ("other.culvert.test/devices/device-sdk", device, 3600),
        (f"{wire.HUB}/devices/device-sdk", device, -400),
        (f"{wire.HUB}/devices/device-sdk", KEY, 3600),
    ):
        token = wire.sas("c", resource, secret, expires_in=age)
        refusal = wire.Device("c", "device-sdk.connection", password=token).refusal
        assert refusal == 5, (resource, refusal)


def tickets_admit_once_and_only_their_side():
    device = wire.Device("c", "device-sdk.connection")
    side = wire.Together(lambda: [request := device.request(), device.answer(request), request][-1])
    _, headers, _ = wire.Service("node").post("/twins/device-sdk/streams/TestStream")
    request = side.join()
    url, token = headers["iothub-streaming-url"], headers["iothub-streaming-auth-token"]
    for wrong_url, wrong_token in (
        (url, None),
        (url, "x" * 43),
        (url, token[:-1]),
        (url, request.token),
        (request.url, token),
        (url.replace("/d/device-sdk", "/d/somebody"), "x" * 43),
        (re.sub("[0-9a-f]{32}", "0" * 32, url), token),
        (url, "x" * 4000),
    ):
        try:
            wire.WebSocket("node", wrong_url, wrong_token)
            raise AssertionError(f"{wrong_url} was open to {wrong_token}")
        except wire.Refused as refusal:
            assert refusal.args[0] in (401, 404), refusal
    service, leg = wire.WebSocket("node", url, token), wire.WebSocket("c", request.url, request.token)
    service.write(b"admitted", 64)
    assert leg.read(8) == b"admitted"
    try:
        wire.WebSocket("node", url, token)
        raise AssertionError("a ticket admits once")
    except wire.Refused as refusal:
        assert refusal.args[0] == 401, refusal
    device.disconnect()


def a_device_that_never_connects_ends_the_service():
    """The whole handshake has 60 s; this story sits them out."""
    device = wire.Device("c", "device-sdk.connection")
    side = wire.Together(lambda: device.answer(device.request()))
    began = time.monotonic()
    service = wire.Service("node").open("device-sdk")
    side.join()
    service.settimeout(90)
    assert service.read_to_close() == b""
    assert 50 < time.monotonic() - began < 70
    assert service.closed[0] == 1011, service.closed


def a_device_that_only_listens():
    """The device is another program, which never answers."""
    answer = wire.Service("node").post("/twins/device-sdk/streams/TestStream", connect=20, response=1)
    refused(504, 504101, "GatewayTimeout", answer)


def one_of_each_result():
    service = wire.Service("node")
    service.post("/twins/device-sdk/streams/Logged", connect=0)
    device = wire.Device("c", "device-sdk.connection")
    service.post("/twins/device-sdk/streams/Logged", response=1)
    device.request()
    side = wire.Together(lambda: device.answer(device.request(), 400))
    assert service.open("device-sdk", "Logged") is None
    side.join()
    wire.connect(service, device, "Logged")


if __name__ == "__main__":
    stories.tell(globals())
