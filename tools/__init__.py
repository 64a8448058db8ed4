"""The project's own scripts, started by the Makefile: `sync`, `readme`, `site`."""
