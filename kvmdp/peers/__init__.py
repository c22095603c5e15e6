"""Other processes: devices that touch RAM and handlers that fill it, one session each."""
