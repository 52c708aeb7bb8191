"""A device program in C's manner that echoes every device stream, for ever."""

import sys
import threading

import mixed
import wire

device = wire.Device("c", sys.argv[1])
print("ready", flush=True)
while True:
    request = device.request()
    leg = device.accept(request)
    threading.Thread(target=mixed.behave, args=(device, "TestStream", leg), daemon=True).start()
