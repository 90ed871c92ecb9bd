"""What people look at: a live view of a server, and a page made of its event log."""
