"""The trainer service: holds the tail, backpropagates through it, and keeps what devices are sent.

"Inside" in cloud/README.md says what is in which folder, where to find and to add things, and which way values take.

The event loop has the sockets, the devices and all decisions. Each run has one compute thread, which alone touches its
tail and its mirror of the devices' weights. The database blocks, and is asked on other threads.
"""
