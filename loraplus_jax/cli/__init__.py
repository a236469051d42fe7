"""The command `loraplus`."""
