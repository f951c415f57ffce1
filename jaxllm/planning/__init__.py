"""What a run will need and how fast it will be, before a device is paid for."""
