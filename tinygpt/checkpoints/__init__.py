"""Models on the disk: every form, in and out, and the Hub."""
