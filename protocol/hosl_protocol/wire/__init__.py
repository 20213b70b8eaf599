"""What crosses the wire: messages, their frames, and the order in which they may come."""
