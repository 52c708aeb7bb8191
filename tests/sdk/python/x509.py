"""Devices that prove themselves by client certificates, on 8883 and over WebSocket, in C's manner: no password."""

import stories
import wire


def login(device, certificate, websocket):
    """The CONNACK's code."""
    name = f"{device}.x509"
    with open(f"{wire.FOLDER}/{name}", "w") as file:
        file.write(f"HostName={wire.HUB};DeviceId={device};x509=true")
    sdk = "csharp" if websocket else "c"
    return wire.Device(sdk, name, websocket=websocket, certificate=certificate)


def certificates_admit_and_strangers_stay_out():
    for websocket in (False, True):
        for device, certificate, code in (
            ("self-signed", "self-signed", 0),
            ("by-sha1", "self-signed", 0),
            ("by-sha1", "stranger", 0),
            ("ca-signed", "ca-signed", 0),
            ("self-signed", "stranger", 5),
            ("self-signed", "ca-signed", 5),
            ("ca-signed", "self-signed", 5),
            ("self-signed", None, 5),
            ("nobody", "self-signed", 5),
        ):
            device = login(device, certificate, websocket)
            assert device.refusal == code, (device.id, certificate, websocket, device.refusal)
            if code == 0:
                service, leg = wire.connect(wire.Service("node"), device)
                leg.write(b"by certificate", 64)
                assert service.read(14) == b"by certificate"
                service.close()
                device.disconnect()


if __name__ == "__main__":
    stories.tell(globals())
