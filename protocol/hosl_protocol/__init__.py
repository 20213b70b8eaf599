"""What crosses the wire and what both sides must compute alike: no sockets, no files of weights, no torch."""
