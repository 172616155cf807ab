"""One call to attention, on whichever kernel is installed, with the same meaning on each of them."""
