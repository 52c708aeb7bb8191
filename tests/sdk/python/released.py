"""paho-mqtt as a device's control client and websockets as stream ends, in all the ways that wire.md, b, describes."""

import queue
import ssl
import urllib.parse

import paho.mqtt.client as mqtt
from websockets.sync.client import connect as websocket

import stories
import wire

CA = f"{wire.FOLDER}/ca.pem"
VARIANTS = [
    # Transport, spelling of the token, tail of the user name, stream filter's QoS.
    ("tcp", "c", "/?api-version=2020-09-30&DeviceClientType=third%20party", 1),
    ("tcp", "csharp", "/api-version=2016-11-14", 0),
    ("websockets", "node", "/?api-version=2018-06-30", 1),
    ("websockets", "csharp", "/?api-version=2020-09-30&model-id=dtmi%3Ax%3By%3B1&auth-chain=z", 0),
]


class Paho:
    """A device by paho."""

    def __init__(self, transport, spelling, tail, filters):
        parts = wire.connection_string("device-sdk.connection")
        self.id = parts["DeviceId"]
        self.client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, self.id, clean_session=False, transport=transport)
        if transport == "websockets":
            self.client.ws_set_options(path="/$iothub/websocket?iothub-no-client-cert=true")
        self.client.tls_set(ca_certs=CA)
        token = wire.sas(spelling, f"{wire.HUB}/devices/{self.id}", parts["SharedAccessKey"])
        self.client.username_pw_set(f"{wire.HUB}/{self.id}{tail}", token)
        self.events = queue.Queue()
        self.client.on_connect = lambda _client, _data, _flags, reason, _properties: self.events.put(("connected", reason.value))
        self.client.on_subscribe = lambda _client, _data, _number, codes, _properties: self.events.put(("granted", [code.value for code in codes]))
        self.client.on_message = lambda _client, _data, message: self.events.put((message.topic, message.payload, message.qos, message.retain))
        self.client.connect(wire.HUB, 443 if transport == "websockets" else 8883, keepalive=60)
        self.client.loop_start()
        assert self.next() == ("connected", 0)
        self.granted = [self.subscribe(topic, qos) for topic, qos in filters]

    def next(self):
        return self.events.get(timeout=30)

    def subscribe(self, topic, qos):
        self.client.subscribe(topic, qos)
        said, codes = self.next()
        assert said == "granted"
        return codes[0]

    def stop(self):
        self.client.disconnect()
        self.client.loop_stop()


def paho_answers_stream_requests():
    trust = ssl.create_default_context(cafile=CA)
    for transport, spelling, tail, qos in VARIANTS:
        device = Paho(transport, spelling, tail, [("$iothub/streams/POST/#", qos)])
        assert device.granted[0] <= qos, "granted is at most what was asked"
        side = wire.Together(serve, device, trust)
        status, headers, _ = wire.Service("node").post(f"/twins/{device.id}/streams/TestStream")
        assert (status, headers["iothub-streaming-is-accepted"]) == (200, "True")
        bearer = {"Authorization": f"Bearer {headers['iothub-streaming-auth-token']}"}
        with websocket(headers["iothub-streaming-url"], ssl=trust, additional_headers=bearer, compression="deflate") as leg:
            sent, back = b"x" * 1_000_000, bytearray()
            leg.send(sent)
            while len(back) < len(sent):
                back += leg.recv(timeout=30)
            assert bytes(back) == sent
        side.join()
        device.stop()


def serve(device, trust):
    topic, payload, qos, retain = device.next()
    assert (payload, qos, retain) == (b"", 0, False)
    request = wire.Request(topic)
    device.client.publish(f"$iothub/streams/res/200/?$rid={request.rid}", qos=0)
    bearer = {"Authorization": f"Bearer {request.token}"}
    with websocket(request.url, ssl=trust, additional_headers=bearer, subprotocols=["MQTT"]) as leg:
        assert leg.subprotocol == "MQTT"
        for message in leg:
            assert 0 < len(message) <= 65536
            leg.send(message)


def paho_does_what_a_device_does():
    for transport, spelling, tail, _ in VARIANTS:
        device = Paho(transport, spelling, tail, [])
        for topic, qos, granted in (
            (f"devices/{device.id}/messages/devicebound/#", 1, (0, 1, 128)),
            ("$iothub/methods/POST/#", 0, (0, 128)),
            ("$iothub/twin/res/#", 0, (0,)),
            ("$iothub/twin/PATCH/properties/desired/#", 0, (0, 128)),
            ("$iothub/streams/res/#", 0, (0,)),
            ("$iothub/streams/POST/#", 2, (0, 1)),
            ("devices/somebody-else/messages/devicebound/#", 1, (128,)),
            ("#", 0, (128,)),
            ("$SYS/#", 0, (128,)),
        ):
            code = device.subscribe(topic, qos)
            assert code in granted, (topic, code)
        for topic, qos in (
            (f"devices/{device.id}/messages/events/", 1),
            (f"devices/{device.id}/messages/events/%24.ct=application%2Fjson&n=1", 1),
            (f"devices/{device.id}/messages/events/", 0),
        ):
            device.client.publish(topic, b"{}", qos).wait_for_publish(30)
        device.client.publish("$iothub/twin/GET/?$rid=11", b"", 0)
        topic, payload, _, _ = device.next()
        assert topic == "$iothub/twin/res/200/?$rid=11", topic
        assert b'"desired"' in payload and b'"$version"' in payload, payload
        device.client.publish("$iothub/twin/PATCH/properties/reported/?$rid=12", b'{"a":1}', 0)
        topic, _, _, _ = device.next()
        topic, _, query = topic.partition("?")
        values = urllib.parse.parse_qs(query)
        assert topic == "$iothub/twin/res/204/" and values["$rid"] == ["12"] and int(values["$version"][0]) > 0, query
        # An answer to nothing is ignored, and the session goes on.
        device.client.publish("$iothub/streams/res/200/?$rid=unknown", b"", 0)
        device.client.publish(f"devices/{device.id}/messages/events/", b"still here", 1).wait_for_publish(30)
        device.stop()


if __name__ == "__main__":
    stories.tell(globals())
