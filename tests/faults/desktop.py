"""Both ends of a remote desktop, in the X11 protocol itself, so that the suite can tell whether it is alive.

desktop.py paint             On the desktop: paints a corner in the colour that belongs to where the pointer is.
desktop.py point FRAMEBUFFER On the screen of the viewer: moves the pointer, waits for the colour in the file that
                             `Xvfb -fbdir` keeps, and prints a line; again and again.
"""

import os, socket, struct, sys, time

# Far enough from each other for a lossy picture.
COLOURS = [0xFF0000, 0x00FF00, 0x0000FF, 0xFFFF00, 0xFF00FF, 0x00FFFF, 0xFFFFFF, 0x000000]
STRIPE = 60  # pixels of the pointer's way per colour


class Display:
    def __init__(self):
        number = os.environ["DISPLAY"].split(":")[1].split(".")[0]
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(f"/tmp/.X11-unix/X{number}")
        name, key = cookie(number)
        self.socket.sendall(struct.pack("<BxHHHHxx", ord("l"), 11, 0, len(name), len(key)) + padded(name) + padded(key))
        status, length = struct.unpack("<B5xH", self.read(8))
        setup = self.read(4 * length)
        assert status == 1, setup
        vendor, formats = struct.unpack("<H3xB", setup[16:22])
        (self.root,) = struct.unpack_from("<I", setup, 32 + (vendor + 3) // 4 * 4 + 8 * formats)

    def read(self, count):
        data = b""
        while len(data) < count:
            more = self.socket.recv(count - len(data))
            if not more:
                sys.exit("the display is gone")
            data += more
        return data

    def paint(self, colour):
        self.socket.sendall(
            struct.pack("<BxHIII", 2, 4, self.root, 2, colour)  # ChangeWindowAttributes: background
            + struct.pack("<BBHIhhHH", 61, 0, 4, self.root, 0, 0, 100, 100)  # ClearArea
        )

    def pointer(self):
        self.socket.sendall(struct.pack("<BxHI", 38, 2, self.root))
        while True:
            reply = self.read(32)
            if reply[0] == 1:  # not an event
                return struct.unpack_from("<h", reply, 16)[0]

    def point(self, x, y):
        self.socket.sendall(struct.pack("<BxHIIhhHHhh", 41, 6, 0, self.root, 0, 0, 0, 0, x, y))


def padded(data):
    return data + bytes(-len(data) % 4)


def cookie(number):
    """The entry of the display in the file of authorisations, if there is one."""
    path = os.environ.get("XAUTHORITY", os.path.expanduser("~/.Xauthority"))
    data = open(path, "rb").read() if os.path.exists(path) else b""
    while len(data) > 2:
        fields, data = [], data[2:]
        for _ in range(4):
            (length,) = struct.unpack_from(">H", data)
            fields.append(data[2 : 2 + length])
            data = data[2 + length :]
        if fields[1].decode() == number:
            return fields[2], fields[3]
    return b"", b""


def paint():
    display = Display()
    while True:
        display.paint(COLOURS[display.pointer() // STRIPE % len(COLOURS)])
        time.sleep(0.05)


def pixel(framebuffer):
    """The colour at (50, 50) of an XWD file with 32 bits per pixel."""
    framebuffer.seek(0)
    header = struct.unpack(">25I", framebuffer.read(100))
    framebuffer.seek(header[0] + 12 * header[19] + 50 * header[12] + 50 * 4)
    return struct.unpack("<I" if header[7] == 0 else ">I", framebuffer.read(4))[0]


def alike(a, b):
    return all(abs((a >> shift & 255) - (b >> shift & 255)) < 64 for shift in (0, 8, 16))


def point(path):
    display, framebuffer, count = Display(), open(path, "rb", buffering=0), 0
    while True:
        at, polls = count % len(COLOURS), 0
        while not alike(pixel(framebuffer), COLOURS[at]):
            if polls % 50 == 0:  # again, a little aside: the viewer's window may not have been there
                display.point(at * STRIPE + STRIPE // 2, 300 + polls // 50 % 100)
            polls += 1
            time.sleep(0.02)
        print("D", count, flush=True)
        count += 1
        time.sleep(0.2)


if sys.argv[1] == "paint":
    paint()
else:
    point(sys.argv[2])
